// Package attest establishes who is calling at a Unix socket of the agent.
//
// It owns the descriptors that pin each caller's process and the facts taken
// about it. It trusts the kernel and nothing else: no byte of the caller's own
// making takes part (WL-8, WL-9).
//
// Order of steps for one connection:
//
//  1. Credentials pins the peer before any byte is read: SO_PEERCRED for uid
//     and gid at the time of connect, SO_PEERPIDFD for a descriptor of that very
//     process, which no later process with the same pid can take over. Kernels
//     before 6.5 have no SO_PEERPIDFD; there the pidfd is opened by pid between
//     two readings of the start time, which leaves a short race (Mode says so).
//  2. Facts are taken through the pinned process: effective uid and gid must
//     still be those of the connect; supplementary groups, cgroup, and device and
//     inode of the executable where the agent may read them. A poll of the pidfd
//     ends the step: a process that is alive now had its pid all the while, so
//     what was read under /proc/<pid> belongs to it.
//  3. Selectors asks every configured Source about those facts, once per
//     process. All must succeed.
//  4. Check runs before each message: the same facts again, then the poll. It
//     costs a few microseconds and no descriptor.
//
// The handshake never fails because of who the peer is. A *Peer carries the
// refusal, so that it reaches the caller as the status of its RPC.
//
// Connecting and then running execve in one uid is not a boundary: whoever holds
// the socket gets the answer. Check ends a stream whose process has replaced its
// program since it was pinned; it cannot see what happened before.
package attest

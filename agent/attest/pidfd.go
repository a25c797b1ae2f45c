//go:build !nopidfd

package attest

// pinned says that a process is held by a pidfd. A build with the tag nopidfd
// has SO_PEERCRED alone: it exists to show that the attack on reused pids
// succeeds without the pidfd (NEG-36), and must never be shipped.
const pinned = true

// Package cache holds what this node's workloads are entitled to and what they
// are served: entries and bundle as the server last said, and for each entry an
// X.509-SVID whose key was made here.
//
// It trusts the server for entries and bundles, and still checks every
// certificate before serving it: chain, name and key. It never waits for the
// server in order to serve: what it holds is good until each SVID's own end
// (I9), also across a restart, through a file that is sealed under the agent's
// key.
//
// The order of steps:
//
//  1. Load the sealed file and the newest bundle of the state.
//  2. Sync (sync.go): apply each message of the server whole. A bundle is
//     durable before anything is served from it; an entry that went takes its
//     key and SVID along at once.
//  3. Sign (sign.go): entries without a good SVID go to the server in batches,
//     those that a workload waits for first. A renewal makes a new key.
//  4. Serve (subscribe.go): subscriptions of which the attestor says the same
//     share one group; to what the kernel says of a process in a pod, the server's
//     word on pod and container is added (pods.go). A group computes its
//     snapshot once per change and tells its subscribers only when the result is
//     another.
//  5. Account (account.go): the server hears which bundle every open stream
//     has, and how long SVIDs live that were handed out before.
//  6. Seal (seal.go): write what a restart needs, at most once a second.
//
// One mutex guards the state and is never held across I/O. Snapshots are
// immutable and read without it.
package cache

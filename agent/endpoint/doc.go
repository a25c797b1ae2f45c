// Package endpoint serves the SPIFFE Workload API on the agent's Unix socket.
//
// It owns the socket's connections and streams, the limits on them, and the
// encoded messages. It trusts package attest for who is calling and its
// subscriptions for what that caller may have; nothing that the caller sends
// takes part in either (WL-8).
//
// Every RPC goes one way, caller -> subscription -> message:
//
//  1. The connection is accepted, its peer pinned, and counted against the
//     limits of its uid and of all.
//  2. Package rpc demands the security header, then the method table (WL-5).
//  3. The caller is attested and subscribed by its selectors.
//  4. A caller that gets nothing now is held for a while: an entry made in the
//     meantime reaches it without the client's back-off.
//  5. Each message is the complete state (WL-21), checked against what clients
//     rely on (WL-31), encoded once per snapshot, and sent if it differs from
//     the one before (WL-23). The caller is checked again before each (WL-26).
//  6. A stream ends with PermissionDenied when nothing is left to serve or the
//     caller is no longer who it was, else with Unavailable: never with Canceled,
//     OK or InvalidArgument, which make clients stop for good (WL-24, WL-28).
package endpoint

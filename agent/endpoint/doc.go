// Package endpoint serves the SPIFFE Workload API and Envoy's secret discovery
// service (SDS), each on a Unix socket of the agent.
//
// It owns the sockets' connections and streams, the limits on them, and the
// encoded messages. It trusts package attest for who is calling and its
// subscriptions for what that caller may have; nothing that the caller sends
// takes part in either (WL-8).
//
// Every RPC goes one way, caller -> subscription -> message:
//
//  1. The connection is accepted, its peer pinned, and counted against the
//     limits of its uid and of all.
//  2. Package rpc demands the security header, then the method table (WL-5).
//     Envoy sends no header, and none is demanded on its socket.
//  3. The caller is attested and subscribed by its selectors.
//  4. A caller that gets nothing now is held for a while: an entry made in the
//     meantime reaches it without the client's back-off.
//  5. Each message is the complete state (WL-21), checked against what clients
//     rely on (WL-31), encoded once per snapshot, and sent if it differs from
//     the one before (WL-23). The caller is checked again before each (WL-26).
//  6. A stream ends with PermissionDenied when nothing is left to serve or the
//     caller is no longer who it was, else with Unavailable: never with Canceled,
//     OK or InvalidArgument, which make clients stop for good (WL-24, WL-28).
//
// A stream of SDS goes the same way from its first request on. What its client
// asks for only chooses among what the caller may have; a request while the stream
// is served is one more reason to look whether there is something to send. The
// client is known by its connection: its node id is its own word.
package endpoint

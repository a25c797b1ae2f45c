// Package api owns the server's gRPC handlers: Assay's agent protocol, and on
// the admin socket SPIRE's published operators' API and Assay's own additions.
//
// It trusts the caller that pkg/rpc established (a verified X.509-SVID or the
// kernel's peer credentials) and nothing that a request says about its sender.
// It makes no certificate and decides no identity itself: entries come from
// the registry, signatures from the authority, and a CSR gives a public key
// and nothing else (I1, I2).
//
// Every handler takes the same steps:
//
//  1. The method table's rule has passed, from memory (methods.go).
//  2. An agent's serial is marked as used, which makes a renewed one active.
//  3. The request is checked and turned into Go types; what is wrong with one
//     item of a batch fails that item alone.
//  4. The room that owns the matter acts; its writes are durable on return.
//  5. The audit line is on disk. If it can't be written there is no answer.
//  6. The answer goes out.
package api

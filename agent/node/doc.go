// Package node proves the node to the server, keeps the agent's own X.509-SVID
// fresh, and owns the connection to the server.
//
// It trusts the bundle in the agent's state; before there is an authenticated
// one, the file or the pin that the operator gave it, and nothing else. It
// believes no name that the server did not prove.
//
// The order of steps (Run):
//
//  1. First trust: a trust bundle file, whole; or a pin, by which one root is
//     picked out of an answer that is otherwise not believed. Neither is looked
//     at again once a bundle came from an authenticated server.
//  2. Identity: a live one from the state; else attestor "rejoin" with the key
//     of the expired one; else a join token that was not used yet. The key of
//     the CSR is durable before the server sees it, so a lost reply costs one
//     more try with the same key and never the token.
//  3. Connection: one authenticated call proves that the certificate is
//     accepted, and makes a renewed one the active one. Then the connection is
//     handed out.
//  4. Renewal at half life by the wall clock, with a new key. The new
//     certificate gets a new connection; the old one is closed when its last
//     user let go of it.
//
// Whatever the server refuses, the agent stays up, says why, and tries again
// with growing pauses. Only a ban ends Run: then the identity is removed.
package node

// Package keys owns the private keys of authorities: it makes them, and opens
// them again from a reference that the store may hold in the clear.
//
// The one implementation is Sealed: the reference is the key itself, encrypted
// with AES-256-GCM under the seal key, which lives in a file outside the store.
// A stolen store is then no key, and a stolen seal key no store; both together
// are the whole CA.
//
// What is trusted: the seal key file (owner and mode are checked by
// pkg/durable) and nothing that comes out of the store. A reference is bound to
// its trust domain and to the authority id computed from the public key; Open
// decrypts, computes the id anew and compares, so a reference that was moved
// from another record, another trust domain or another seal key does not open.
//
// Nothing in this package prints: seal keys and signers have formatters for
// every way of printing that yield a constant text.
package keys

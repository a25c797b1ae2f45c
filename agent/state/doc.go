// Package state keeps what an agent must not forget in its data directory:
// who it is, which key it will use next, which bundle it trusts, and how long
// what it handed out can live.
//
// It owns the files of that directory, each written whole and durably with
// mode 0600, and the lock on the directory. It trusts what it wrote before and
// nothing else: a file that can't be read as written stops the start and is
// named together with its mend, because guessing here means trusting a wrong
// root or losing a one-time right.
//
// The order that makes crashes harmless:
//
//  1. NextKey makes a key durable before anybody sees a CSR of it. So a lost
//     reply to a redeemed join token or a renewal is answered by asking again
//     with the same key.
//  2. SaveIdentity writes key and chain into one file, so they can't disagree,
//     and then forgets the next key.
//  3. SaveBundle is durable before anything is served or acknowledged from the
//     new bundle, and never goes back once a bundle came authenticated.
package state

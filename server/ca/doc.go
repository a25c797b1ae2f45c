// Package ca owns the trust domain's authorities and is the only road to a
// signature: for agents, operators, Istio and the server itself.
//
// # The issuance cycle
//
// Every end-entity certificate is made by IssueX509, which does this and
// nothing else:
//
//  1. Plan. For each request a pure function of profile, request, issuer and
//     now decides what will be in the certificate, or why there will be none.
//     No name comes from a CSR; a request carries a public key and the identity
//     that the server has looked up. NotAfter is the earliest of what was asked,
//     the profile's cap and the issuer's own end.
//  2. Marks. The root's record in the store holds, per class, a moment that no
//     certificate below the root outlives. If the plan goes past a mark, the
//     mark is raised first, by a commit that holds only while the record is
//     what this server believes it to be: active. The mark is set well ahead,
//     so this is one write in about ten minutes.
//  3. Audit. One line for each certificate about to be signed, with its serial,
//     and one for each refusal, is on disk before any signature exists.
//  4. Sign, on all cores. An issuer in memory, path length 0, signs under the
//     root; the root's key is opened only to make an issuer.
//  5. Answer. Leaf and issuer; the root is in the bundle already.
//
// A crash between two steps leaves a mark that is too high or an audit line
// without a certificate. Both err on the safe side: a root is kept a little
// longer, an investigation sees what was about to be signed.
//
// # Authorities
//
// The records under authority/ are the one truth: the trust bundle is a
// projection of them. Each record carries a MAC over its name and value, and
// the sequence record a digest over all (authority, state), changed in the same
// commit as any state. What does not verify stops Open, and Run at run time,
// with store_corrupt. A first root is made only on the UTC day that the option
// Bootstrap names and in a store without authorities; nothing else ever makes
// one by itself.
//
// Several servers may share a store. Each reads it again whenever a watch or
// the heartbeat says so, and believes a commit's precondition, not its memory.
// A server that has not heard from its store for a minute stops signing.
//
// What is trusted: the store for durability but not for content, the MAC key,
// the audit log's word that a line is durable, and this machine's clock.
package ca

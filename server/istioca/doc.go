// Package istioca is the CA of an Istio mesh: istio.v1.auth.IstioCertificateService
// as istio-agent and ztunnel call it, so that a mesh takes its certificates from
// here with nothing changed but the address.
//
// It owns who may ask for what. A caller proves itself by a ServiceAccount's
// token, and by nothing else that it says:
//
//  1. bearer: the request has one token, which looks like a ServiceAccount's for
//     one of our audiences. This costs microseconds and asks nobody.
//  2. choose: the token's issuer and the clusterid header name one cluster.
//  3. verify: that cluster's API server reviews the token, or its published keys
//     do (OIDC). No answer is no certificate: Unavailable.
//  4. authorize: the identity is that of the token's ServiceAccount. A node proxy
//     (ztunnel) may have that of a pod which runs on its own node.
//  5. The request gives a key; the names in it agree or are absent.
//  6. Package ca signs, by the one road there is. The answer is the leaf, the
//     issuer, and all published roots as its last element, because these clients
//     take their roots from there.
//
// istiod, when it is no CA itself, gets its certificate from here too: Istiods keep
// it in a Secret of its cluster, by the same road. The roots that proxies find in
// their namespaces are package kube's.
//
// Beside that it keeps istiod's own certificate in a Secret of its cluster, since an
// istiod that is no CA has none.
//
// The codes are those that the clients act upon: what will be refused again is
// Unauthenticated, PermissionDenied or InvalidArgument, which they don't repeat;
// what may work in a moment is Unavailable, which they do. A refusal's text is
// Istio's own and says nothing; the log and the audit log have the reason.
package istioca

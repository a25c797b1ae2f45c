// Package kube asks Kubernetes clusters what the server has to know of them:
// whether a token is that of an agent's pod, and which pods run on which node. It
// tells them the trust bundle, for agents that have never joined and for the proxies of
// an Istio mesh, and keeps istiod's certificate in a Secret.
//
// It trusts a cluster's API server for what is true of that cluster, and
// nothing that an agent says. What the API server answers is held to the rules
// again: a token counts only if it was reviewed for our audience and is bound
// to a pod that is there now.
//
// It uses two of the many API groups, so it has a scheme of its own with those
// two and not the whole of client-go's.
package kube

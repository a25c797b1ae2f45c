package kube

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Clusters are the clusters of the configuration.
type Clusters struct {
	cfg      Config
	template *Template
	byName   map[string]*cluster
}

type cluster struct {
	name  string
	cfg   ClusterConfig
	api   *api
	index *index
	// publisher of the trust bundle; nil: it is published nowhere there.
	publisher *publisher
}

// Open prepares all clusters; none is asked anything yet. version is the
// server's own, for the API servers' logs. The configuration has passed Check.
func Open(cfg Config, td spiffeid.TrustDomain, reserved, version string) (*Clusters, error) {
	template, err := NewTemplate(td, reserved, cfg.Template)
	if err != nil {
		return nil, err
	}
	all := &Clusters{cfg: cfg, template: template, byName: make(map[string]*cluster, len(cfg.Clusters))}
	for name, c := range cfg.Clusters {
		access, err := restConfig(name, c.Kubeconfig)
		if err != nil {
			return nil, err
		}
		api, err := newAPI(name, access, "assay-server/"+version)
		if err != nil {
			return nil, err
		}
		cl := &cluster{name: name, cfg: c, api: api, index: newIndex(name)}
		if c.BundleConfigMap != "" {
			cl.publisher = newPublisher(name, c.BundleConfigMap, api)
		}
		all.byName[name] = cl
	}
	return all, nil
}

// Node is the node of an agent's pod, as its cluster's API server has it.
type Node struct {
	Cluster string
	Name    string
	UID     string
	Labels  map[string]string // the ones that the configuration lets through
	// The agent's own pod.
	Namespace, ServiceAccount, PodName, PodUID string
	// Token names the token; empty if the API server does not.
	Token string
}

// Extra names of a TokenReview's user, and what all ServiceAccounts are.
const (
	extraPodName     = "authentication.kubernetes.io/pod-name"
	extraPodUID      = "authentication.kubernetes.io/pod-uid"
	extraNodeName    = "authentication.kubernetes.io/node-name"
	extraNodeUID     = "authentication.kubernetes.io/node-uid"
	extraToken       = "authentication.kubernetes.io/credential-id"
	accountPrefix    = "system:serviceaccount:"
	accountsGroup    = "system:serviceaccounts"
	accountsGroupFor = "system:serviceaccounts:"
)

// AgentNode finds out which node the holder of a token is the agent of. The
// token is that of a pod's ServiceAccount, bound to that pod. The steps are:
//
//  1. the cluster's API server reviews it, for our audience;
//  2. its ServiceAccount is one of agents;
//  3. the pod that it is bound to is there, with that UID and ServiceAccount,
//     has not ended and is not past its deletion;
//  4. so is the pod's node, and if the token names a node it is that one.
//
// A refusal is fault.Denied with reason psat_rejected, whatever the step; its
// cause has the step's own reason, for the log.
func (c *Clusters) AgentNode(ctx context.Context, clusterName, token string) (Node, error) {
	cl := c.byName[clusterName]
	if cl == nil {
		return Node{}, rejected("cluster_unknown", "kubernetes.clusters has no cluster of that name")
	}
	status, err := cl.api.review(ctx, token, cl.cfg.Audience)
	if err != nil {
		return Node{}, err
	}
	bound, err := cl.cfg.readReview(status)
	if err != nil {
		return Node{}, err
	}
	pod, err := cl.api.pod(ctx, bound.Namespace, bound.PodName)
	if err != nil {
		return Node{}, gone(err, "pod_gone", "the token's pod is not there any more")
	}
	if err := bound.checkPod(pod, time.Now()); err != nil {
		return Node{}, err
	}
	node, err := cl.api.node(ctx, pod.Spec.NodeName)
	if err != nil {
		return Node{}, gone(err, "node_gone", "the pod's node is not there any more")
	}
	if string(node.UID) == "" || bound.UID != "" && bound.UID != string(node.UID) {
		return Node{}, rejected("node_mismatch", "the token is of another node of that name")
	}
	found := bound
	found.Cluster, found.Name, found.UID, found.Labels = cl.name, node.Name, string(node.UID), map[string]string{}
	for _, key := range cl.cfg.NodeLabels {
		if value, ok := node.Labels[key]; ok {
			found.Labels[key] = value
		}
	}
	return found, nil
}

// readReview takes from a review what it proves; Name and UID are those of the
// token, and empty if an older API server does not say. No claim may be there
// twice: two that differ could be read in two ways.
func (c ClusterConfig) readReview(s authenticationv1.TokenReviewStatus) (Node, error) {
	if s.Error != "" || !s.Authenticated {
		return Node{}, rejected("token_invalid", "the API server does not take the token")
	}
	// A reviewer that does not know audiences leaves them out, having checked
	// none: then the token may be one for the API server itself.
	if !slices.Contains(s.Audiences, c.Audience) {
		return Node{}, rejected("audience", "the API server does not say that the token is for the audience "+c.Audience)
	}
	account, ok := strings.CutPrefix(s.User.Username, accountPrefix)
	namespace, name, split := strings.Cut(account, ":")
	if !ok || !split || !label.MatchString(namespace) || !subdomain.MatchString(name) ||
		!slices.Contains(s.User.Groups, accountsGroup) || !slices.Contains(s.User.Groups, accountsGroupFor+namespace) {
		return Node{}, rejected("no_service_account", "the token is no ServiceAccount's")
	}
	if !slices.Contains(c.AgentServiceAccounts, namespace+"/"+name) {
		return Node{}, rejected("service_account", "the token's ServiceAccount is not one of agent_service_accounts")
	}
	bound := Node{Namespace: namespace, ServiceAccount: name}
	for _, claim := range []struct {
		key  string
		into *string
		must bool
	}{
		{extraPodName, &bound.PodName, true},
		{extraPodUID, &bound.PodUID, true},
		{extraNodeName, &bound.Name, false},
		{extraNodeUID, &bound.UID, false},
		{extraToken, &bound.Token, false},
	} {
		switch values := s.User.Extra[claim.key]; {
		case len(values) == 1 && values[0] != "":
			*claim.into = values[0]
		case len(values) > 0 || claim.must:
			return Node{}, rejected("not_bound", "the token is not bound to one pod: agents need a projected one")
		}
	}
	return bound, nil
}

// checkPod holds the pod that the API server has to the token.
func (n Node) checkPod(pod *corev1.Pod, now time.Time) error {
	switch {
	case string(pod.UID) != n.PodUID:
		return rejected("pod_replaced", "the token is of an earlier pod of that name")
	case pod.Spec.ServiceAccountName != n.ServiceAccount:
		return rejected("service_account", "the pod has another ServiceAccount than its token")
	case pod.Spec.NodeName == "" || n.Name != "" && n.Name != pod.Spec.NodeName:
		return rejected("node_mismatch", "the pod is on another node than its token says")
	case pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed:
		return rejected("pod_ended", "the token's pod has ended")
	// The timestamp is when the time that the pod has to stop is over.
	case pod.DeletionTimestamp != nil && now.After(pod.DeletionTimestamp.Time):
		return rejected("pod_deleted", "the token's pod was deleted")
	}
	return nil
}

func gone(err error, reason, text string) error {
	if errors.Is(err, errGone) {
		return rejected(reason, text)
	}
	return err
}

// rejected is the same to every agent.
func rejected(reason, text string) error {
	return fault.Wrap(fault.Denied, fault.New(fault.Denied, reason, text), "psat_rejected",
		"the server does not take this pod's token; its log says why")
}

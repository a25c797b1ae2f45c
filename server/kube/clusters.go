package kube

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

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
	// unverified says that nobody checks who answers for the API server.
	unverified bool
	// rootMaps are where an Istio mesh finds its roots; nil: there is none.
	rootMaps *rootMaps
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
		cl := &cluster{name: name, cfg: c, api: api, index: newIndex(name), unverified: access.Insecure || !strings.HasPrefix(access.Host, "https://")}
		if c.BundleConfigMap != "" {
			cl.publisher = newPublisher(name, c.BundleConfigMap, api)
		}
		all.byName[name] = cl
	}
	return all, nil
}

// Warnings are what an operator should know of the clusters' configuration.
func (c *Clusters) Warnings() (out []string) {
	for _, name := range slices.Sorted(maps.Keys(c.byName)) {
		if c.byName[name].unverified {
			out = append(out, "the kubeconfig of cluster "+name+" does not have its API server's certificate verified: whoever sits between decides who is whom; set certificate-authority in it, and an https server")
		}
	}
	return out
}

// KeepRootMaps has Run keep the trust bundle where the proxies of an Istio mesh look
// for it: in the ConfigMap istio-ca-root-cert of each namespace of these clusters.
func (c *Clusters) KeepRootMaps(names []string) {
	for _, name := range names {
		if cl := c.byName[name]; cl != nil {
			cl.rootMaps = newRootMaps(name, cl.api)
		}
	}
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
		return Node{}, rejected(errNoCluster)
	}
	account, err := cl.account(ctx, cl.api.tokens, token, []string{cl.cfg.Audience})
	if err != nil {
		return Node{}, rejected(err)
	}
	switch {
	case !slices.Contains(cl.cfg.AgentServiceAccounts, account.Namespace+"/"+account.Name):
		return Node{}, rejected(refused("service_account", "the token's ServiceAccount is not one of agent_service_accounts"))
	case account.PodName == "":
		return Node{}, rejected(refused("not_bound", "the token is not bound to one pod: agents need a projected one"))
	}
	pod, err := cl.api.pod(ctx, account.Namespace, account.PodName)
	if err != nil {
		return Node{}, rejected(gone(err, "pod_gone", "the token's pod is not there any more"))
	}
	if err := account.checkPod(pod, time.Now()); err != nil {
		return Node{}, rejected(err)
	}
	node, err := cl.api.node(ctx, pod.Spec.NodeName)
	if err != nil {
		return Node{}, rejected(gone(err, "node_gone", "the pod's node is not there any more"))
	}
	if string(node.UID) == "" || account.NodeUID != "" && account.NodeUID != string(node.UID) {
		return Node{}, rejected(refused("node_mismatch", "the token is of another node of that name"))
	}
	found := Node{
		Cluster: cl.name, Name: node.Name, UID: string(node.UID), Labels: map[string]string{},
		Namespace: account.Namespace, ServiceAccount: account.Name, PodName: account.PodName, PodUID: account.PodUID, Token: account.Token,
	}
	for _, key := range cl.cfg.NodeLabels {
		if value, ok := node.Labels[key]; ok {
			found.Labels[key] = value
		}
	}
	return found, nil
}

// rejected is the same to every agent: what is refused keeps its reason for the
// log.
func rejected(err error) error {
	if fault.KindOf(err) != fault.Denied {
		return err
	}
	return fault.Wrap(fault.Denied, err, "psat_rejected", "the server does not take this pod's token; its log says why")
}

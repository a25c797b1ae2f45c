package kube

import (
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Config is the `kubernetes` part of the server's configuration.
type Config struct {
	// Clusters are the Kubernetes clusters whose nodes may attest, by names of
	// your own: the name is in the ID of each agent of that cluster and can't be
	// changed later. Default none.
	Clusters map[string]ClusterConfig `yaml:"clusters"`
}

// ClusterConfig is one of `kubernetes.clusters`.
type ClusterConfig struct {
	// Kubeconfig is a file that says how the cluster's API server is reached.
	// It has to allow creating TokenReviews, and getting pods and nodes.
	// Default: the cluster that the server itself runs in.
	Kubeconfig string `yaml:"kubeconfig"`
	// AgentServiceAccounts are the ServiceAccounts that agents' pods run as, as
	// namespace/name. Whoever may make a pod with one of them on a node may be
	// that node's agent. Mandatory.
	AgentServiceAccounts []string `yaml:"agent_service_accounts"`
	// Audience is what an agent's token has to be made for. Default
	// assay-server.
	Audience string `yaml:"audience"`
	// NodeLabels are the keys of those labels of a node that become selectors of
	// its agent. Whoever may label nodes decides them. Default none.
	NodeLabels []string `yaml:"node_labels"`
}

const defaultAudience = "assay-server"

// A cluster's name is a segment of SPIFFE IDs and stands in certificates.
var clusterName = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?$`)

// A DNS-1123 label and a subdomain: what namespaces and ServiceAccounts are
// named by.
var (
	label     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	subdomain = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
)

// WithDefaults returns c with its zero fields filled.
func (c Config) WithDefaults() Config {
	if len(c.Clusters) == 0 {
		return c
	}
	filled := make(map[string]ClusterConfig, len(c.Clusters))
	for name, cluster := range c.Clusters {
		if cluster.Audience == "" {
			cluster.Audience = defaultAudience
		}
		filled[name] = cluster
	}
	c.Clusters = filled
	return c
}

// Check says what is wrong with a configuration that has its defaults.
func (c Config) Check() error {
	for _, name := range slices.Sorted(maps.Keys(c.Clusters)) {
		cluster, key := c.Clusters[name], "kubernetes.clusters."+name
		if !clusterName.MatchString(name) {
			return bad("kubernetes.clusters has a name that can't be one: use a-z, A-Z, 0-9, dot, dash and underscore, at most 63, as in kubernetes: {clusters: {prod: {agent_service_accounts: [assay/assay-agent]}}}")
		}
		if cluster.Kubeconfig != "" && !filepath.IsAbs(cluster.Kubeconfig) {
			return bad("%s.kubeconfig is not an absolute path: set %s.kubeconfig: /etc/assay-server/%s.kubeconfig", key, key, name)
		}
		if len(cluster.AgentServiceAccounts) == 0 {
			return bad("%s.agent_service_accounts is missing: set the ones that agents run as, such as [assay/assay-agent]", key)
		}
		for _, account := range cluster.AgentServiceAccounts {
			namespace, sa, _ := strings.Cut(account, "/")
			if !label.MatchString(namespace) || !subdomain.MatchString(sa) {
				return bad("%s.agent_service_accounts has an item that is not namespace/name: write it as assay/assay-agent", key)
			}
		}
		if slices.ContainsFunc(cluster.NodeLabels, func(l string) bool { return l == "" || strings.ContainsAny(l, " :\t\n") }) {
			return bad("%s.node_labels has an item that is no label's key: write them as topology.kubernetes.io/zone", key)
		}
	}
	return nil
}

func bad(format string, args ...any) error {
	return fault.Newf(fault.Precondition, "config_kubernetes", format, args...)
}

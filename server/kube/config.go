package kube

import (
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Config is the `kubernetes` part of the server's configuration.
type Config struct {
	// Clusters are the Kubernetes clusters whose nodes may attest, by names of
	// your own: the name is in the ID of each agent of that cluster and can't be
	// changed later. Default none.
	Clusters map[string]ClusterConfig `yaml:"clusters"`
	// Template is the path of the SPIFFE ID that every pod on an attested node
	// gets without an entry. {namespace}, {service_account} and {cluster} in it
	// stand for the pod's; the first two are needed. It can't be below the
	// reserved prefix. Default /ns/{namespace}/sa/{service_account}.
	Template string `yaml:"template"`
	// NamespaceSameness says that a namespace means the same in all clusters, so
	// that pods of several may have the same ID. Without it, several clusters
	// need {cluster} in the template. Default false.
	NamespaceSameness bool `yaml:"namespace_sameness"`
	// Rules say which pods get an ID from the template, and for how long. The first
	// that is for a pod counts; a pod that none is for gets an ID. Default none.
	Rules []Rule `yaml:"rules"`
}

// Rule is one of `kubernetes.rules`.
type Rule struct {
	// ServiceAccounts are those whose pods the rule is for, as namespace/name; *
	// in either stands for any characters, as in kube-*/* or */default. Mandatory.
	ServiceAccounts []string `yaml:"service_accounts"`
	// NoIdentity keeps the ID from the pods. A last rule for */* that does so makes
	// the rules before it a list of who gets one. Default false.
	NoIdentity bool `yaml:"no_identity"`
	// X509SVIDTTL is the life of their certificates. Default ca.x509_svid_ttl.
	X509SVIDTTL time.Duration `yaml:"x509_svid_ttl"`
}

// ClusterConfig is one of `kubernetes.clusters`.
type ClusterConfig struct {
	// Kubeconfig is a file that says how the cluster's API server is reached.
	// It has to allow creating TokenReviews, and getting, listing and watching
	// pods and nodes.
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
	// BundleConfigMap is a ConfigMap of the cluster, as namespace/name, whose key
	// bundle.crt the server keeps equal to the trust bundle: agents mount it as
	// their trust_bundle. The server needs the right to get and update it, and
	// to create it where it is not there. Whoever may write it can pass for the
	// server to agents that have never joined. Default none.
	BundleConfigMap string `yaml:"bundle_config_map"`
}

const defaultAudience = "assay-server"

// DefaultTemplate is the path of an identity as Istio, too, makes it.
const DefaultTemplate = "/ns/{namespace}/sa/{service_account}"

// A cluster's name is a segment of SPIFFE IDs and stands in certificates.
var clusterName = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?$`)

// ValidClusterName says whether a cluster can have this name.
func ValidClusterName(name string) bool { return clusterName.MatchString(name) }

// A DNS-1123 label and a subdomain: what namespaces and ServiceAccounts are
// named by.
var (
	label     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	subdomain = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
)

// WithDefaults returns c with its zero fields filled.
func (c Config) WithDefaults() Config {
	if c.Template == "" {
		c.Template = DefaultTemplate
	}
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

// Check says what is wrong with a configuration that has its defaults, in this
// trust domain and with this reserved prefix ("/assay/").
func (c Config) Check(td spiffeid.TrustDomain, reserved string) error {
	template, err := NewTemplate(td, reserved, c.Template)
	switch {
	case err != nil:
		return err
	case strings.HasPrefix(c.Template, reserved):
		return bad("kubernetes.template is below %s, which is for the server and its agents: begin it otherwise, as in %s", reserved, DefaultTemplate)
	case len(c.Clusters) > 1 && !template.hasCluster() && !c.NamespaceSameness:
		return bad("kubernetes.clusters has %d clusters whose pods would get the same IDs: put {cluster} into kubernetes.template, as in /cluster/{cluster}%s, or set kubernetes.namespace_sameness: true if a namespace means the same in all of them",
			len(c.Clusters), DefaultTemplate)
	}
	for i, r := range c.Rules {
		if err := r.check(fmt.Sprintf("kubernetes.rules[%d]", i)); err != nil {
			return err
		}
	}
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
		if namespace, name, _ := strings.Cut(cluster.BundleConfigMap, "/"); cluster.BundleConfigMap != "" && (!label.MatchString(namespace) || !subdomain.MatchString(name)) {
			return bad("%s.bundle_config_map is not namespace/name: write it as assay/assay-bundle", key)
		}
		if slices.ContainsFunc(cluster.NodeLabels, func(l string) bool { return l == "" || strings.ContainsAny(l, " :\t\n") }) {
			return bad("%s.node_labels has an item that is no label's key: write them as topology.kubernetes.io/zone", key)
		}
	}
	return nil
}

// What a rule's pattern may hold on either side of its slash.
var pattern = regexp.MustCompile(`^[a-z0-9*-]+/[a-z0-9.*-]+$`)

func (r Rule) check(key string) error {
	switch {
	case len(r.ServiceAccounts) == 0:
		return bad("%s.service_accounts is missing: say whose pods the rule is for, such as [kube-system/*]", key)
	case r.X509SVIDTTL < 0 || r.NoIdentity && r.X509SVIDTTL != 0:
		return bad("%s has a life that is negative, or for no identity: set x509_svid_ttl: 1h, or leave it out", key)
	}
	for _, one := range r.ServiceAccounts {
		if !pattern.MatchString(one) {
			return bad("%s.service_accounts has an item that is not namespace/name: write it as shop/web, kube-*/* or */default", key)
		}
	}
	return nil
}

// rule is the one that counts for a pod; the zero one if there is none.
func (c Config) rule(p *Pod) Rule {
	for _, r := range c.Rules {
		for _, one := range r.ServiceAccounts {
			if ok, err := path.Match(one, p.Namespace+"/"+p.ServiceAccount); ok && err == nil {
				return r
			}
		}
	}
	return Rule{}
}

func bad(format string, args ...any) error {
	return fault.Newf(fault.Precondition, "config_kubernetes", format, args...)
}

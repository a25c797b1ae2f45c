package istioca

import (
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/server/kube"
)

// Config is the `istio` part of the server's configuration.
type Config struct {
	// Listen is where the proxies of an Istio mesh ask for certificates, over TLS
	// 1.2 or 1.3: the mesh's caAddress. It has a port of its own; :8444 is usual.
	// Default none, which turns the mesh's CA off.
	Listen string `yaml:"listen"`
	// DNSNames are by what proxies reach Listen: the host part of caAddress has to
	// be one of them. They stand in the server's certificate, beside its SPIFFE ID.
	// Mandatory, unless IPAddresses are set.
	DNSNames []string `yaml:"dns_names"`
	// IPAddresses are the same for a caAddress that is an address. Default none.
	IPAddresses []string `yaml:"ip_addresses"`
	// Audiences are for what a proxy's token may be made; one has to be among its
	// own. Default istio-ca, which is what Istio asks for.
	Audiences []string `yaml:"audiences"`
	// TrustedNodeAccounts are the ServiceAccounts, as namespace/name, of proxies
	// that serve all pods of their node and may have the identities of those:
	// ztunnel. Whoever runs as one on a node has the identity of each pod there.
	// Default none.
	TrustedNodeAccounts []string `yaml:"trusted_node_accounts"`
	// UnboundTokens admits tokens that are not bound to a pod, which live until
	// they end whatever becomes of their holder: those of virtual machines, say.
	// Default false.
	UnboundTokens bool `yaml:"unbound_tokens"`
	// RequestRate is how many certificates per second one caller (a pod, or a
	// ServiceAccount without one) may ask for; it may save up ten seconds' worth.
	// A ztunnel asks for those of all pods of its node. Default 50.
	RequestRate int `yaml:"requests_per_second_per_caller"`
	// Clusters are the clusters of the mesh, by their names in
	// kubernetes.clusters, or by other names where oidc is set. Default: those of
	// kubernetes.clusters.
	Clusters map[string]ClusterConfig `yaml:"clusters"`
}

// ClusterConfig is one of `istio.clusters`.
type ClusterConfig struct {
	// ClusterID is what Istio calls the cluster (global.multiCluster.clusterName),
	// which proxies send along. Default Kubernetes, as Istio's; with several
	// clusters each needs one of its own.
	ClusterID string `yaml:"cluster_id"`
	// Issuer is the iss of the cluster's tokens (the API server's
	// --service-account-issuer). With it a token finds its cluster even if the
	// proxy does not say which it is, and one of another issuer is refused before
	// anybody is asked. Mandatory with oidc. Default: not looked at.
	Issuer string `yaml:"issuer"`
	// OIDC verifies tokens by the cluster's published keys instead of asking its
	// API server: a token is then good until it ends, also when its pod is gone
	// and the server does not watch the cluster. Default: the API server reviews
	// each.
	OIDC *OIDCConfig `yaml:"oidc"`
	// RootConfigMaps keeps the trust bundle where the mesh looks for it: under the
	// key root-cert.pem of the ConfigMap istio-ca-root-cert in each namespace of
	// the cluster, which has to be one of kubernetes.clusters. istiod does so only
	// while it is a CA itself. The server needs the right to list and watch
	// namespaces, to create ConfigMaps, and to list, watch and patch those of that
	// name. Default false.
	RootConfigMaps bool `yaml:"root_config_maps"`
	// IstiodSecret is a Secret of the cluster, as namespace/name, in which the
	// server keeps a certificate, its key and the trust bundle for istiod, whose
	// pods mount it if its name is istiod-tls. It has to be there, of type Opaque or
	// kubernetes.io/tls, and may be empty. The server needs the right to get and
	// update it. Whoever may read it can pass for istiod. Default none.
	IstiodSecret string `yaml:"istiod_secret"`
	// IstiodDNSNames are by what proxies and the API server reach istiod. One with
	// a revision has istiod-<revision>.<namespace>.svc besides. Default
	// istiod.<namespace>.svc, istiod-remote.<namespace>.svc and
	// istio-pilot.<namespace>.svc, by the namespace of istiod_secret.
	IstiodDNSNames []string `yaml:"istiod_dns_names"`
}

// OIDCConfig is `istio.clusters.<name>.oidc`. Exactly one of its sources is set.
type OIDCConfig struct {
	// JWKSURL is where the keys are, over https; redirects are not followed. They
	// are asked for again when a token names a key that is not known, at most
	// twice a minute, and used for an hour after the last answer.
	JWKSURL string `yaml:"jwks_url"`
	// CAFile has the authorities, in PEM, of JWKSURL's certificate. Default: those
	// of the system.
	CAFile string `yaml:"ca_file"`
	// JWKSFile has the keys, as a JSON Web Key Set; it is read at start.
	JWKSFile string `yaml:"jwks_file"`
}

const (
	defaultAudience  = "istio-ca"
	defaultClusterID = "Kubernetes"
	defaultRate      = 50
	// plaintextPort is the one that istio-agent takes for plaintext.
	plaintextPort = "15010"
)

// On says whether there is a mesh to serve.
func (c Config) On() bool { return c.Listen != "" }

// WithDefaults returns c with its zero fields filled; clusters are those of the
// `kubernetes` part.
func (c Config) WithDefaults(clusters kube.Config) Config {
	if !c.On() {
		return c
	}
	if len(c.Audiences) == 0 {
		c.Audiences = []string{defaultAudience}
	}
	if c.RequestRate == 0 {
		c.RequestRate = defaultRate
	}
	filled := map[string]ClusterConfig{}
	if len(c.Clusters) == 0 {
		for name := range clusters.Clusters {
			filled[name] = ClusterConfig{}
		}
	}
	maps.Copy(filled, c.Clusters)
	for name, cluster := range filled {
		if cluster.ClusterID == "" {
			cluster.ClusterID = defaultClusterID
		}
		filled[name] = cluster.withIstiodNames()
	}
	c.Clusters = filled
	return c
}

// Addresses are IPAddresses of a checked configuration.
func (c Config) Addresses() []netip.Addr {
	out := make([]netip.Addr, len(c.IPAddresses))
	for i, text := range c.IPAddresses {
		out[i] = netip.MustParseAddr(text)
	}
	return out
}

// A ServiceAccount as namespace/name.
var accountName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?/[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)

// Check says what is wrong with a configuration that has its defaults.
func (c Config) Check(clusters kube.Config) error {
	if !c.On() {
		if len(c.DNSNames)+len(c.IPAddresses)+len(c.Clusters)+len(c.TrustedNodeAccounts)+len(c.Audiences)+c.RequestRate > 0 || c.UnboundTokens {
			return bad("istio is configured and istio.listen is not set, so that nothing of it works: set istio.listen: :8444, or leave istio out")
		}
		return nil
	}
	if err := c.checkListener(); err != nil {
		return err
	}
	for _, one := range c.TrustedNodeAccounts {
		if !accountName.MatchString(one) {
			return bad("istio.trusted_node_accounts has an item that is not namespace/name: write it as istio-system/ztunnel")
		}
	}
	switch {
	case slices.Contains(c.Audiences, ""):
		return bad("istio.audiences has an empty item: leave audiences out for %s", defaultAudience)
	case c.RequestRate < 1 || c.RequestRate > 1_000_000:
		return bad("istio.requests_per_second_per_caller is between 1 and 1000000: set istio.requests_per_second_per_caller: %d", defaultRate)
	case clusters.Template != kube.DefaultTemplate:
		return bad("kubernetes.template is not %s, which the identities of a mesh have to be made by: leave kubernetes.template out, or istio", kube.DefaultTemplate)
	case len(c.Clusters) > 1 && !clusters.NamespaceSameness:
		return bad("istio.clusters has several clusters, whose pods have the same IDs in a mesh: set kubernetes.namespace_sameness: true if a namespace means the same in all of them, or serve one")
	}
	if len(c.TrustedNodeAccounts) > 0 && !slices.ContainsFunc(slices.Collect(maps.Keys(c.Clusters)), func(name string) bool {
		_, watched := clusters.Clusters[name]
		return watched
	}) {
		return bad("istio.trusted_node_accounts is for clusters of kubernetes.clusters, as nobody else says which pods are on a node: add one there, or leave trusted_node_accounts out")
	}
	return c.checkClusters(clusters)
}

func (c Config) checkListener() error {
	switch _, port, err := net.SplitHostPort(c.Listen); {
	case err != nil:
		return bad("istio.listen is not an address with a port: set istio.listen: :8444")
	case port == plaintextPort:
		return bad("istio.listen has the port %s, to which proxies talk without TLS and would show their tokens to everybody: set istio.listen: :8444", plaintextPort)
	}
	if len(c.DNSNames)+len(c.IPAddresses) == 0 {
		return bad("istio.dns_names is missing: set the name by which proxies reach the server, such as [assay-server.assay.svc]")
	}
	if err := name.CheckDNS(c.DNSNames); err != nil {
		return bad("istio.dns_names: %s", fault.SafeText(err))
	}
	for _, text := range c.IPAddresses {
		if ip, err := netip.ParseAddr(text); err != nil || ip.Zone() != "" || ip.Is4In6() {
			return bad("istio.ip_addresses has an item that is no IP address: write them as 192.0.2.1")
		}
	}
	return nil
}

func (c Config) checkClusters(clusters kube.Config) error {
	if len(c.Clusters) == 0 {
		return bad("istio has no cluster whose tokens it could believe: set kubernetes.clusters, or istio.clusters with oidc")
	}
	by := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(c.Clusters)) {
		cluster, key := c.Clusters[name], "istio.clusters."+name
		_, watched := clusters.Clusters[name]
		switch other, twice := by[cluster.ClusterID]; {
		case twice:
			return bad("%s has the same cluster_id as %s: set each to what Istio calls the cluster", key, other)
		case strings.ContainsAny(cluster.ClusterID, " \t\r\n") || len(cluster.ClusterID) > 253:
			return bad("%s.cluster_id is no name of a cluster: set it to what Istio calls the cluster", key)
		case !kube.ValidClusterName(name):
			return bad("%s has a name that can't be one: use a-z, A-Z, 0-9, dot, dash and underscore, at most 63", key)
		case cluster.OIDC == nil && !watched:
			return bad("%s is not in kubernetes.clusters, so that nobody can be asked what its tokens are worth: add it there, or set %s.oidc", key, key)
		case cluster.OIDC != nil && cluster.Issuer == "":
			return bad("%s.issuer is missing: set it to the iss of the cluster's tokens, such as https://kubernetes.default.svc.cluster.local", key)
		}
		if err := cluster.checkKept(key, watched); err != nil {
			return err
		}
		by[cluster.ClusterID] = key
		if cluster.OIDC != nil {
			if err := cluster.OIDC.check(key + ".oidc"); err != nil {
				return err
			}
		}
	}
	return nil
}

func (o OIDCConfig) check(key string) error {
	u, err := url.Parse(o.JWKSURL)
	switch {
	case (o.JWKSURL == "") == (o.JWKSFile == ""):
		return bad("%s has no source of keys, or two: set either %s.jwks_url or %s.jwks_file", key, key, key)
	case o.JWKSURL != "" && (err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != ""):
		return bad("%s.jwks_url is no https URL: set it as in https://issuer.example.org/openid/v1/jwks", key)
	case o.CAFile != "" && o.JWKSURL == "":
		return bad("%s.ca_file is for jwks_url, which is not set: leave it out", key)
	}
	for field, path := range map[string]string{"ca_file": o.CAFile, "jwks_file": o.JWKSFile} {
		if path != "" && !filepath.IsAbs(path) {
			return bad("%s.%s is not an absolute path: set %s.%s: /etc/assay-server/%s", key, field, key, field, field)
		}
	}
	return nil
}

func bad(format string, args ...any) error {
	return fault.Newf(fault.Precondition, "config_istio", format, args...)
}

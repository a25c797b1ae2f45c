package istioca

import (
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/kube"
)

func TestConfigThatCannotBeHonoured(t *testing.T) {
	clusters := func(names ...string) kube.Config {
		c := kube.Config{Clusters: map[string]kube.ClusterConfig{}}
		for _, name := range names {
			c.Clusters[name] = kube.ClusterConfig{AgentServiceAccounts: []string{"assay/assay-agent"}}
		}
		return c.WithDefaults()
	}
	good := func() Config { return Config{Listen: ":8444", DNSNames: []string{"ca.assay.svc"}} }
	oidc := func(o OIDCConfig) func(*Config, *kube.Config) {
		return func(c *Config, _ *kube.Config) {
			c.Clusters = map[string]ClusterConfig{"prod": {Issuer: "https://issuer", OIDC: &o}}
		}
	}
	for name, c := range map[string]struct {
		change func(*Config, *kube.Config)
		says   string // empty: it passes
	}{
		"defaults":           {func(*Config, *kube.Config) {}, ""},
		"off":                {func(c *Config, _ *kube.Config) { *c = Config{} }, ""},
		"off, with more":     {func(c *Config, _ *kube.Config) { c.Listen = "" }, "istio.listen: :8444"},
		"off, with a switch": {func(c *Config, _ *kube.Config) { *c = Config{UnboundTokens: true} }, "istio.listen: :8444"},
		"node proxies of nobody's": {func(c *Config, k *kube.Config) {
			*k = clusters()
			c.TrustedNodeAccounts = []string{"istio-system/ztunnel"}
			oidc(OIDCConfig{JWKSFile: "/etc/jwks"})(c, k)
		}, "leave trusted_node_accounts out"},
		"plaintext port":    {func(c *Config, _ *kube.Config) { c.Listen = ":15010" }, "without TLS"},
		"no port":           {func(c *Config, _ *kube.Config) { c.Listen = "ca" }, "istio.listen: :8444"},
		"no name":           {func(c *Config, _ *kube.Config) { c.DNSNames = nil }, "assay-server.assay.svc"},
		"an address alone":  {func(c *Config, _ *kube.Config) { c.DNSNames, c.IPAddresses = nil, []string{"192.0.2.1"} }, ""},
		"bad name":          {func(c *Config, _ *kube.Config) { c.DNSNames = []string{"a_b"} }, "istio.dns_names"},
		"bad address":       {func(c *Config, _ *kube.Config) { c.IPAddresses = []string{"ca"} }, "192.0.2.1"},
		"zoned address":     {func(c *Config, _ *kube.Config) { c.IPAddresses = []string{"fe80::1%eth0"} }, "192.0.2.1"},
		"account, no slash": {func(c *Config, _ *kube.Config) { c.TrustedNodeAccounts = []string{"ztunnel"} }, "istio-system/ztunnel"},
		"account, pattern":  {func(c *Config, _ *kube.Config) { c.TrustedNodeAccounts = []string{"*/ztunnel"} }, "istio-system/ztunnel"},
		"empty audience":    {func(c *Config, _ *kube.Config) { c.Audiences = []string{""} }, "istio.audiences"},
		"rate":              {func(c *Config, _ *kube.Config) { c.RequestRate = -1 }, "requests_per_second_per_caller: 50"},
		"another template":  {func(_ *Config, k *kube.Config) { k.Template = "/{cluster}/{namespace}/{service_account}" }, "leave kubernetes.template out"},
		"no cluster":        {func(_ *Config, k *kube.Config) { *k = clusters() }, "kubernetes.clusters"},
		"two clusters":      {func(_ *Config, k *kube.Config) { *k = clusters("a", "b") }, "namespace_sameness: true"},
		"two of one ID":     {func(_ *Config, k *kube.Config) { *k = clusters("a", "b"); k.NamespaceSameness = true }, "the same cluster_id"},
		"two": {func(c *Config, k *kube.Config) {
			*k = clusters("a", "b")
			k.NamespaceSameness = true
			c.Clusters = map[string]ClusterConfig{"a": {ClusterID: "A"}, "b": {ClusterID: "B"}}
		}, ""},
		"cluster nobody knows": {func(c *Config, _ *kube.Config) { c.Clusters = map[string]ClusterConfig{"other": {}} }, "istio.clusters.other.oidc"},
		"cluster's name":       {func(c *Config, _ *kube.Config) { c.Clusters = map[string]ClusterConfig{"a/b": {}} }, "at most 63"},
		"cluster's ID":         {func(c *Config, _ *kube.Config) { c.Clusters = map[string]ClusterConfig{"prod": {ClusterID: "a b"}} }, "cluster_id"},
		"oidc":                 {oidc(OIDCConfig{JWKSURL: "https://issuer.example/jwks"}), ""},
		"oidc, file":           {oidc(OIDCConfig{JWKSFile: "/etc/jwks"}), ""},
		"oidc, no issuer": {func(c *Config, _ *kube.Config) {
			c.Clusters = map[string]ClusterConfig{"prod": {OIDC: &OIDCConfig{JWKSFile: "/etc/jwks"}}}
		}, "issuer is missing"},
		"oidc, nothing":            {oidc(OIDCConfig{}), "jwks_url"},
		"oidc, both":               {oidc(OIDCConfig{JWKSURL: "https://a/b", JWKSFile: "/etc/jwks"}), "jwks_url"},
		"oidc, http":               {oidc(OIDCConfig{JWKSURL: "http://issuer.example/jwks"}), "https"},
		"oidc, with a password":    {oidc(OIDCConfig{JWKSURL: "https://u:p@issuer.example/jwks"}), "https"},
		"oidc, relative file":      {oidc(OIDCConfig{JWKSFile: "jwks"}), "absolute"},
		"oidc, CA for a file":      {oidc(OIDCConfig{JWKSFile: "/etc/jwks", CAFile: "/etc/ca"}), "ca_file"},
		"oidc beside the watching": {oidc(OIDCConfig{JWKSURL: "https://issuer.example/jwks", CAFile: "/etc/ca.pem"}), ""},
	} {
		cfg, k := good(), clusters("prod")
		c.change(&cfg, &k)
		err := cfg.WithDefaults(k).Check(k)
		if (err == nil) != (c.says == "") || err != nil && (fault.ReasonOf(err) != "config_istio" || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
}

package agent

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/agent/endpoint"
	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
)

func good() Config {
	return Config{TrustDomain: "example.org", Server: ServerConfig{Addresses: []string{"ca.example.org:8443"}}, Pin: strings.Repeat("ab", 32)}
}

func TestDefaults(t *testing.T) {
	c, err := good().Validate()
	if err != nil {
		t.Fatal(err)
	}
	if c.DataDir != "/var/lib/assay-agent" || c.RunDir != "/run/assay-agent/cache" || c.socket() != "/run/assay/public/api.sock" ||
		c.Metrics.Listen != "127.0.0.1:9403" || c.Log.Level != "info" || c.Log.Format != "text" || c.prefix() != "/assay/" {
		t.Errorf("%+v", c)
	}
	again, err := c.Validate()
	if err != nil || again.DataDir != c.DataDir {
		t.Errorf("validating twice: %v", err)
	}
}

// Each message names the field and a value that would pass (I6).
func TestConfigurationsThatCantBeHonoured(t *testing.T) {
	cases := []struct {
		name  string
		spoil func(*Config)
		names string
	}{
		{"no trust domain", func(c *Config) { c.TrustDomain = "" }, "trust_domain: example.org"},
		{"an ID as trust domain", func(c *Config) { c.TrustDomain = "spiffe://example.org" }, "trust_domain: example.org"},
		{"upper case", func(c *Config) { c.TrustDomain = "Example.org" }, "trust_domain: example.org"},
		{"an empty label", func(c *Config) { c.TrustDomain = "a..b" }, "trust_domain: example.org"},         // ID-29
		{"a leading dot", func(c *Config) { c.TrustDomain = ".a" }, "trust_domain: example.org"},            // ID-29
		{"a trailing dot", func(c *Config) { c.TrustDomain = "example.org." }, "trust_domain: example.org"}, // ID-29
		{"a long trust domain", func(c *Config) { c.TrustDomain = strings.Repeat("a", 256) }, "trust_domain: example.org"},
		{"no servers", func(c *Config) { c.Server.Addresses = nil }, "server: {addresses:"},
		{"no port", func(c *Config) { c.Server.Addresses = []string{"ca.example.org"} }, "ca.example.org:8443"},
		{"no host", func(c *Config) { c.Server.Addresses = []string{":8443"} }, "ca.example.org:8443"},
		{"a large port", func(c *Config) { c.Server.Addresses = []string{"a:65536"} }, "ca.example.org:8443"},
		{"port 0", func(c *Config) { c.Server.Addresses = []string{"a:1", "b:0"} }, `"b:0", which is no host with a port: write it as ca.example.org:8443`},
		{"a URL", func(c *Config) { c.Server.Addresses = []string{"https://ca.example.org:8443"} }, "ca.example.org:8443"},
		{"a space", func(c *Config) { c.Server.Addresses = []string{"ca example.org:8443"} }, "ca.example.org:8443"},
		{"a path", func(c *Config) { c.Server.Addresses = []string{"ca.example.org/x:8443"} }, "ca.example.org:8443"},
		{"nothing to trust", func(c *Config) { c.Pin = "" }, "pin"},
		{"two things to trust", func(c *Config) { c.TrustBundle = "/b" }, "trust_bundle and pin"},
		{"a short pin", func(c *Config) { c.Pin = "abcd" }, "64 hex digits"},
		{"relative data_dir", func(c *Config) { c.DataDir = "data" }, "data_dir: /"},
		{"relative run_dir", func(c *Config) { c.RunDir = "run" }, "run_dir: /"},
		{"relative sockets.dir", func(c *Config) { c.Sockets.Dir = "pub" }, "sockets.dir: /"},
		{"relative token", func(c *Config) { c.JoinTokenFile = "token" }, "join_token_file: /"},
		{"relative bundle", func(c *Config) { c.Pin, c.TrustBundle = "", "bundle" }, "trust_bundle: /"},
		{"TCP", func(c *Config) { c.Sockets.Dir = "tcp://0.0.0.0:8081" }, "sockets.dir: /"}, // WL-1, WL-3
		{"a certificate without its key", func(c *Config) { c.X509Pop.CertificateFile = "/node.pem" }, "set x509pop.private_key_file: /etc"},
		{"a key without its certificate", func(c *Config) { c.X509Pop.PrivateKeyFile = "/node.key" }, "certificate_file: /etc"},
		{"a relative certificate", func(c *Config) { c.X509Pop = X509PopConfig{"node.pem", "/node.key"} }, "x509pop.certificate_file: /etc"},
		{"a cluster's token without its cluster", func(c *Config) { c.JoinTokenFile, c.K8SPsat.TokenFile = "", "/token" }, "set k8s_psat: {cluster: prod}"},
		{"a relative token of a pod", func(c *Config) { c.JoinTokenFile, c.K8SPsat = "", K8SPsatConfig{"prod", "token"} }, "k8s_psat.token_file: /var"},
		{"two ways to prove the node", func(c *Config) { c.JoinTokenFile, c.K8SPsat.Cluster = "/token", "prod" }, "join_token_file and k8s_psat exclude each other"},
		{"a relative key", func(c *Config) { c.X509Pop = X509PopConfig{"/node.pem", "node.key"} }, "x509pop.private_key_file: /etc"},
		{"a certificate and a token", func(c *Config) {
			c.X509Pop, c.JoinTokenFile = X509PopConfig{"/node.pem", "/node.key"}, "/token"
		}, "join_token_file and x509pop exclude each other"},
		{"one name for two secrets", func(c *Config) { c.SDS.DefaultSVIDName = "ROOTCA" }, "sds.default_svid_name and sds.default_bundle_name"},
		{"a secret with a SPIFFE ID for a name", func(c *Config) { c.SDS.DefaultBundleName = "spiffe://example.org" }, "sds.default_bundle_name"},
		{"an unknown validation", func(c *Config) { c.SDS.Validation = "none" }, "sds.validation: spiffe or ca"},
		{"long socket", func(c *Config) { c.Sockets.Dir = "/" + strings.Repeat("x", 100) }, "sockets.dir: /run/assay/public"},
		{"a socket one byte too long", func(c *Config) {
			c.Sockets.Dir = "/" + strings.Repeat("x", durable.MaxSocketPath-len("/"+"/api.sock")+1)
		}, "at most 102 work; set sockets.dir: /run/assay/public"}, // CLIENT-2
		{"sockets in data_dir", func(c *Config) { c.Sockets.Dir = "/var/lib/assay-agent" }, "sockets.dir: /run/assay/public"},
		{"sockets below run_dir", func(c *Config) { c.Sockets.Dir = "/run/assay-agent/cache/x/" }, "sockets.dir: /run/assay/public"},
		{"one directory for both", func(c *Config) { c.RunDir = "/var/lib/assay-agent/" }, "run_dir: /run"},
		{"metrics", func(c *Config) { c.Metrics.Listen = "9403" }, "metrics.listen: 127.0.0.1:9403"},
		{"a space in metrics", func(c *Config) { c.Metrics.Listen = "local host:9403" }, "metrics.listen: 127.0.0.1:9403"},
		{"log level", func(c *Config) { c.Log.Level = "loud" }, "log.level: debug or info"},
		{"log format", func(c *Config) { c.Log.Format = "xml" }, "log.format: text or json"},
		{"prefix", func(c *Config) { c.ReservedPrefix = "x" }, "reserved_prefix: assay or spire"},
		{"limits", func(c *Config) { c.Limits = endpoint.Limits{Streams: -1} }, "limits."},
	}
	for _, c := range cases {
		cfg := good()
		c.spoil(&cfg)
		_, err := cfg.Validate()
		if fault.KindOf(err) != fault.Precondition || !strings.HasPrefix(fault.ReasonOf(err), "config_") || !strings.Contains(fault.SafeText(err), c.names) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	fits := good()
	fits.Sockets.Dir = "/" + strings.Repeat("x", durable.MaxSocketPath-len("/"+"/api.sock"))
	fits.Server.Addresses = []string{"[2001:db8::1]:8443", "[fe80::1%eth0]:1", "10.0.0.1:65535", "ca_1.example-2.org.:8443", "localhost:1"}
	fits.Metrics.Listen = ":9403"
	if _, err := fits.Validate(); err != nil {
		t.Error(err)
	}
	popped := good()
	popped.X509Pop = X509PopConfig{"/node.pem", "/node.key"}
	if _, err := popped.Validate(); err != nil {
		t.Error(err)
	}
	spire := good()
	spire.ReservedPrefix = "spire"
	if c, err := spire.Validate(); err != nil || c.prefix() != "/spire/" {
		t.Errorf("%v", err)
	}
}

func TestReadiness(t *testing.T) {
	now := time.Now()
	id := state.Identity{Chain: []*x509.Certificate{{NotAfter: now.Add(time.Hour)}}}
	ended := state.Identity{Chain: []*x509.Certificate{{NotAfter: now}}}
	fresh := cache.Status{Synced: true, Connected: true, LastSync: now}
	away := cache.Status{Synced: true, LastSync: now.Add(-time.Minute), EarliestNotAfter: now.Add(time.Minute)}
	with := func(s cache.Status, do func(*cache.Status)) cache.Status { do(&s); return s }
	cases := []struct {
		name     string
		attested bool
		id       state.Identity
		status   cache.Status
		socket   bool
		reason   string
	}{
		{"all is well", true, id, fresh, true, ""},
		{"no socket", true, id, fresh, false, "socket_missing"},
		{"not joined", false, state.Identity{}, cache.Status{}, true, "not_attested"},
		{"joined, nothing heard", true, id, cache.Status{}, true, "not_synced"},
		{"a short outage", true, id, away, true, ""},
		{"a long outage", true, id, with(away, func(s *cache.Status) { s.LastSync = now.Add(-6 * time.Minute) }), true, "sync_stale"},
		{"an outage that outlives SVIDs", true, id, with(away, func(s *cache.Status) { s.EarliestNotAfter = now }), true, "svid_expired_server_unreachable"},
		{"an outage that outlives the agent's SVID", true, ended, away, true, "agent_svid_expired"},
		{"renewals are on their way", true, id, with(fresh, func(s *cache.Status) { s.EarliestNotAfter = now }), true, ""},
	}
	for _, c := range cases {
		err := ready(now, c.attested, c.id, c.status, c.socket)
		if c.reason == "" && err != nil || c.reason != "" && (fault.ReasonOf(err) != c.reason || fault.KindOf(err) != fault.NotReady) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	long := with(away, func(s *cache.Status) { s.LastSync = now.Add(-6 * time.Minute) })
	if text := fault.SafeText(ready(now, true, id, long, true)); !strings.Contains(text, long.EarliestNotAfter.UTC().Format(time.RFC3339)) {
		t.Errorf("does not say how long serving goes on: %s", text)
	}
}

package server

import (
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/kube"
)

func TestOneLineIsAWholeConfiguration(t *testing.T) {
	c, err := Config{TrustDomain: "example.org"}.Validate()
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen != ":8443" || c.Admin.Socket != "/run/assay-server/admin.sock" || c.DataDir != "/var/lib/assay-server" ||
		c.Store.Driver != "bbolt" || c.Metrics.Listen != "127.0.0.1:9402" || c.ReservedPrefix != "assay" ||
		c.Audit.Path != "/var/lib/assay-server/audit.log" || *c.Attestation.RejoinWindow != 168*time.Hour ||
		c.Attestation.AgentSVIDTTL != 12*time.Hour || c.CA.X509SVIDTTL != time.Hour || c.CA.Backdate != 2*time.Minute {
		t.Errorf("defaults: %+v", c)
	}
	if again, err := c.Validate(); err != nil || again.Listen != c.Listen {
		t.Errorf("a validated configuration validates: %v", err)
	}
}

func TestConfigIsReadAsDocumented(t *testing.T) {
	var c Config
	err := yaml.UnmarshalWithOptions([]byte(`
trust_domain: example.org
bootstrap: 2026-11-23
seal_key_file: /run/secrets/seal.key
listen: 127.0.0.1:0
admin: {socket: /run/x/admin.sock, group: root, uids: [1000, 1001], remote_spiffe_ids: [spiffe://example.org/ops/ci]}
store: {driver: bbolt}
ca: {x509_svid_ttl: 30m, max_x509_svid_ttl: 1h, root_ttl: 8760h, issuer_ttl: 24h, backdate: 1m}
attestation: {join_token: {max_ttl: 10m}, rejoin_window: 0s, agent_svid_ttl: 6h}
audit: {path: /var/log/assay/audit.log, max_bytes: 1000000, keep: 3}
limits:
  sign_batch: 50
  streams_per_connection: 10
  connections_per_agent: 4
  unauthenticated_connections_per_address: 64
  attestations_per_second_per_address: 5
  signatures_per_second_per_agent: 100
  renewals_per_second_per_agent: 2
  sync_streams_per_second_per_agent: 3
  calls_per_second_per_operator: 4
metrics: {listen: 127.0.0.1:9402}
log: {level: debug, format: json}
data_dir: /var/lib/assay-server
reserved_prefix: spire
`), &c, yaml.Strict())
	if err != nil {
		t.Fatal(err)
	}
	if c, err = c.Validate(); err != nil {
		t.Fatal(err)
	}
	if c.Bootstrap != "2026-11-23" || *c.Attestation.RejoinWindow != 0 || c.CA.Backdate != time.Minute || c.Admin.UIDs[1] != 1001 ||
		c.Limits.SignBatch != 50 || c.prefix() != "/spire/" || c.Admin.remoteIDs()[0].Path() != "/ops/ci" {
		t.Errorf("read as %+v", c)
	}
	gid, err := c.Admin.gid()
	if err != nil || gid == nil || *gid != 0 {
		t.Errorf("group root: %v, %v", gid, err)
	}
	if err := yaml.UnmarshalWithOptions([]byte("trust_domain: a\nfederation: {}\n"), &c, yaml.Strict()); err == nil {
		t.Error("a key that does not exist is accepted")
	}
}

// ID-29 for the trust domain; I6 for the rest: what can't be honoured stops
// the start, and the message has a value that would pass.
func TestConfigThatCannotBeHonouredIsRefusedWithAWayOut(t *testing.T) {
	minus := -time.Second
	for name, c := range map[string]struct {
		change  func(*Config)
		mention string
	}{
		"no trust domain":           {func(c *Config) { c.TrustDomain = "" }, "trust_domain: example.org"},
		"trust domain as URL":       {func(c *Config) { c.TrustDomain = "spiffe://example.org" }, "trust_domain: example.org"},
		"trust domain, path":        {func(c *Config) { c.TrustDomain = "example.org/a" }, "trust_domain: example.org"},
		"trust domain, empty label": {func(c *Config) { c.TrustDomain = "a..b" }, "empty label"},
		"trust domain, upper case":  {func(c *Config) { c.TrustDomain = "Example.org" }, "trust_domain: example.org"},
		"bootstrap":                 {func(c *Config) { c.Bootstrap = "today" }, time.Now().UTC().Format("bootstrap: 2006-01-02")},
		"data dir":                  {func(c *Config) { c.DataDir = "data" }, "data_dir: /var/lib/assay-server"},
		"seal key":                  {func(c *Config) { c.SealKeyFile = "seal.key" }, "seal_key_file: /"},
		"socket":                    {func(c *Config) { c.Admin.Socket = "admin.sock" }, "admin.socket: /"},
		"group":                     {func(c *Config) { c.Admin.Group = "no-such-group-here" }, "admin.group"},
		"remote operator":           {func(c *Config) { c.Admin.RemoteIDs = []string{"ci"} }, "spiffe://example.org/ops/ci"},
		"driver":                    {func(c *Config) { c.Store.Driver = "sqlite" }, "store.driver: bbolt"},
		"listen":                    {func(c *Config) { c.Listen = "8443" }, "listen: :8443"},
		"port":                      {func(c *Config) { c.Listen = ":84430" }, "listen: :8443"},
		"metrics":                   {func(c *Config) { c.Metrics.Listen = "localhost" }, "metrics.listen: 127.0.0.1:9402"},
		"prefix":                    {func(c *Config) { c.ReservedPrefix = "acme" }, "reserved_prefix: assay or spire"},
		"log level":                 {func(c *Config) { c.Log.Level = "trace" }, "log.level: debug or info or warn or error"},
		"log format":                {func(c *Config) { c.Log.Format = "xml" }, "log.format: text or json"},
		"batch":                     {func(c *Config) { c.Limits.SignBatch = 1000 }, "limits.sign_batch: 256"},
		"connections":               {func(c *Config) { c.Limits.AgentConnections = 1 }, "limits.connections_per_agent: 8"},
		"rate":                      {func(c *Config) { c.Limits.AttestRate = -1 }, "limits.attestations_per_second_per_address: 50"},
		"audit":                     {func(c *Config) { c.Audit.Keep = -1 }, "audit.keep"},
		"rejoin window":             {func(c *Config) { c.Attestation.RejoinWindow = &minus }, "attestation.rejoin_window: 168h"},
		"token life":                {func(c *Config) { c.Attestation.JoinToken.MaxTTL = 1000 * time.Hour }, "attestation.join_token.max_ttl: 1h"},
		"agent life":                {func(c *Config) { c.Attestation.AgentSVIDTTL = minus }, "attestation.agent_svid_ttl: 12h"},
		"agent longer than issuer":  {func(c *Config) { c.Attestation.AgentSVIDTTL = 48 * time.Hour }, "ca.issuer_ttl: 96h"},
		"a rule beyond the cap": {func(c *Config) {
			c.Kubernetes.Rules = []kube.Rule{{ServiceAccounts: []string{"*/*"}, X509SVIDTTL: 2 * time.Hour}}
		}, "4m1s and 1h"},
		"a rule for a moment": {func(c *Config) {
			c.Kubernetes.Rules = []kube.Rule{{ServiceAccounts: []string{"*/*"}, X509SVIDTTL: time.Minute}}
		}, "4m1s and 1h"},
		"svid longer than its cap": {func(c *Config) { c.CA.X509SVIDTTL = 2 * time.Hour }, "ca.max_x509_svid_ttl: 2h"},
	} {
		cfg := Config{TrustDomain: "example.org"}
		c.change(&cfg)
		_, err := cfg.Validate()
		if fault.KindOf(err) != fault.Precondition || !strings.HasPrefix(fault.ReasonOf(err), "config_") {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if text := fault.SafeText(err); !strings.Contains(text, c.mention) || strings.Contains(text, "\n") {
			t.Errorf("%s: %q does not say %q", name, text, c.mention)
		}
	}
}

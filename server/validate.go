package server

import (
	"fmt"
	"net"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/server/registry"
)

const (
	maxSignBatch     = 256
	defaultTokenTTL  = time.Hour
	maxTokenTTL      = registry.MaxTokenTTL
	maxRejoinWindow  = 90 * 24 * time.Hour
	defaultRejoin    = 7 * 24 * time.Hour
	defaultAgentTTL  = 12 * time.Hour
	defaultPrefix    = "assay"
	spirePrefix      = "spire"
	defaultDataDir   = "/var/lib/assay-server"
	defaultSocket    = "/run/assay-server/admin.sock"
	defaultSealKey   = "/etc/assay-server/seal.key"
	defaultListen    = ":8443"
	defaultMetrics   = "127.0.0.1:9402"
	driverBolt       = "bbolt"
	defaultStreams   = 100
	defaultPerAgent  = 8
	defaultAnonymous = 256
	defaultMesh      = 4096
	defaultAttest    = 50
	defaultSign      = 2000
	defaultLiveKeys  = 8
	defaultRenew     = 1
	defaultSync      = 2
	defaultOperator  = 100
)

// Validate returns c with its defaults filled in, or says which field can't be
// honoured and gives a value that would pass. It looks at nothing but the
// configuration and the host's group list.
func (c Config) Validate() (Config, error) {
	c = c.withDefaults()
	for _, check := range []func() error{
		c.checkIdentity, c.checkPlaces, c.checkChoices, c.checkLimits,
		func() error { _, err := c.Admin.gid(); return err },
		c.checkRemoteOperators,
		func() error { return c.Kubernetes.Check(c.trustDomain(), c.prefix()) },
		func() error { return c.Istio.Check(c.Kubernetes) },
		c.checkLives,
	} {
		if err := check(); err != nil {
			return Config{}, err
		}
	}
	return c, nil
}

func (c Config) withDefaults() Config {
	setText(&c.SealKeyFile, defaultSealKey)
	setText(&c.Listen, defaultListen)
	setText(&c.Admin.Socket, defaultSocket)
	setText(&c.Store.Driver, driverBolt)
	setText(&c.Metrics.Listen, defaultMetrics)
	setText(&c.Log.Level, "info")
	setText(&c.Log.Format, "text")
	setText(&c.DataDir, defaultDataDir)
	setText(&c.ReservedPrefix, defaultPrefix)
	setText(&c.Audit.Path, filepath.Join(c.DataDir, "audit.log"))
	c.CA = c.CA.WithDefaults()
	c.Kubernetes = c.Kubernetes.WithDefaults()
	c.Istio = c.Istio.WithDefaults(c.Kubernetes)
	if c.Attestation.RejoinWindow == nil {
		window := defaultRejoin
		c.Attestation.RejoinWindow = &window
	}
	setNumber(&c.Attestation.AgentSVIDTTL, defaultAgentTTL)
	setNumber(&c.Attestation.JoinToken.MaxTTL, defaultTokenTTL)
	setNumber(&c.Limits.SignBatch, maxSignBatch)
	setNumber(&c.Limits.Streams, defaultStreams)
	setNumber(&c.Limits.AgentConnections, defaultPerAgent)
	setNumber(&c.Limits.AnonymousConnections, defaultAnonymous)
	setNumber(&c.Limits.MeshConnections, defaultMesh)
	setNumber(&c.Limits.AttestRate, defaultAttest)
	setNumber(&c.Limits.SignRate, defaultSign)
	setNumber(&c.Limits.RenewRate, defaultRenew)
	setNumber(&c.Limits.SyncRate, defaultSync)
	setNumber(&c.Limits.LiveKeys, defaultLiveKeys)
	setNumber(&c.Limits.OperatorRate, defaultOperator)
	return c
}

func setText(s *string, to string) {
	if *s == "" {
		*s = to
	}
}

func setNumber[N int | uint32 | time.Duration](n *N, to N) {
	if *n == 0 {
		*n = to
	}
}

func (c Config) checkIdentity() error {
	if c.TrustDomain == "" {
		return badConfig("trust_domain is missing: set trust_domain: example.org, with your own name")
	}
	id, err := name.ParseID("spiffe://" + c.TrustDomain)
	if err != nil || id.Path() != "" {
		return badConfig("trust_domain is not the name of a trust domain: a-z, 0-9, dot, dash and underscore, at most 255, no scheme, port or empty label, as in trust_domain: example.org")
	}
	if c.Bootstrap != "" {
		if _, err := time.Parse(time.DateOnly, c.Bootstrap); err != nil {
			return badConfig("bootstrap is not a date: set bootstrap: %s for a new trust domain begun today, or leave it out", time.Now().UTC().Format(time.DateOnly))
		}
	}
	return nil
}

func (c Config) checkRemoteOperators() error {
	for _, text := range c.Admin.RemoteIDs {
		id, err := name.ParseID(text)
		switch {
		case err != nil || id.Path() == "" || id.TrustDomain() != c.trustDomain():
			return badConfig("admin.remote_spiffe_ids has an item that is not the SPIFFE ID of a workload of this trust domain: write them as spiffe://%s/ops/ci", c.TrustDomain)
		case strings.HasPrefix(id.Path(), c.prefix()):
			return badConfig("admin.remote_spiffe_ids has an ID below %s, which is for the server and its agents: give operators IDs of their own, such as spiffe://%s/ops/ci", c.prefix(), c.TrustDomain)
		}
	}
	return nil
}

func (c Config) checkPlaces() error {
	for _, place := range []struct{ field, path, example string }{
		{"data_dir", c.DataDir, defaultDataDir},
		{"seal_key_file", c.SealKeyFile, defaultSealKey},
		{"admin.socket", c.Admin.Socket, defaultSocket},
		{"audit.path", c.Audit.Path, filepath.Join(defaultDataDir, "audit.log")},
		{"attestation.x509pop.ca_bundle_file", c.Attestation.X509Pop.CABundleFile, "/etc/assay-server/nodes-ca.pem"},
	} {
		if place.path != "" && !filepath.IsAbs(place.path) || strings.ContainsRune(place.path, 0) {
			return badConfig("%s is not an absolute path: set %s: %s", place.field, place.field, place.example)
		}
	}
	if len(c.Admin.Socket) > durable.MaxSocketPath {
		return badConfig("admin.socket has %d bytes, at most %d are possible: set a shorter path, such as %s", len(c.Admin.Socket), durable.MaxSocketPath, defaultSocket)
	}
	if len(c.Admin.UIDs) > 0 && c.Admin.Group == "" {
		return badConfig("admin.uids can't reach the socket, which belongs to the server's user and admin.group: set admin.group to a group of theirs")
	}
	if c.Listen == c.Metrics.Listen {
		return badConfig("listen and metrics.listen are the same address: set metrics.listen: %s", defaultMetrics)
	}
	for _, address := range []struct{ field, value, example string }{
		{"listen", c.Listen, defaultListen},
		{"metrics.listen", c.Metrics.Listen, defaultMetrics},
	} {
		_, port, err := net.SplitHostPort(address.value)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n > 65535 {
			return badConfig("%s is not an address with a port: set %s: %s", address.field, address.field, address.example)
		}
	}
	return nil
}

func (c Config) checkChoices() error {
	for _, choice := range []struct {
		field, value string
		known        []string
	}{
		{"store.driver", c.Store.Driver, []string{driverBolt}},
		{"reserved_prefix", c.ReservedPrefix, []string{defaultPrefix, spirePrefix}},
		{"log.level", c.Log.Level, []string{"debug", "info", "warn", "error"}},
		{"log.format", c.Log.Format, []string{"text", "json"}},
	} {
		if !slices.Contains(choice.known, choice.value) {
			return badConfig("%s: set %s: %s", choice.field+" is not known", choice.field, strings.Join(choice.known, " or "))
		}
	}
	return nil
}

func (c Config) checkLimits() error {
	l := c.Limits
	if l.SignBatch < 1 || l.SignBatch > maxSignBatch {
		return badConfig("limits.sign_batch is between 1 and %d: set limits.sign_batch: %d", maxSignBatch, maxSignBatch)
	}
	for _, n := range []struct {
		field string
		value int
		usual int
	}{
		{"connections_per_agent", l.AgentConnections, defaultPerAgent},
		{"unauthenticated_connections_per_address", l.AnonymousConnections, defaultAnonymous},
		{"mesh_connections_per_address", l.MeshConnections, defaultMesh},
		{"attestations_per_second_per_address", l.AttestRate, defaultAttest},
		{"signatures_per_second_per_agent", l.SignRate, defaultSign},
		{"renewals_per_second_per_agent", l.RenewRate, defaultRenew},
		{"sync_streams_per_second_per_agent", l.SyncRate, defaultSync},
		{"live_keys_per_identity", l.LiveKeys, defaultLiveKeys},
		{"calls_per_second_per_operator", l.OperatorRate, defaultOperator},
	} {
		if n.value < 1 || n.value > 1_000_000 {
			return badConfig("limits.%s is between 1 and 1000000: set limits.%s: %d", n.field, n.field, n.usual)
		}
	}
	// An agent replaces its connection by making the new one first.
	if l.AgentConnections < 2 {
		return badConfig("limits.connections_per_agent is at least 2: set limits.connections_per_agent: %d", defaultPerAgent)
	}
	// One that serves, one that takes its place, one under another root.
	if l.LiveKeys < 3 {
		return badConfig("limits.live_keys_per_identity is at least 3: set limits.live_keys_per_identity: %d", defaultLiveKeys)
	}
	if c.Audit.MaxBytes < 0 || c.Audit.Keep < 0 {
		return badConfig("audit.max_bytes and audit.keep can't be negative: leave them out for 100 MiB and 10 files")
	}
	return nil
}

// checkLives holds the lifetimes to each other (I6).
func (c Config) checkLives() error {
	a := c.Attestation
	switch window := *a.RejoinWindow; {
	case window < 0 || window > maxRejoinWindow:
		return badConfig("attestation.rejoin_window is between 0s (off) and %v: set attestation.rejoin_window: %v", maxRejoinWindow, defaultRejoin)
	case a.JoinToken.MaxTTL < time.Second || a.JoinToken.MaxTTL > maxTokenTTL:
		return badConfig("attestation.join_token.max_ttl is between 1s and %v: set attestation.join_token.max_ttl: %v", maxTokenTTL, defaultTokenTTL)
	case a.AgentSVIDTTL < 0:
		return badConfig("attestation.agent_svid_ttl can't be negative: set attestation.agent_svid_ttl: %v", defaultAgentTTL)
	}
	if err := c.CA.Check(a.AgentSVIDTTL); err != nil {
		return err
	}
	for i, rule := range c.Kubernetes.Rules {
		if ttl := rule.X509SVIDTTL; ttl != 0 && (ttl > c.CA.MaxX509SVIDTTL || c.CA.Backdate >= ttl/2) {
			return badConfig("kubernetes.rules[%d].x509_svid_ttl is longer than ca.max_x509_svid_ttl or not twice ca.backdate: set it between %v and %v",
				i, 2*c.CA.Backdate+time.Second, c.CA.MaxX509SVIDTTL)
		}
	}
	return nil
}

// gid resolves Group; nil when none is set.
func (a AdminConfig) gid() (*uint32, error) {
	if a.Group == "" {
		return nil, nil
	}
	text := a.Group
	if _, err := strconv.ParseUint(text, 10, 32); err != nil {
		group, err := user.LookupGroup(text)
		if err != nil {
			return nil, badConfig("admin.group is not a group of this host: create it, name another, or leave admin.group out")
		}
		text = group.Gid
	}
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("read gid of admin.group: %w", err)
	}
	gid := uint32(n)
	return &gid, nil
}

// remoteIDs are RemoteIDs of a validated configuration.
func (a AdminConfig) remoteIDs() []spiffeid.ID {
	ids := make([]spiffeid.ID, len(a.RemoteIDs))
	for i, text := range a.RemoteIDs {
		ids[i] = spiffeid.RequireFromString(text)
	}
	return ids
}

// trustDomain and prefix are for a validated configuration.
func (c Config) trustDomain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString(c.TrustDomain)
}

func (c Config) prefix() string { return "/" + c.ReservedPrefix + "/" }

func badConfig(format string, args ...any) error {
	return fault.Newf(fault.Precondition, "config_invalid", format, args...)
}

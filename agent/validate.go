package agent

import (
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/agent/node"
	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	defaultDataDir = "/var/lib/assay-agent"
	defaultRunDir  = "/run/assay-agent/cache"
	defaultSockets = "/run/assay/public"
	defaultMetrics = "127.0.0.1:9403"
	defaultPrefix  = "assay"
	defaultToken   = "/var/run/secrets/assay/token" //nolint:gosec // a path
	spirePrefix    = "spire"

	apiSocket = "api.sock"
	sdsSocket = "sds.sock"
	// maxTrustDomain is in bytes (SPIFFE-ID section 2.1).
	maxTrustDomain = 255
)

// Validate returns c with its defaults filled in, or says which field can't be
// honoured and gives a value that would pass. It looks at nothing but the
// configuration.
func (c Config) Validate() (Config, error) {
	c = c.withDefaults()
	for _, check := range []func() error{c.checkTrust, c.checkEvidence, c.checkServers, c.checkPlaces, c.checkChoices, c.SDS.Check, c.Limits.Check} {
		if err := check(); err != nil {
			return Config{}, err
		}
	}
	return c, nil
}

func (c Config) withDefaults() Config {
	for _, f := range []struct {
		field *string
		value string
	}{
		{&c.Sockets.Dir, defaultSockets},
		{&c.Metrics.Listen, defaultMetrics},
		{&c.Log.Level, "info"},
		{&c.Log.Format, "text"},
		{&c.DataDir, defaultDataDir},
		{&c.RunDir, defaultRunDir},
		{&c.ReservedPrefix, defaultPrefix},
	} {
		if *f.field == "" {
			*f.field = f.value
		}
	}
	c.Attestation.K8S = c.Attestation.K8S.WithDefaults()
	c.SDS = c.SDS.WithDefaults()
	if c.K8SPsat.Cluster != "" && c.K8SPsat.TokenFile == "" {
		c.K8SPsat.TokenFile = defaultToken
	}
	return c
}

func (c Config) checkTrust() error {
	if c.TrustDomain == "" {
		return badConfig("trust_domain is missing: set trust_domain: example.org, with your server's name")
	}
	// Only the name itself: the parser would take an ID as well.
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	// Nor an empty label, which the server refuses too: crypto/x509 takes no
	// certificate whose URI has such a host.
	emptyLabel := slices.Contains(strings.Split(c.TrustDomain, "."), "")
	if err != nil || td.Name() != c.TrustDomain || emptyLabel || len(c.TrustDomain) > maxTrustDomain {
		return badConfig("trust_domain is not the name of a trust domain: a-z, 0-9, dot, dash and underscore, at most 255, no scheme, port or empty label, as in trust_domain: example.org")
	}
	switch {
	case c.TrustBundle == "" && c.Pin == "":
		return badConfig("the agent has nothing to recognise its server by: set pin, which `assay token create` prints, or trust_bundle: /etc/assay-agent/bundle.pem")
	case c.TrustBundle != "" && c.Pin != "":
		return badConfig("trust_bundle and pin exclude each other: take one out")
	case c.Pin != "":
		return node.CheckPin(c.Pin)
	}
	return nil
}

func (c Config) checkEvidence() error {
	var set []string
	for _, way := range []struct {
		name string
		set  bool
	}{
		{"join_token_file", c.JoinTokenFile != ""},
		{"x509pop", c.X509Pop != X509PopConfig{}},
		{"k8s_psat", c.K8SPsat != K8SPsatConfig{}},
	} {
		if way.set {
			set = append(set, way.name)
		}
	}
	switch {
	case len(set) > 1:
		return badConfig("%s exclude each other: take one out", strings.Join(set, " and "))
	case slices.Contains(set, "x509pop") && c.X509Pop.CertificateFile == "":
		return badConfig("x509pop.certificate_file is missing: set x509pop: {certificate_file: /etc/assay-agent/node.pem, private_key_file: /etc/assay-agent/node.key}")
	case slices.Contains(set, "x509pop") && c.X509Pop.PrivateKeyFile == "":
		return badConfig("x509pop.private_key_file is missing: set x509pop.private_key_file: /etc/assay-agent/node.key")
	case slices.Contains(set, "k8s_psat") && c.K8SPsat.Cluster == "":
		return badConfig("k8s_psat.cluster is missing: set k8s_psat: {cluster: prod}, with the name that the server has for this cluster")
	}
	return nil
}

func (c Config) checkServers() error {
	if len(c.Server.Addresses) == 0 {
		return badConfig("server.addresses is missing: set server: {addresses: [ca.example.org:8443]}")
	}
	for _, address := range c.Server.Addresses {
		if host, port, ok := splitAddress(address); !ok || host == "" || port == 0 {
			return badConfig("server.addresses has %q, which is no host with a port: write it as ca.example.org:8443", address)
		}
	}
	if _, _, ok := splitAddress(c.Metrics.Listen); !ok {
		return badConfig("metrics.listen is not an address with a port: set metrics.listen: %s", defaultMetrics)
	}
	return nil
}

// splitAddress takes a name or an IP address, or none, and a port in digits.
func splitAddress(address string) (host string, port uint64, ok bool) {
	host, digits, err := net.SplitHostPort(address)
	if err != nil || strings.ContainsFunc(host, notInHost) {
		return "", 0, false
	}
	port, err = strconv.ParseUint(digits, 10, 16)
	return host, port, err == nil
}

// notInHost says which characters neither a name nor an IP address, with its
// zone, has.
func notInHost(r rune) bool {
	return r <= ' ' || r >= 0x7f || strings.ContainsRune("/@\\\"'?#,;", r)
}

func (c Config) checkPlaces() error {
	for _, place := range []struct{ field, path, example string }{
		{"data_dir", c.DataDir, defaultDataDir},
		{"run_dir", c.RunDir, defaultRunDir},
		{"sockets.dir", c.Sockets.Dir, defaultSockets},
		{"trust_bundle", c.TrustBundle, "/etc/assay-agent/bundle.pem"},
		{"join_token_file", c.JoinTokenFile, "/etc/assay-agent/join.token"},
		{"x509pop.certificate_file", c.X509Pop.CertificateFile, "/etc/assay-agent/node.pem"},
		{"x509pop.private_key_file", c.X509Pop.PrivateKeyFile, "/etc/assay-agent/node.key"},
		{"k8s_psat.token_file", c.K8SPsat.TokenFile, defaultToken},
	} {
		if place.path != "" && (!filepath.IsAbs(place.path) || strings.ContainsRune(place.path, 0)) {
			return badConfig("%s is not an absolute path: set %s: %s", place.field, place.field, place.example)
		}
	}
	for _, path := range []string{c.socket(), c.sdsSocket()} {
		if len(path) > durable.MaxSocketPath {
			return badConfig("sockets.dir is too long: %s would have %d bytes and at most %d work; set sockets.dir: %s", filepath.Base(path), len(path), durable.MaxSocketPath, defaultSockets)
		}
	}
	// The sealed file is worth little without the key, and everything with it.
	if filepath.Clean(c.DataDir) == filepath.Clean(c.RunDir) {
		return badConfig("data_dir and run_dir are the same directory: set run_dir: %s, on a file system in memory", defaultRunDir)
	}
	// Those two are the agent's alone: nobody else would reach the socket.
	for _, private := range []string{c.DataDir, c.RunDir} {
		if inside(c.Sockets.Dir, private) {
			return badConfig("sockets.dir is in %s, which no workload can enter: set sockets.dir: %s", private, defaultSockets)
		}
	}
	return nil
}

// inside says whether path is dir or below it.
func inside(path, dir string) bool {
	rest, err := filepath.Rel(dir, path)
	return err == nil && rest != ".." && !strings.HasPrefix(rest, "../")
}

func (c Config) checkChoices() error {
	for _, choice := range []struct {
		field, value string
		known        []string
	}{
		{"reserved_prefix", c.ReservedPrefix, []string{defaultPrefix, spirePrefix}},
		{"log.level", c.Log.Level, []string{"debug", "info", "warn", "error"}},
		{"log.format", c.Log.Format, []string{"text", "json"}},
	} {
		if !slices.Contains(choice.known, choice.value) {
			return badConfig("%s is not known: set %s: %s", choice.field, choice.field, strings.Join(choice.known, " or "))
		}
	}
	return nil
}

// The following are for a validated configuration.

func (c Config) socket() string { return filepath.Join(c.Sockets.Dir, apiSocket) }

func (c Config) sdsSocket() string { return filepath.Join(c.Sockets.Dir, sdsSocket) }

func (c Config) trustDomain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString(c.TrustDomain)
}

func (c Config) prefix() string { return "/" + c.ReservedPrefix + "/" }

func badConfig(format string, args ...any) error {
	return fault.Newf(fault.Precondition, "config_invalid", format, args...)
}

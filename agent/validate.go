package agent

import (
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/agent/node"
	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	defaultDataDir = "/var/lib/assay-agent"
	defaultRunDir  = "/run/assay-agent/cache"
	defaultSockets = "/run/assay/public"
	defaultMetrics = "127.0.0.1:9403"
	defaultPrefix  = "assay"
	spirePrefix    = "spire"

	apiSocket = "api.sock"
	// maxSocketPath is what durable.ListenUnix takes: the kernel's limit less
	// the end of a temporary name.
	maxSocketPath = 102
	// maxTrustDomain is in bytes (SPIFFE-ID section 2.1).
	maxTrustDomain = 255
)

// Validate returns c with its defaults filled in, or says which field can't be
// honoured and gives a value that would pass. It looks at nothing but the
// configuration.
func (c Config) Validate() (Config, error) {
	c = c.withDefaults()
	for _, check := range []func() error{c.checkTrust, c.checkServers, c.checkPlaces, c.checkChoices, c.Limits.Check} {
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
	return c
}

func (c Config) checkTrust() error {
	if c.TrustDomain == "" {
		return badConfig("trust_domain is missing: set trust_domain: example.org, with your server's name")
	}
	// Only the name itself: the parser would take an ID as well.
	if td, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil || td.Name() != c.TrustDomain || len(c.TrustDomain) > maxTrustDomain {
		return badConfig("trust_domain is not the name of a trust domain: a-z, 0-9, dot, dash and underscore, at most 255, no scheme and no port, as in trust_domain: example.org")
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

func (c Config) checkServers() error {
	if len(c.Server.Addresses) == 0 {
		return badConfig("server.addresses is missing: set server: {addresses: [ca.example.org:8443]}")
	}
	for _, address := range c.Server.Addresses {
		if host, ok := splitAddress(address); !ok || host == "" {
			return badConfig("server.addresses has an entry without host or port: write each as ca.example.org:8443")
		}
	}
	if _, ok := splitAddress(c.Metrics.Listen); !ok {
		return badConfig("metrics.listen is not an address with a port: set metrics.listen: %s", defaultMetrics)
	}
	return nil
}

func splitAddress(address string) (host string, ok bool) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", false
	}
	_, err = strconv.ParseUint(port, 10, 16)
	return host, err == nil
}

func (c Config) checkPlaces() error {
	for _, place := range []struct{ field, path, example string }{
		{"data_dir", c.DataDir, defaultDataDir},
		{"run_dir", c.RunDir, defaultRunDir},
		{"sockets.dir", c.Sockets.Dir, defaultSockets},
		{"trust_bundle", c.TrustBundle, "/etc/assay-agent/bundle.pem"},
		{"join_token_file", c.JoinTokenFile, "/etc/assay-agent/join-token"},
	} {
		if place.path != "" && (!filepath.IsAbs(place.path) || strings.ContainsRune(place.path, 0)) {
			return badConfig("%s is not an absolute path: set %s: %s", place.field, place.field, place.example)
		}
	}
	if len(c.socket()) > maxSocketPath {
		return badConfig("sockets.dir is too long: %s would have %d bytes and at most %d work; set sockets.dir: %s", apiSocket, len(c.socket()), maxSocketPath, defaultSockets)
	}
	// The sealed file is worth little without the key, and everything with it.
	if filepath.Clean(c.DataDir) == filepath.Clean(c.RunDir) {
		return badConfig("data_dir and run_dir are the same directory: set run_dir: %s, on a file system in memory", defaultRunDir)
	}
	return nil
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

func (c Config) trustDomain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString(c.TrustDomain)
}

func (c Config) prefix() string { return "/" + c.ReservedPrefix + "/" }

func badConfig(format string, args ...any) error {
	return fault.Newf(fault.Precondition, "config_invalid", format, args...)
}

package agent

import (
	"path/filepath"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/agent/attest"
	"github.com/seed-caa81108/assay/agent/endpoint"
	"github.com/seed-caa81108/assay/agent/node"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// Config is all that an operator sets, as it stands in agent.yaml. The comment
// of each field is its manual; zero fields take their defaults.
type Config struct {
	// TrustDomain is the name of the trust domain, such as example.org.
	// Mandatory.
	TrustDomain string `yaml:"trust_domain"`
	// Server says where the servers of the trust domain are.
	Server ServerConfig `yaml:"server"`
	// TrustBundle is a file with the roots by which the agent recognises its
	// server at first, PEM or SPIFFE JSON; all of them are trusted. Either this
	// or pin. Once a bundle came from an authenticated server, neither is read
	// again.
	TrustBundle string `yaml:"trust_bundle"`
	// Pin is the SHA-256 of a current root's public key, in hex, as `assay
	// token create` prints it: that root and no other is trusted at first.
	Pin string `yaml:"pin"`
	// JoinTokenFile holds the one-time token that proves this node. It is read
	// when the agent has no identity, and may be gone afterwards.
	JoinTokenFile string `yaml:"join_token_file"`
	// Sockets says where workloads find the agent.
	Sockets SocketsConfig `yaml:"sockets"`
	// Attestation says how callers are told apart.
	Attestation attest.Config `yaml:"attestation"`
	// Limits keep one user of the node from starving the others.
	Limits endpoint.Limits `yaml:"limits"`
	// Metrics is the listener for Prometheus and health checks.
	Metrics MetricsConfig `yaml:"metrics"`
	// Log is the log of the process, on standard error.
	Log LogConfig `yaml:"log"`
	// DataDir belongs to this agent alone (mode 0700) and has to survive a
	// reboot: its own key and certificate, and the newest bundle. Default
	// /var/lib/assay-agent.
	DataDir string `yaml:"data_dir"`
	// RunDir keeps workload keys, sealed, over restarts of the agent. It should
	// be in memory and may be lost. Default /run/assay-agent/cache.
	RunDir string `yaml:"run_dir"`
	// ReservedPrefix is the server's reserved_prefix: assay or spire. Default
	// assay.
	ReservedPrefix string `yaml:"reserved_prefix"`
}

// ServerConfig is the `server` part of Config.
type ServerConfig struct {
	// Addresses of servers, host:port each, tried in turn. Mandatory.
	Addresses []string `yaml:"addresses"`
}

// SocketsConfig is the `sockets` part of Config.
type SocketsConfig struct {
	// Dir is the directory of api.sock, the Workload API. It is made with mode
	// 0755, the socket with 0666: every process of the node may ask who it is.
	// Default /run/assay/public.
	Dir string `yaml:"dir"`
}

// MetricsConfig is the `metrics` part of Config.
type MetricsConfig struct {
	// Listen is the address of /metrics, /healthz and /readyz, without TLS:
	// keep it local or behind a network policy. Default 127.0.0.1:9403.
	Listen string `yaml:"listen"`
}

// LogConfig is the `log` part of Config.
type LogConfig struct {
	// Level is debug, info, warn or error. Default info.
	Level string `yaml:"level"`
	// Format is text or json. Default text.
	Format string `yaml:"format"`
}

// Validate returns the completed configuration, or what is wrong with it and
// how to mend it. It touches no file.
func (c Config) Validate() (Config, error) {
	set := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	set(&c.Sockets.Dir, "/run/assay/public")
	set(&c.Metrics.Listen, "127.0.0.1:9403")
	set(&c.Log.Level, "info")
	set(&c.Log.Format, "text")
	set(&c.DataDir, "/var/lib/assay-agent")
	set(&c.RunDir, "/run/assay-agent/cache")
	set(&c.ReservedPrefix, "assay")
	if _, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil || strings.Contains(c.TrustDomain, "://") {
		return c, invalid("trust_domain must be the name of the trust domain, such as example.org")
	}
	if len(c.Server.Addresses) == 0 {
		return c, invalid("server.addresses needs at least one host:port")
	}
	if (c.TrustBundle == "") == (c.Pin == "") {
		return c, invalid("set one of trust_bundle and pin, so that the agent recognises its server")
	}
	if c.Pin != "" {
		if err := node.CheckPin(c.Pin); err != nil {
			return c, err
		}
	}
	if c.ReservedPrefix != "assay" && c.ReservedPrefix != "spire" {
		return c, invalid("reserved_prefix is assay or spire, as on the server")
	}
	for name, path := range map[string]string{
		"sockets.dir": c.Sockets.Dir, "data_dir": c.DataDir, "run_dir": c.RunDir,
	} {
		if !filepath.IsAbs(path) {
			return c, invalid(name + " must be an absolute path")
		}
	}
	return c, c.Limits.Check()
}

func invalid(text string) error { return fault.New(fault.Precondition, "config_invalid", text) }

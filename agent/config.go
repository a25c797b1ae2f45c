package agent

import (
	"github.com/seed-caa81108/assay/agent/attest"
	"github.com/seed-caa81108/assay/agent/endpoint"
)

// Config is all that an operator sets, as it stands in agent.yaml. The comment
// of each field is its manual; zero fields take their defaults.
type Config struct {
	// TrustDomain is the name of the trust domain that this node belongs to,
	// such as example.org. Mandatory.
	TrustDomain string `yaml:"trust_domain"`
	// Server says where the servers are.
	Server ServerConfig `yaml:"server"`
	// TrustBundle is a file with the roots by which the agent recognises its
	// server at first: PEM certificates or a SPIFFE bundle in JSON, as
	// `assay bundle show` prints it. All roots in it are trusted. Set this or
	// pin; neither is read again once a server has proved itself and sent its
	// bundle.
	TrustBundle string `yaml:"trust_bundle"`
	// Pin names one root by the SHA-256 of its public key, in hex;
	// `assay token create` prints it. The agent asks the server for its bundle
	// and trusts the one root in it that has this key, until a server has
	// proved itself by it.
	Pin string `yaml:"pin"`
	// JoinTokenFile holds a one-time token from `assay token create`, with
	// mode 0600. It is needed until the agent has joined, and read again only
	// if the server does not take the agent back after a long absence; then it
	// has to hold a new token. Default none.
	JoinTokenFile string `yaml:"join_token_file"`
	// X509Pop proves the node by a certificate that it has from another
	// authority, instead of a join token. Default none.
	X509Pop X509PopConfig `yaml:"x509pop"`
	// K8SPsat proves the node by the ServiceAccount token of the agent's pod,
	// instead of a join token. Default none.
	K8SPsat K8SPsatConfig `yaml:"k8s_psat"`
	// Sockets are where workloads find the agent.
	Sockets SocketsConfig `yaml:"sockets"`
	// SDS says what Envoy is told on its socket.
	SDS endpoint.SDSConfig `yaml:"sds"`
	// Attestation says how callers are told apart.
	Attestation attest.Config `yaml:"attestation"`
	// Limits keep one user of the node from taking the agent away from others.
	Limits endpoint.Limits `yaml:"limits"`
	// Metrics is the listener for Prometheus and health checks.
	Metrics MetricsConfig `yaml:"metrics"`
	// Log is the log of the process, on standard error.
	Log LogConfig `yaml:"log"`
	// DataDir belongs to this agent alone (mode 0700): its key, its own
	// certificate and the newest trust bundle. It has to survive a reboot, or
	// each boot needs a new join token. Default /var/lib/assay-agent.
	DataDir string `yaml:"data_dir"`
	// RunDir has the workloads' certificates and keys, encrypted under the
	// agent's own key, so that a restart during an outage of the server still
	// serves. It belongs on a file system in memory and need not survive a
	// reboot. Default /run/assay-agent/cache.
	RunDir string `yaml:"run_dir"`
	// ReservedPrefix is the first path segment of the server's and the agents'
	// SPIFFE IDs, as in the server's configuration: assay or spire. Default
	// assay.
	ReservedPrefix string `yaml:"reserved_prefix"`
}

// ServerConfig is the `server` part of Config.
type ServerConfig struct {
	// Addresses are the servers' addresses for agents, such as
	// ca.example.org:8443, tried in turn. A name may have several addresses
	// itself. Mandatory: at least one.
	Addresses []string `yaml:"addresses"`
}

// X509PopConfig is the `x509pop` part of Config. Both files are read anew at
// each attestation, so a certificate that was renewed is picked up then.
type X509PopConfig struct {
	// CertificateFile has the node's certificate and behind it those that lead
	// to the server's attestation.x509pop.ca_bundle_file, in PEM.
	CertificateFile string `yaml:"certificate_file"`
	// PrivateKeyFile has the key of that certificate in PEM, without a
	// passphrase, with mode 0600.
	PrivateKeyFile string `yaml:"private_key_file"`
}

// K8SPsatConfig is the `k8s_psat` part of Config.
type K8SPsatConfig struct {
	// Cluster is the name that this cluster has in the server's
	// kubernetes.clusters.
	Cluster string `yaml:"cluster"`
	// TokenFile has the projected token of the agent's pod, made for the
	// server's audience. It is read anew at each attestation. Default
	// /var/run/secrets/assay/token.
	TokenFile string `yaml:"token_file"`
}

// SocketsConfig is the `sockets` part of Config.
type SocketsConfig struct {
	// Dir is the directory of the sockets that workloads use; api.sock in it
	// is the SPIFFE Workload API, sds.sock is Envoy's secret discovery service.
	// It is made with mode 0755, the sockets have 0666: who gets what is decided
	// by who calls. Workloads in containers get the directory mounted. Default /run/assay/public.
	Dir string `yaml:"dir"`
}

// MetricsConfig is the `metrics` part of Config.
type MetricsConfig struct {
	// Listen is the address of /metrics and /healthz, without TLS: keep it
	// local or behind a network policy. Default 127.0.0.1:9403.
	Listen string `yaml:"listen"`
}

// LogConfig is the `log` part of Config.
type LogConfig struct {
	// Level is debug, info, warn or error. Default info.
	Level string `yaml:"level"`
	// Format is text or json. Default text.
	Format string `yaml:"format"`
}

package server

import (
	"time"

	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/istioca"
	"github.com/seed-caa81108/assay/server/kube"
)

// Config is all that an operator sets, as it stands in server.yaml. The
// comment of each field is its manual; zero fields take their defaults.
// Durations are written as in Go: 90s, 12h, 168h.
type Config struct {
	// TrustDomain is the name of the trust domain, such as example.org: the
	// host of every SPIFFE ID that this server signs. Mandatory; it can't be
	// changed later.
	TrustDomain string `yaml:"trust_domain"`
	// Bootstrap is the UTC date on which a new trust domain may be begun, such
	// as 2026-11-23. On that day, and one hour after it, a server whose store
	// has no authority makes the first root. On any other day an empty store
	// stops the server, so that a lost store is never taken for a new one.
	// Take it out once the server has started.
	Bootstrap string `yaml:"bootstrap"`
	// SealKeyFile holds the key under which root keys are encrypted in the
	// store: 32 bytes in base64, made by `assay-server seal-key FILE`. Keep it
	// outside the data directory and out of its backups: store and seal key
	// together are the whole CA. Default /etc/assay-server/seal.key.
	SealKeyFile string `yaml:"seal_key_file"`
	// Listen is where agents and remote operators connect, over TLS 1.3 only.
	// Default :8443.
	Listen string `yaml:"listen"`
	// Admin is the operators' socket on this host.
	Admin AdminConfig `yaml:"admin"`
	// Store is where everything durable is kept.
	Store StoreConfig `yaml:"store"`
	// CA says how long roots, issuers and certificates live.
	CA ca.Config `yaml:"ca"`
	// Attestation says how nodes prove themselves.
	Attestation AttestationConfig `yaml:"attestation"`
	// Kubernetes are the clusters whose nodes and pods get identities.
	Kubernetes kube.Config `yaml:"kubernetes"`
	// Istio is the CA of an Istio mesh.
	Istio istioca.Config `yaml:"istio"`
	// Audit is the log of every issuance and every act of an operator.
	Audit audit.Config `yaml:"audit"`
	// Limits bound what one peer can make the server do.
	Limits LimitsConfig `yaml:"limits"`
	// Metrics is the listener for Prometheus and health checks.
	Metrics MetricsConfig `yaml:"metrics"`
	// Log is the log of the process, on standard error.
	Log LogConfig `yaml:"log"`
	// DataDir belongs to this server alone (mode 0700): store and audit log.
	// Default /var/lib/assay-server.
	DataDir string `yaml:"data_dir"`
	// ReservedPrefix is the first path segment of the server's and the agents'
	// SPIFFE IDs: assay, or spire for those whose tools have SPIRE's parent
	// IDs written down. No entry may have an ID below it. It can't be changed
	// later. Default assay.
	ReservedPrefix string `yaml:"reserved_prefix"`
}

// AdminConfig is the `admin` part of Config.
type AdminConfig struct {
	// Socket is the operators' Unix socket. Its directory is made with mode
	// 0750, the socket has 0660. Default /run/assay-server/admin.sock.
	Socket string `yaml:"socket"`
	// Group, by name or number, may operate the server: socket and directory
	// are given to it, and who connects with it as primary group is admitted.
	// Default none.
	Group string `yaml:"group"`
	// UIDs are users who may operate the server besides root and the server's
	// own user; they need the group to reach the socket. Default none.
	UIDs []uint32 `yaml:"uids"`
	// RemoteIDs are the SPIFFE IDs of operators over the network, such as
	// spiffe://example.org/ops/ci: whoever has an X.509-SVID for exactly one
	// of them may read, and write entries, through Listen. All else stays with
	// the socket: tokens, bans, and entries for these IDs or below the
	// server's own, so that nobody becomes an operator by an operator's hand.
	// An ID that is taken out is cut off by a restart. Default none.
	RemoteIDs []string `yaml:"remote_spiffe_ids"`
}

// StoreConfig is the `store` part of Config.
type StoreConfig struct {
	// Driver is the kind of store. bbolt is a file in the data directory, for
	// one server. Default bbolt.
	Driver string `yaml:"driver"`
}

// AttestationConfig is the `attestation` part of Config.
type AttestationConfig struct {
	// JoinToken is attestation by a one-time secret.
	JoinToken JoinTokenConfig `yaml:"join_token"`
	// X509Pop is attestation by a certificate that the node has from another
	// authority.
	X509Pop X509PopConfig `yaml:"x509pop"`
	// RejoinWindow is how long after the end of its SVID an agent may come
	// back with the key it was last certified for; 0s turns that off. It also
	// bounds, together with ten minutes, how long an agent that lost the
	// answer may ask again with the same join token. Default 168h.
	RejoinWindow *time.Duration `yaml:"rejoin_window"`
	// AgentSVIDTTL is the life of an agent's own certificate: how long a
	// server may be away before agents have to rejoin. Default 12h.
	AgentSVIDTTL time.Duration `yaml:"agent_svid_ttl"`
}

// JoinTokenConfig is the `attestation.join_token` part of Config.
type JoinTokenConfig struct {
	// MaxTTL is the longest life that a join token can be given. Default 1h.
	MaxTTL time.Duration `yaml:"max_ttl"`
}

// X509PopConfig is the `attestation.x509pop` part of Config.
type X509PopConfig struct {
	// CABundleFile has the authorities, in PEM, whose certificates make a
	// node: whoever holds a certificate of theirs that is for digitalSignature,
	// and its key, joins as an agent. So name an authority that gives
	// certificates to nodes alone. It is read at start. Default none, which
	// turns this attestor off.
	CABundleFile string `yaml:"ca_bundle_file"`
}

// LimitsConfig is the `limits` part of Config. Agents are limited by their
// identity, others by their address.
type LimitsConfig struct {
	// SignBatch is how many certificates an agent may ask for in one call.
	// Default and maximum 256.
	SignBatch int `yaml:"sign_batch"`
	// Streams is how many calls may run on one agent connection at a time.
	// Default 100.
	Streams uint32 `yaml:"streams_per_connection"`
	// AgentConnections is how many connections, and how many sync streams over
	// all of them, one agent may have. Default 8.
	AgentConnections int `yaml:"connections_per_agent"`
	// AnonymousConnections is how many connections without an agent's
	// certificate, handshakes included, one address may have. Raise it where
	// very many agents come through one NAT. Default 256.
	AnonymousConnections int `yaml:"unauthenticated_connections_per_address"`
	// MeshConnections is how many connections to istio.listen one address may
	// have, where an IPv6 network of 64 bits is one. Raise it where more proxies
	// than that come through one NAT, or from one such network. Default 4096.
	MeshConnections int `yaml:"mesh_connections_per_address"`
	// AttestRate is how many attestations per second one address may begin; it
	// may save up ten seconds' worth. Default 50.
	AttestRate int `yaml:"attestations_per_second_per_address"`
	// SignRate is how many certificates for workloads one agent may ask for per
	// second; it may save up ten seconds' worth. A node comes up, or replaces
	// everything it has at once, with 20000 identities. Default 2000.
	SignRate int `yaml:"signatures_per_second_per_agent"`
	// RenewRate is how many times per second one agent may renew its own
	// certificate; it may save up ten seconds' worth. Default 1.
	RenewRate int `yaml:"renewals_per_second_per_agent"`
	// SyncRate is how many sync streams per second one agent may open; it may
	// save up ten seconds' worth. Default 2.
	SyncRate int `yaml:"sync_streams_per_second_per_agent"`
	// LiveKeys is for how many keys the agent of a Kubernetes node may have valid
	// certificates of one identity at a time. It needs two, and one more each time
	// that it loses what it held: its node was rebooted, say. Default 8.
	LiveKeys int `yaml:"live_keys_per_identity"`
	// OperatorRate is how many calls per second a remote operator may make; it
	// may save up ten seconds' worth. Who comes by the admin socket is not
	// limited. Default 100.
	OperatorRate int `yaml:"calls_per_second_per_operator"`
}

// MetricsConfig is the `metrics` part of Config.
type MetricsConfig struct {
	// Listen is the address of /metrics and /healthz, without TLS: keep it
	// local or behind a network policy. Default 127.0.0.1:9402.
	Listen string `yaml:"listen"`
}

// LogConfig is the `log` part of Config.
type LogConfig struct {
	// Level is debug, info, warn or error. Default info.
	Level string `yaml:"level"`
	// Format is text or json. Default text.
	Format string `yaml:"format"`
}

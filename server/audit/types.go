package audit

import "time"

// Actor is who asked. Exactly one of its parts is filled: uid, gid, pid and exe
// for a local operator, SPIFFE ID and serial for a peer with a certificate, SPIFFE
// ID and Kubernetes for one with a ServiceAccount's token.
type Actor struct {
	Kind     string  // operator, agent, server, proxy or none
	UID, GID *uint32 // of a caller on a Unix socket
	PID      int32   // a hint: may be zero, may be reused
	Exe      string  // a hint
	SPIFFEID string  // from the verified certificate
	Serial   string  // of that certificate, lower-case hex
	// Kubernetes is what a token has proved; nil: there was none, or it was not
	// believed.
	Kubernetes *Kubernetes
}

// Kubernetes is where a ServiceAccount's token is from: fields that its API
// server does not name stay empty.
type Kubernetes struct {
	Cluster, Namespace, ServiceAccount string
	Pod, PodUID                        string
	Node                               string
}

// Origin is where a request came from. Handlers build it once per RPC and hand
// it down.
type Origin struct {
	RequestID string
	Actor     Actor
	From      string // ip:port or the socket's path
}

// Target is what was acted upon; fields that don't apply stay empty.
type Target struct {
	SPIFFEID      string
	ParentID      string // whose entry it is
	EntryID       string
	EntryRevision int64
	AgentID       string
	AuthorityID   string
	OperationID   string // of the rotation that it is a step of
}

// Why says which rule allowed it, and for acts of people their reason.
type Why struct {
	Rule          string
	SelectorsHash string // tells selectors apart without telling them
	Reason        string
}

// Result is how it ended: Code is "ok" or the name of a fault kind, Reason the
// fault's reason. Cause is the true reason where the caller was told a vaguer
// one.
type Result struct {
	Code   string
	Reason string
	Cause  string
}

// Cert identifies a certificate that is about to be signed.
type Cert struct {
	Serial              string
	SPKISHA256          string
	NotBefore, NotAfter time.Time
	IssuerSKI           string
}

// Line is everything a caller may put into one line of the log. There is no
// field for bytes, maps or errors: what is not declared here can't be logged.
type Line struct {
	Origin Origin
	Action string
	Target Target
	Why    Why
	Result Result
	Cert   *Cert
}

// Config is the `audit` part of the server's configuration.
type Config struct {
	// Path is the current file; older ones have .1 (the newest), .2 and so on
	// after its name. Default: audit.log in the data directory.
	Path string `yaml:"path"`
	// MaxBytes is the size at which a new file is begun. Default 100 MiB.
	MaxBytes int64 `yaml:"max_bytes"`
	// Keep is the number of older files that are kept. Default 10.
	Keep int `yaml:"keep"`
}

package ca

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Kind is a sort of end-entity certificate.
type Kind int

// The kinds. They differ in the identities they may carry and in how long
// they live.
const (
	Workload Kind = iota // anything outside the reserved prefix
	Agent                // <prefix>agent/...
	Server               // <prefix>server
	Minted               // as Workload, for a holder of whom no agent reports
	Mesh                 // likewise, for a proxy of a service mesh
)

var kindNames = [...]string{Workload: "workload", Agent: "agent", Server: "server", Minted: "minted", Mesh: "mesh"}

// String returns the kind's name, such as "workload".
func (k Kind) String() string {
	if k < 0 || int(k) >= len(kindNames) {
		return fmt.Sprintf("kind_%d", int(k))
	}
	return kindNames[k]
}

const (
	maxIDBytes      = 2048 // SPIFFE-ID section 2.3
	maxTDBytes      = 255
	maxClusterRunes = 64 // ub-organizational-unit-name, RFC 5280 appendix A
)

// Root and issuer have constant names (X509-34: a new root has the old one's
// name and a new key), and different ones, so that no chain builder takes the
// one for the other.
var (
	rootSubject   = pkix.Name{Organization: []string{"Assay"}, CommonName: "Assay root authority"}
	issuerSubject = pkix.Name{Organization: []string{"Assay"}, CommonName: "Assay issuer"}
)

// Profile is the checked shape of one sort of certificate: what is the same in
// all of its kind, and the bounds of what is not. Only this package makes one.
type Profile struct {
	name   string
	td     spiffeid.TrustDomain
	prefix string // the reserved path prefix
	kind   Kind   // for end entities

	ca          bool
	maxPathLen  int // for authorities; -1: no limit
	subject     pkix.Name
	keyUsage    x509.KeyUsage
	extKeyUsage []x509.ExtKeyUsage

	ttl, maxTTL, backdate time.Duration
	class                 class // which mark bounds it
}

// profiles are all the shapes that this package signs.
type profiles struct {
	root, issuer Profile
	leaf         [len(kindNames)]Profile
}

func newProfiles(td spiffeid.TrustDomain, prefix string, cfg Config, agentTTL time.Duration) profiles {
	authority := Profile{
		td: td, prefix: prefix, ca: true,
		keyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	end := Profile{
		td: td, prefix: prefix, backdate: cfg.Backdate, maxPathLen: -1,
		keyUsage:    x509.KeyUsageDigitalSignature,
		extKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	var p profiles
	p.root, p.issuer = authority, authority
	p.root.name, p.root.subject, p.root.maxPathLen = "root", rootSubject, -1
	p.root.ttl, p.root.maxTTL, p.root.backdate = cfg.RootTTL, cfg.RootTTL, rootBackdate
	p.issuer.name, p.issuer.subject, p.issuer.maxPathLen = "issuer", issuerSubject, 0
	p.issuer.ttl, p.issuer.maxTTL, p.issuer.backdate = cfg.IssuerTTL, cfg.IssuerTTL, cfg.Backdate
	for k := range p.leaf {
		leaf := end
		leaf.kind, leaf.name = Kind(k), Kind(k).String()
		leaf.ttl, leaf.maxTTL, leaf.class = cfg.X509SVIDTTL, cfg.MaxX509SVIDTTL, stream
		switch Kind(k) {
		case Agent:
			leaf.ttl, leaf.maxTTL = agentTTL, agentTTL
		case Server:
			leaf.class = own
		case Minted, Mesh:
			leaf.class = handed
		}
		p.leaf[k] = leaf
	}
	return p
}

// checkTrustDomain refuses names that the standard or package x509 can't carry
// to the end.
func checkTrustDomain(td spiffeid.TrustDomain) error {
	name := td.Name()
	switch {
	case td.IsZero():
		return fault.New(fault.Precondition, "config_trust_domain", "no trust domain is set: set trust_domain, such as example.org")
	case len(name) > maxTDBytes:
		return fault.Newf(fault.Precondition, "config_trust_domain", "the trust domain's name has %d bytes: the limit is %d", len(name), maxTDBytes)
	}
	// ID-29: Go refuses certificates whose URI has a host with an empty label.
	for label := range strings.SplitSeq(name, ".") {
		if label == "" {
			return fault.Newf(fault.Precondition, "config_trust_domain", "trust domain %q has an empty label: take the superfluous dot out of trust_domain", name)
		}
	}
	return nil
}

// checkID says whether a certificate of this profile may carry id.
func (p Profile) checkID(id spiffeid.ID) error {
	if id.IsZero() {
		return fault.New(fault.Invalid, "spiffe_id_invalid", "no SPIFFE ID is given")
	}
	if id.TrustDomain() != p.td {
		return fault.Newf(fault.Invalid, "spiffe_id_foreign", "the SPIFFE ID is not of trust domain %q", p.td.Name())
	}
	path := id.Path()
	if p.ca {
		if path != "" {
			return fault.New(fault.Invalid, "spiffe_id_invalid", "an authority's SPIFFE ID has no path")
		}
		return nil
	}
	if n := len(id.String()); n > maxIDBytes {
		return fault.Newf(fault.Invalid, "spiffe_id_invalid", "the SPIFFE ID has %d bytes: the limit is %d", n, maxIDBytes)
	}
	switch p.kind {
	case Workload, Minted, Mesh:
		if path == "" {
			return fault.New(fault.Invalid, "spiffe_id_invalid", "the SPIFFE ID has no path: the trust domain's own ID belongs to its authorities")
		}
		if strings.HasPrefix(path, p.prefix) {
			return fault.Newf(fault.Invalid, "spiffe_id_reserved", "paths under %s are reserved for agents and servers: choose another", p.prefix)
		}
	case Agent:
		if !strings.HasPrefix(path, p.prefix+"agent/") {
			return fault.Newf(fault.Invalid, "spiffe_id_invalid", "an agent's path begins with %sagent/", p.prefix)
		}
	case Server:
		if path != p.prefix+"server" {
			return fault.Newf(fault.Invalid, "spiffe_id_invalid", "a server's path is %sserver", p.prefix)
		}
	default:
		return fault.New(fault.Invalid, "kind_unknown", "the kind of certificate is not known")
	}
	return nil
}

// lifetime returns how long a certificate asked for with ttl lives, and how
// far it is back-dated. What is longer than the cap is shortened, as clients
// ask for round numbers.
func (p Profile) lifetime(ttl time.Duration) (life, backdate time.Duration, err error) {
	if ttl == 0 {
		ttl = p.ttl
	}
	if ttl < time.Second {
		return 0, 0, fault.Newf(fault.Invalid, "ttl_out_of_range", "a lifetime of %v is not possible: ask for at least a second, or for none to get the default", ttl)
	}
	backdate = p.backdate
	if ttl < p.ttl {
		backdate = min(backdate, ttl/4)
	}
	return min(ttl, p.maxTTL), backdate, nil
}

// checkCluster says whether name can be the subject's organizational unit.
func checkCluster(name string) error {
	if !utf8.ValidString(name) || utf8.RuneCountInString(name) > maxClusterRunes {
		return fault.Newf(fault.Invalid, "cluster_invalid", "the cluster's name is not UTF-8 or longer than %d characters", maxClusterRunes)
	}
	for _, r := range name {
		if !unicode.IsPrint(r) {
			return fault.New(fault.Invalid, "cluster_invalid", "the cluster's name has a character that does not print")
		}
	}
	return nil
}

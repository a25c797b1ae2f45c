package state

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// What a bundle may have. Every SVID in an answer of the Workload API comes with
// the whole bundle, and clients take 4 MiB: this leaves room for a dozen SVIDs
// in the worst case. An honest bundle has a handful of roots of 1 KiB each, and
// a file of it is far below what load reads.
const (
	maxRoots       = 128
	maxBundleBytes = 256 << 10
)

// Authority is a root of a bundle.
type Authority struct {
	ID          string
	Certificate *x509.Certificate
	// Tainted: holders of SVIDs under it renew at once.
	Tainted bool
	// Retired: nothing is signed under it any more; holders of SVIDs under it
	// renew soon, each at a moment of its own.
	Retired bool
}

// Bundle is the set of roots of one trust domain. It is not changed after it
// was made.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	Sequence    uint64
	// Authorities are sorted by ID.
	Authorities []Authority
	// Authenticated: it came from a server that the bundle before vouched for.
	// False for bootstrap material.
	Authenticated bool
}

// ParseAuthority checks that der can be a root of a trust domain: a
// certificate that signs (X509-SVID section 3.2). An empty id is computed.
func ParseAuthority(id string, der []byte) (Authority, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return Authority{}, invalidBundle("a root is not an X.509 certificate", err)
	}
	if !cert.IsCA || !cert.BasicConstraintsValid || cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return Authority{}, invalidBundle("a root is a certificate that can't sign", nil)
	}
	own := hex.EncodeToString(cert.SubjectKeyId)
	switch {
	case id == "" && own == "":
		sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
		id = hex.EncodeToString(sum[:20])
	case id == "":
		id = own
	case own != "" && id != own:
		return Authority{}, invalidBundle("a root's ID is not its subject key identifier", nil)
	}
	return Authority{ID: id, Certificate: cert}, nil
}

// NewBundle returns a bundle of the given roots.
func NewBundle(td spiffeid.TrustDomain, sequence uint64, authenticated bool, roots []Authority) (*Bundle, error) {
	b := &Bundle{TrustDomain: td, Sequence: sequence, Authenticated: authenticated, Authorities: slices.Clone(roots)}
	slices.SortFunc(b.Authorities, func(x, y Authority) int { return strings.Compare(x.ID, y.ID) })
	return b, b.check()
}

// BundleFrom returns the bundle of td that a server sent. Whoever calls it has
// verified that server, so the bundle is authenticated.
func BundleFrom(td spiffeid.TrustDomain, from *agentv1.TrustBundle) (*Bundle, error) {
	if from.GetTrustDomain() != td.Name() {
		return nil, fault.New(fault.Precondition, "bundle_invalid", "the server sent the bundle of another trust domain")
	}
	roots := make([]Authority, 0, len(from.GetX509Authorities()))
	for _, a := range from.GetX509Authorities() {
		root, err := ParseAuthority(a.GetId(), a.GetCertificate())
		if err != nil {
			return nil, err
		}
		root.Tainted, root.Retired = a.GetTainted(), a.GetRetired()
		roots = append(roots, root)
	}
	return NewBundle(td, from.GetSequence(), true, roots)
}

// check holds what is true of every bundle. One without roots would make every
// certificate untrusted (SPIFFE Trust Domain and Bundle section 4.1.3), the
// server's first: an agent that took it could never be mended over the wire.
func (b *Bundle) check() error {
	if b.TrustDomain.IsZero() {
		return invalidBundle("it has no trust domain", nil)
	}
	if len(b.Authorities) == 0 {
		return invalidBundle("it has no roots", nil)
	}
	if len(b.Authorities) > maxRoots {
		return invalidBundle(fmt.Sprintf("it has more than %d roots", maxRoots), nil)
	}
	size := 0
	for i, a := range b.Authorities {
		if a.ID == "" || a.Certificate == nil {
			return invalidBundle("a root has no ID or no certificate", nil)
		}
		if i > 0 && b.Authorities[i-1].ID >= a.ID {
			return invalidBundle("two roots have the same ID", nil)
		}
		if size += len(a.ID) + len(a.Certificate.Raw); size > maxBundleBytes {
			return invalidBundle(fmt.Sprintf("its roots have more than %d bytes", maxBundleBytes), nil)
		}
	}
	return nil
}

func invalidBundle(rule string, cause error) error {
	return fault.Wrap(fault.Precondition, cause, "bundle_invalid", "the bundle can't be used: "+rule)
}

// Roots returns the certificates in order.
func (b *Bundle) Roots() []*x509.Certificate {
	roots := make([]*x509.Certificate, len(b.Authorities))
	for i, a := range b.Authorities {
		roots[i] = a.Certificate
	}
	return roots
}

// Pool returns the roots as a pool.
func (b *Bundle) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, a := range b.Authorities {
		pool.AddCert(a.Certificate)
	}
	return pool
}

// DER returns the roots as the Workload API wants them, one after the other.
func (b *Bundle) DER() []byte {
	var der []byte
	for _, a := range b.Authorities {
		der = append(der, a.Certificate.Raw...)
	}
	return der
}

// Authority returns the root with this ID.
func (b *Bundle) Authority(id string) (Authority, bool) {
	i, ok := slices.BinarySearchFunc(b.Authorities, id, func(a Authority, id string) int { return strings.Compare(a.ID, id) })
	if !ok {
		return Authority{}, false
	}
	return b.Authorities[i], true
}

// Equal says whether two bundles have the same content.
func (b *Bundle) Equal(c *Bundle) bool {
	return b.TrustDomain == c.TrustDomain && b.Sequence == c.Sequence &&
		slices.EqualFunc(b.Authorities, c.Authorities, func(x, y Authority) bool {
			return x.ID == y.ID && x.Tainted == y.Tainted && x.Retired == y.Retired && bytes.Equal(x.Certificate.Raw, y.Certificate.Raw)
		})
}

// mayBecome says whether next may replace b.
func (b *Bundle) mayBecome(next *Bundle) error {
	switch {
	case !b.Authenticated:
		return nil
	case !next.Authenticated:
		return fault.New(fault.Precondition, "bundle_rollback",
			"bootstrap material can't replace a bundle that came from an authenticated server")
	case next.Sequence < b.Sequence:
		return fault.Newf(fault.Precondition, "bundle_rollback",
			"the server sent bundle %d, this agent already has %d: the server's store went back in time; restore it properly, or remove this agent's bundle.json",
			next.Sequence, b.Sequence)
	case next.Sequence == b.Sequence && !b.Equal(next):
		return fault.Newf(fault.Precondition, "bundle_rollback",
			"the server sent another bundle %d than this agent has: two stores call themselves this trust domain", b.Sequence)
	}
	return nil
}

type bundleFile struct {
	Version       int             `json:"version"`
	TrustDomain   string          `json:"trust_domain"`
	Sequence      uint64          `json:"sequence"`
	Authenticated bool            `json:"authenticated"`
	Authorities   []authorityFile `json:"x509_authorities"`
}

type authorityFile struct {
	ID          string `json:"id"`
	Certificate []byte `json:"certificate"`
	Tainted     bool   `json:"tainted,omitempty"`
	Retired     bool   `json:"retired,omitempty"`
}

func encodeBundle(b *Bundle) ([]byte, error) {
	f := bundleFile{Version: version, TrustDomain: b.TrustDomain.Name(), Sequence: b.Sequence, Authenticated: b.Authenticated}
	for _, a := range b.Authorities {
		f.Authorities = append(f.Authorities, authorityFile{ID: a.ID, Certificate: a.Certificate.Raw, Tainted: a.Tainted, Retired: a.Retired})
	}
	return json.Marshal(f)
}

func decodeBundle(data []byte) (*Bundle, error) {
	var f bundleFile
	if err := decodeStrictly(data, &f); err != nil {
		return nil, err
	}
	if f.Version != version {
		return nil, fmt.Errorf("unknown version %d", f.Version)
	}
	td, err := spiffeid.TrustDomainFromString(f.TrustDomain)
	if err != nil {
		return nil, err
	}
	roots := make([]Authority, 0, len(f.Authorities))
	for _, a := range f.Authorities {
		root, err := ParseAuthority(a.ID, a.Certificate)
		if err != nil {
			return nil, errors.New(fault.SafeText(err))
		}
		root.Tainted, root.Retired = a.Tainted, a.Retired
		roots = append(roots, root)
	}
	b, err := NewBundle(td, f.Sequence, f.Authenticated, roots)
	if err != nil {
		return nil, errors.New(fault.SafeText(err))
	}
	return b, nil
}

// Delivered is a promise that covers every SVID under AuthorityID that was
// handed out together with bundle Sequence: they end by Until. It outlives the
// process, because a workload keeps what it got when the agent restarts.
type Delivered struct {
	Sequence    uint64    `json:"bundle_sequence"`
	AuthorityID string    `json:"authority_id"`
	Until       time.Time `json:"until"`
}

type deliveredFile struct {
	Version   int         `json:"version"`
	Delivered []Delivered `json:"delivered"`
}

func encodeDelivered(list []Delivered) ([]byte, error) {
	return json.Marshal(deliveredFile{Version: version, Delivered: list})
}

func decodeDelivered(data []byte) ([]Delivered, error) {
	var f deliveredFile
	if err := decodeStrictly(data, &f); err != nil {
		return nil, err
	}
	if f.Version != version {
		return nil, fmt.Errorf("unknown version %d", f.Version)
	}
	return f.Delivered, nil
}

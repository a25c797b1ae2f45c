package ca

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Root is an authority as others see it.
type Root struct {
	ID          string
	State       State
	Certificate *x509.Certificate
	CreatedAt   time.Time
	Published   uint64 // sequence of the first bundle that has it
	Operation   string // the rotation that made it, if any
	Moves       []Move // what became of it, oldest first
	// No end-entity certificate under it that went through an agent ends after
	// StreamUntil, and none that was handed out without a stream after
	// HandedUntil.
	StreamUntil, HandedUntil time.Time
	// HandedBefore is when the last certificate ends that was handed out
	// without a stream before this root was published.
	HandedBefore time.Time
}

// Bundle is the trust bundle at one sequence: what holders of our SVIDs are
// verified against. It is shared and must not be changed.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	Sequence    uint64
	Roots       []Root // the published ones, sorted by ID

	replaced chan struct{}
}

// bundle projects the authorities onto the trust bundle.
func (v *view) bundle(td spiffeid.TrustDomain) *Bundle {
	b := &Bundle{TrustDomain: td, Sequence: v.sequence, replaced: make(chan struct{})}
	for _, root := range v.roots() {
		if root.State.published() {
			b.Roots = append(b.Roots, root)
		}
	}
	return b
}

func (v *view) roots() []Root {
	all := make([]Root, 0, len(v.authorities))
	for _, one := range v.authorities {
		all = append(all, one.root())
	}
	return all
}

func (one *authority) root() Root {
	r := &one.record
	return Root{
		ID: r.ID, State: r.State, Certificate: one.cert, CreatedAt: r.CreatedAt, Published: r.Published, Operation: r.Operation, Moves: r.Moves,
		StreamUntil: r.Marks.Stream, HandedUntil: r.Marks.Handed, HandedBefore: r.HandedBefore,
	}
}

// Pool returns the bundle's roots as a pool, a new one for each call.
func (b *Bundle) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, root := range b.Roots {
		pool.AddCert(root.Certificate)
	}
	return pool
}

// PEM returns the bundle's roots as PEM, one after the other.
func (b *Bundle) PEM() []byte {
	var out []byte
	for _, root := range b.Roots {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate.Raw})...)
	}
	return out
}

// Replaced returns a channel that is closed when a newer bundle is current.
func (b *Bundle) Replaced() <-chan struct{} { return b.replaced }

// Bundle returns the current trust bundle. It never blocks.
func (a *Authority) Bundle() *Bundle { return a.current.Load().bundle }

// Published says whether the root with this ID is in the current bundle.
func (a *Authority) Published(id string) bool {
	one := a.current.Load().view.find(id)
	return one != nil && one.record.State.published()
}

// Authorities returns all authorities, revoked ones included, sorted by ID.
func (a *Authority) Authorities() []Root { return a.current.Load().view.roots() }

// Pin returns what an agent may be told to recognise a root by: the hex of
// SHA-256 over its SubjectPublicKeyInfo.
func Pin(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

package cache

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
)

// verifier checks what the server signed against one bundle. Most leaves of a
// time have the same issuer, so a chain above the leaf is verified once.
type verifier struct {
	bundle *state.Bundle
	pool   *x509.CertPool

	mu      sync.Mutex
	issuers map[string]issuer // by the DER of the chain above the leaf
}

type issuer struct {
	pool        *x509.CertPool
	authorityID string
}

// maxIssuers bounds the memory for issuers; one server has one at a time.
const maxIssuers = 64

func newVerifier(b *state.Bundle) *verifier {
	return &verifier{bundle: b, pool: b.Pool(), issuers: map[string]issuer{}}
}

// check returns the leaf and the root that it chains to, if chain is an
// X.509-SVID of id for key.
func (v *verifier) check(chain [][]byte, id spiffeid.ID, key *ecdsa.PublicKey, at time.Time) (*x509.Certificate, string, error) {
	if len(chain) == 0 {
		return nil, "", wrongSVID("no certificate", nil)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, "", wrongSVID("it can't be parsed", err)
	}
	got, authorityID, err := v.verify(leaf, chain[1:], at)
	switch {
	case err != nil:
		return nil, "", wrongSVID(fault.SafeText(err), err)
	case got != id:
		return nil, "", wrongSVID("it has another SPIFFE ID than the entry", nil)
	case !key.Equal(leaf.PublicKey):
		return nil, "", wrongSVID("it is for another key", nil)
	}
	return leaf, authorityID, nil
}

func (v *verifier) verify(leaf *x509.Certificate, above [][]byte, at time.Time) (spiffeid.ID, string, error) {
	td := v.bundle.TrustDomain
	memo := ""
	if len(above) == 1 { // the usual case, and the only one worth remembering
		memo = string(above[0])
	}
	if known, ok := v.issuer(memo); ok {
		id, err := rpc.VerifyPeer([]*x509.Certificate{leaf}, known.pool, td, at)
		return id, known.authorityID, err
	}
	chain := []*x509.Certificate{leaf}
	for _, der := range above {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return spiffeid.ID{}, "", err
		}
		chain = append(chain, c)
	}
	id, err := rpc.VerifyPeer(chain, v.pool, td, at)
	if err != nil {
		return spiffeid.ID{}, "", err
	}
	authorityID := v.authorityOf(chain[len(chain)-1])
	if memo != "" {
		pool := x509.NewCertPool()
		pool.AddCert(chain[1])
		v.mu.Lock()
		if len(v.issuers) >= maxIssuers {
			clear(v.issuers)
		}
		v.issuers[memo] = issuer{pool: pool, authorityID: authorityID}
		v.mu.Unlock()
	}
	return id, authorityID, nil
}

func (v *verifier) issuer(memo string) (issuer, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	known, ok := v.issuers[memo]
	return known, ok
}

// authorityOf returns the ID of the root that signed c.
func (v *verifier) authorityOf(c *x509.Certificate) string {
	for _, a := range v.bundle.Authorities {
		if bytes.Equal(c.RawIssuer, a.Certificate.RawSubject) && c.CheckSignatureFrom(a.Certificate) == nil {
			return a.ID
		}
	}
	return ""
}

func wrongSVID(rule string, cause error) error {
	return fault.Wrap(fault.Precondition, cause, "svid_invalid", "the server sent a certificate that can't be served: "+rule)
}

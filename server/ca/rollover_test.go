package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// X509-34: while two roots are published, they have one name and two keys, and
// leaves of both verify in package x509 and in go-spiffe, whichever root comes
// first.
func TestTwoRootsOfOneNameVerifySideBySide(t *testing.T) {
	one, two := newBenchPKI(t), newBenchPKI(t)
	if !bytes.Equal(one.root.RawSubject, two.root.RawSubject) || !bytes.Equal(one.issuer.RawSubject, two.issuer.RawSubject) {
		t.Fatal("a new root has another name")
	}
	if one.root.PublicKey.(*ecdsa.PublicKey).Equal(two.root.PublicKey) || bytes.Equal(one.root.SubjectKeyId, two.root.SubjectKeyId) {
		t.Fatal("a new root has the old key")
	}
	for _, roots := range [][]*x509.Certificate{{one.root, two.root}, {two.root, one.root}} {
		pool := x509.NewCertPool()
		for _, root := range roots {
			pool.AddCert(root)
		}
		bundle := x509bundle.FromX509Authorities(example, roots)
		for _, b := range []*benchPKI{one, two} {
			template, parent, key := b.template(t, b.p.leaf[Workload])
			leaf := b.sign(t, template, parent, key)
			// Both issuers are at hand, as in a store of certificates.
			below := x509.NewCertPool()
			below.AddCert(one.issuer)
			below.AddCert(two.issuer)
			chains, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: below, CurrentTime: time.Now()})
			if err != nil || len(chains) != 1 || !chains[0][2].Equal(b.root) {
				t.Errorf("%d chains, %v", len(chains), err)
			}
			if _, _, err := x509svid.Verify([]*x509.Certificate{leaf, b.issuer}, bundle); err != nil {
				t.Error(err)
			}
		}
	}
}

package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

// pki is a root that signs whatever a test wants, right or wrong. Its root's
// dates are fixed, so that output with them can be a golden file.
type pki struct {
	t    testing.TB
	root *x509.Certificate
	key  crypto.Signer
}

var (
	longAgo = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	farAway = time.Date(2126, 1, 1, 0, 0, 0, 0, time.UTC)
)

func newPKI(t testing.TB) *pki {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &pki{t: t, key: key}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"},
		NotBefore: longAgo, NotAfter: farAway, SubjectKeyId: []byte{0xab, 0xcd},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
	}
	p.root = p.create(template, template, key.Public())
	return p
}

func (p *pki) create(template, parent *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	p.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, p.key)
	if err != nil {
		p.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return cert
}

// leaf signs an SVID after the test's change to a right template.
func (p *pki) leaf(id string, change func(*x509.Certificate)) (*x509.Certificate, crypto.Signer) {
	p.t.Helper()
	u, err := url.Parse(id)
	if err != nil {
		p.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(0xbeef), NotBefore: longAgo, NotAfter: farAway, URIs: []*url.URL{u},
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(template)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	return p.create(template, p.root, key.Public()), key
}

// svid makes one SVID as the Workload API sends it.
func (p *pki) svid(id, hint string, serialNumber int64) *workload.X509SVID {
	p.t.Helper()
	cert, key := p.leaf(id, func(c *x509.Certificate) { c.SerialNumber = big.NewInt(serialNumber) })
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	return &workload.X509SVID{SpiffeId: id, X509Svid: cert.Raw, X509SvidKey: der, Bundle: p.root.Raw, Hint: hint}
}

func message(svids ...*workload.X509SVID) *workload.X509SVIDResponse {
	return &workload.X509SVIDResponse{Svids: svids}
}

func writePEM(t *testing.T, name string, certs ...*x509.Certificate) string {
	t.Helper()
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, out, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

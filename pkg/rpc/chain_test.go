package rpc_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
)

// below returns an authority that p has signed.
func (p *pki) below(change func(*x509.Certificate)) *pki {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "issuer"},
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, MaxPathLen: -1,
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.cert, key.Public(), p.key)
	if err != nil {
		p.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return &pki{t: p.t, cert: cert, key: key}
}

// X509-14, X509-30, X509-33, WL-32: each certificate of a chain is judged, not
// the leaf alone.
func TestVerifyPeerJudgesTheWholeChain(t *testing.T) {
	ca := newPKI(t)
	unknown := pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}
	for name, c := range map[string]struct {
		issuer func(*x509.Certificate)
		reason string // empty: accepted
	}{
		"sound":              {nil, ""},
		"expired":            {func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, "svid_expired"},
		"not yet valid":      {func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }, "svid_invalid"},
		"no CA":              {func(c *x509.Certificate) { c.IsCA, c.KeyUsage, c.MaxPathLen = false, x509.KeyUsageDigitalSignature, 0 }, "svid_invalid"},
		"may not sign":       {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, "svid_invalid"},
		"unknown, critical":  {func(c *x509.Certificate) { c.ExtraExtensions = append(c.ExtraExtensions, unknown) }, "svid_invalid"},
		"constrained":        {func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} }, ""},
		"constrained away":   {func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.com"} }, "svid_invalid"},
		"excluded":           {func(c *x509.Certificate) { c.ExcludedURIDomains = []string{"example.org"} }, "svid_invalid"},
		"path length 0":      {func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }, ""},
		"digital signatures": {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }, ""},
	} {
		issuer := ca.below(c.issuer)
		leaf := issuer.sign(leafTemplate("spiffe://example.org/a")).Leaf
		_, err := rpc.VerifyPeer([]*x509.Certificate{leaf, issuer.cert}, ca.pool(), td, time.Now())
		if (err == nil) != (c.reason == "") || err != nil && fault.ReasonOf(err) != c.reason {
			t.Errorf("%s: got %v, want %q", name, err, c.reason)
		}
	}

	last := ca.below(func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
	beyond := last.below(nil)
	leaf := beyond.sign(leafTemplate("spiffe://example.org/a")).Leaf
	if _, err := rpc.VerifyPeer([]*x509.Certificate{leaf, beyond.cert, last.cert}, ca.pool(), td, time.Now()); fault.ReasonOf(err) != "svid_invalid" {
		t.Errorf("an authority below one that may have none: %v", err)
	}
	// To package x509 a constraint to example.org admits what is below it.
	constrained := ca.below(func(c *x509.Certificate) { c.PermittedURIDomains = []string{".example.org", "example.org"} })
	sub := constrained.sign(leafTemplate("spiffe://sub.example.org/a")).Leaf
	if _, err := rpc.VerifyPeer([]*x509.Certificate{sub, constrained.cert}, ca.pool(), td, time.Now()); fault.ReasonOf(err) != "svid_invalid" {
		t.Errorf("the trust domain below ours: %v", err)
	}
	if _, err := rpc.VerifyPeer([]*x509.Certificate{sub}, ca.pool(), td, time.Now()); fault.ReasonOf(err) != "svid_invalid" {
		t.Errorf("without its issuer: %v", err)
	}
}

// D-2, D-4, D-12, X509-25: other programs' authorities differ from ours, and
// are judged by what the standard demands of them, not by what we make.
func TestVerifyPeerTakesAuthoritiesOfOthers(t *testing.T) {
	at := func(path string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: path}} }
	}
	for name, change := range map[string]func(*x509.Certificate){
		"no SPIFFE ID":              nil,
		"an ID with a slash at end": at("/"),
		"digitalSignature":          func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature },
	} {
		// The one with the oddity is the root that is trusted.
		root := newPKI(t).below(change)
		leaf := root.sign(leafTemplate("spiffe://example.org/a")).Leaf
		if id, err := rpc.VerifyPeer([]*x509.Certificate{leaf}, root.pool(), td, time.Now()); err != nil || id.Path() != "/a" {
			t.Errorf("%s: %v, %v", name, id, err)
		}
	}
}

// X509-34: a rollover has two roots of one name, and the first of that name is
// not always the right one.
func TestVerifyPeerFindsItsRootAmongNamesakes(t *testing.T) {
	old, next := newPKI(t), newPKI(t)
	pool := x509.NewCertPool()
	for _, ca := range []*pki{old, next} {
		pool.AddCert(ca.cert)
	}
	if !bytes.Equal(old.cert.RawSubject, next.cert.RawSubject) {
		t.Fatal("the roots have two names: the test proves nothing")
	}
	for _, ca := range []*pki{old, next} {
		issuer := ca.below(nil)
		leaf := issuer.sign(leafTemplate("spiffe://example.org/a")).Leaf
		if _, err := rpc.VerifyPeer([]*x509.Certificate{leaf, issuer.cert}, pool, td, time.Now()); err != nil {
			t.Error(err)
		}
	}
}

// X509-9: a subject says nothing about who somebody is.
func TestSubjectIsNoIdentity(t *testing.T) {
	ca := newPKI(t)
	for _, path := range []string{"/a", "/b"} {
		template := leafTemplate("spiffe://example.org" + path)
		template.Subject = pkix.Name{CommonName: "spiffe://example.org/admin"}
		id, err := rpc.VerifyPeer([]*x509.Certificate{ca.sign(template).Leaf}, ca.pool(), td, time.Now())
		if err != nil || id.Path() != path {
			t.Errorf("%v, %v", id, err)
		}
	}
}

// ID-22: neither name nor key can be changed under a signature.
func TestChangedBytesBreakTheSignature(t *testing.T) {
	ca := newPKI(t)
	cert, other := ca.sign(leafTemplate("spiffe://example.org/web")).Leaf, ca.sign(leafTemplate("spiffe://example.org/web")).Leaf
	for name, swap := range map[string][2][]byte{
		"path":         {[]byte("/web"), []byte("/wed")},
		"trust domain": {[]byte("example.org"), []byte("example.com")},
		"key":          {cert.RawSubjectPublicKeyInfo, other.RawSubjectPublicKeyInfo},
	} {
		if bytes.Count(cert.Raw, swap[0]) != 1 {
			t.Fatalf("%s: not there once", name)
		}
		forged, err := x509.ParseCertificate(bytes.Replace(cert.Raw, swap[0], swap[1], 1))
		if err != nil {
			t.Fatal(err)
		}
		id, err := rpc.LeafID(forged)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := rpc.VerifyPeer([]*x509.Certificate{forged}, ca.pool(), id.TrustDomain(), time.Now()); fault.ReasonOf(err) != "svid_invalid" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// X509-11: who holds a signing key is not therefore somebody.
func TestSigningCertificateAuthenticatesNobody(t *testing.T) {
	root := newPKI(t)
	const name = "spiffe://example.org/assay/server"
	ca := root.below(func(c *x509.Certificate) {
		c.URIs = leafTemplate(name).URIs
		c.KeyUsage |= x509.KeyUsageDigitalSignature
	})
	signing := &tls.Certificate{Certificate: [][]byte{ca.cert.Raw}, PrivateKey: ca.key}
	leaf := root.sign(leafTemplate(name))
	trust := func() []*x509.Certificate { return []*x509.Certificate{root.cert} }
	for what, c := range map[string]struct {
		server, client *tls.Certificate
		ok             bool
	}{
		"leaves":               {leaf, leaf, true},
		"the server signs too": {signing, leaf, false},
		"the client signs too": {leaf, signing, false},
	} {
		client := rpc.ClientTLS(spiffeid.RequireFromString(name), trust, func() *tls.Certificate { return c.client })
		server := rpc.ServerTLS(func() (*tls.Certificate, error) { return c.server, nil }, root.roots)
		near, far := net.Pipe()
		clientErr := make(chan error, 1)
		go func() {
			conn, _, err := client.ClientHandshake(t.Context(), "", near)
			if err == nil {
				// In TLS 1.3 the server's verdict comes after the client's end.
				_, err = conn.Read(make([]byte, 1))
			}
			_ = near.Close()
			clientErr <- err
		}()
		conn, _, err := server.ServerHandshake(far)
		if err == nil {
			_, err = conn.Write([]byte("x"))
		}
		_ = far.Close()
		if theirs := <-clientErr; (err == nil && theirs == nil) != c.ok {
			t.Errorf("%s: the server says %v, the client %v", what, err, theirs)
		}
	}
}

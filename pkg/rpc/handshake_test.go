package rpc_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// authority makes one under p, of that name and for that key if it is
// not nil.
func (p *pki) authority(name string, public crypto.PublicKey, change func(*x509.Certificate)) *pki {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	if public == nil {
		public = key.Public()
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.cert, public, p.key)
	if err != nil {
		p.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return &pki{t: p.t, cert: cert, key: key}
}

// strangeKey is a certificate with a public key of a kind that nobody knows,
// or of one that nobody should use any more.
func strangeKey(t *testing.T, der []byte, algorithm asn1.ObjectIdentifier) []byte {
	t.Helper()
	type spki struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	key, err := asn1.Marshal(spki{pkix.AlgorithmIdentifier{Algorithm: algorithm}, asn1.BitString{Bytes: []byte{2, 1, 57}, BitLength: 24}})
	if err != nil {
		t.Fatal(err)
	}
	var outer, tbs []asn1.RawValue
	if _, err := asn1.Unmarshal(der, &outer); err != nil {
		t.Fatal(err)
	}
	if _, err := asn1.Unmarshal(outer[0].FullBytes, &tbs); err != nil {
		t.Fatal(err)
	}
	tbs[6] = asn1.RawValue{FullBytes: key} // version, serial, algorithm, issuer, validity, subject, key
	changed, err := asn1.Marshal(tbs)
	if err != nil {
		t.Fatal(err)
	}
	outer[0] = asn1.RawValue{FullBytes: changed}
	out, err := asn1.Marshal(outer)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// NEG-27: chains that are made to hurt end the handshake, whatever their shape;
// the server goes on, and an honest client is served after each of them.
func TestHandshakeRefusesChainsMadeToHurt(t *testing.T) {
	root := newPKI(t)
	issuer := root.authority("issuer", nil, nil)
	serverID := spiffeid.RequireFromString("spiffe://example.org/assay/server")
	serverCert := root.sign(leafTemplate(serverID.String()))
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	called := 0
	svc := &service{bundle: func(context.Context) (*agentv1.BundleResponse, error) {
		called++
		return &agentv1.BundleResponse{}, nil
	}}
	serve(t, rpc.ServerConfig{
		Name: "agents", Creds: rpc.ServerTLS(func() (*tls.Certificate, error) { return serverCert, nil }, root.roots),
		Methods: rpc.Methods{bundleMethod: rpc.Anyone},
	}, svc, lis)
	agent := func(change func(*x509.Certificate), more ...[]byte) *tls.Certificate {
		template := leafTemplate("spiffe://example.org/assay/agent/x")
		if change != nil {
			change(template)
		}
		leaf := issuer.sign(template)
		leaf.Certificate = append(leaf.Certificate, more...)
		return leaf
	}
	rsaKey := func(bits int) *rsa.PublicKey {
		n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
		return &rsa.PublicKey{N: n.Add(n, big.NewInt(0xabcdef1)), E: 65537}
	}
	// A chain of which each certificate has every other one as a possible issuer.
	var tangle [][]byte
	for range 3 {
		tangle = append(tangle, root.authority("issuer", nil, nil).cert.Raw)
	}
	constrained := root.authority("issuer", nil, func(c *x509.Certificate) {
		c.PermittedDNSDomains = slices.Repeat([]string{"example.com"}, 200)
		c.ExcludedDNSDomains = []string{""}
	})
	cases := map[string]*tls.Certificate{
		"100 issuers":        agent(nil, slices.Repeat([][]byte{issuer.cert.Raw}, 100)...),
		"RSA of 16384 bits":  agent(nil, root.authority("issuer", rsaKey(16384), nil).cert.Raw),
		"RSA of 8192 bits":   agent(nil, root.authority("issuer", rsaKey(8192), nil).cert.Raw),
		"DSA":                agent(nil, strangeKey(t, issuer.cert.Raw, asn1.ObjectIdentifier{1, 2, 840, 10040, 4, 1})),
		"a key nobody knows": agent(nil, strangeKey(t, issuer.cert.Raw, asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1})),
		"names and no order": agent(nil, root.cert.Raw, issuer.cert.Raw),
		"many possible ways": agent(nil, tangle...),
		"an authority":       agent(func(c *x509.Certificate) { c.IsCA = true }, issuer.cert.Raw),
		"two URIs": agent(func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/b"})
		}, issuer.cert.Raw),
		"not yet valid": agent(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }, issuer.cert.Raw),
		"no issuer":     agent(nil),
		"64 KB of names": agent(func(c *x509.Certificate) {
			c.DNSNames = slices.Repeat([]string{strings.Repeat("a", 60) + ".example"}, 900)
		}, constrained.cert.Raw),
		"an empty DNS name":   agent(func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{sanWithEmptyDNS(t)} }, constrained.cert.Raw),
		"an issuer that ends": agent(nil, root.authority("issuer", nil, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }).cert.Raw),
	}
	trust := func() []*x509.Certificate { return []*x509.Certificate{root.cert} }
	honest := agent(nil, issuer.cert.Raw)
	for name, leaf := range cases {
		before := called
		client := dial(t, lis.Addr().String(), rpc.ClientTLS(serverID, trust, func() *tls.Certificate { return leaf }))
		if _, err := client.Bundle(t.Context(), &agentv1.BundleRequest{}); err == nil || called != before {
			t.Errorf("%s: %v, %d calls", name, err, called-before)
		}
		good := dial(t, lis.Addr().String(), rpc.ClientTLS(serverID, trust, func() *tls.Certificate { return honest }))
		if _, err := good.Bundle(t.Context(), &agentv1.BundleRequest{}); err != nil {
			t.Fatalf("after %s an honest client is refused: %v", name, err)
		}
	}
	conn, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	old := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}})
	if err := old.HandshakeContext(t.Context()); err == nil {
		t.Error("TLS 1.2 was taken")
	}
}

func sanWithEmptyDNS(t *testing.T) pkix.Extension {
	t.Helper()
	der, err := asn1.Marshal([]asn1.RawValue{
		{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: nil},
		{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte("spiffe://example.org/assay/agent/x")},
	})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: der}
}

// NEG-27: crypto/x509 reads an extended key usage without any usage as none.
func TestEmptyExtendedKeyUsageIsRefused(t *testing.T) {
	ca := newPKI(t)
	template := leafTemplate("spiffe://example.org/a")
	template.ExtKeyUsage = nil
	template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Value: []byte{0x30, 0}}}
	leaf := ca.sign(template).Leaf
	if _, err := rpc.VerifyPeer([]*x509.Certificate{leaf}, ca.pool(), td, time.Now()); fault.ReasonOf(err) != "svid_invalid" {
		t.Errorf("got %v", err)
	}
}

package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// general encodes one GeneralName.
func general(tag byte, value string) []byte { return tlv(tag, []byte(value)) }

// sanOf encodes a SAN extension.
func sanOf(names ...[]byte) pkix.Extension {
	return pkix.Extension{Id: oidSubjectAltName, Value: tlv(tagSequence, names...)}
}

// namedCSR is a request for these names, as package x509 encodes one.
func namedCSR(t testing.TB, key crypto.Signer, names ...[]byte) []byte {
	t.Helper()
	return makeCSR(t, key, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{sanOf(names...)}})
}

// asking forges a request with attributes as they are given.
func asking(t testing.TB, key crypto.Signer, pub crypto.PublicKey, attributes ...[]byte) []byte {
	t.Helper()
	return forge(t, key, bareHead, spkiOf(t, pub), tlv(0xa0, attributes...))
}

// extensionRequest encodes the attribute that asks for extensions.
func extensionRequest(t testing.TB, all ...pkix.Extension) []byte {
	t.Helper()
	oid, err := asn1.Marshal(oidExtensionRequest)
	if err != nil {
		t.Fatal(err)
	}
	extensions, err := asn1.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	return tlv(tagSequence, oid, tlv(0x31, extensions))
}

const webURI = "spiffe://example.org/web"

func TestNamedCSRGivesKeyAndNames(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	uri, critical := general(tagURI, webURI), sanOf(general(tagURI, webURI))
	critical.Critical = true
	parsed := spiffeid.RequireFromString(webURI).URL()
	for name, c := range map[string]struct {
		key crypto.Signer
		der func(crypto.Signer) []byte
		dns []string
	}{
		"SPIRE's tool": {newKey(), func(k crypto.Signer) []byte {
			return makeCSR(t, k, x509.CertificateRequest{URIs: []*url.URL{parsed}, DNSNames: []string{"a.example", "b"}})
		}, []string{"a.example", "b"}},
		"no DNS names": {p384, func(k crypto.Signer) []byte { return namedCSR(t, k, uri) }, nil},
		"URI first": {rsaKey, func(k crypto.Signer) []byte {
			return namedCSR(t, k, uri, general(tagDNSName, "a.example"))
		}, []string{"a.example"}},
		"critical": {newKey(), func(k crypto.Signer) []byte {
			return makeCSR(t, k, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{critical}})
		}, nil},
	} {
		got, err := ParseNamedCSR(c.der(c.key))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got.ID.String() != webURI || !slices.Equal(got.DNSNames, c.dns) || !c.key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(got.PublicKey) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// NEG-1, NEG-4, NEG-7: what an operator's request may not hold.
func TestNamedCSRThatAsksForMoreIsRefused(t *testing.T) {
	key := newKey()
	uri, dns := general(tagURI, webURI), general(tagDNSName, "a.example")
	ext := func(oid asn1.ObjectIdentifier, value ...byte) pkix.Extension {
		return pkix.Extension{Id: oid, Critical: true, Value: value}
	}
	with := func(more ...pkix.Extension) []byte {
		return makeCSR(t, key, x509.CertificateRequest{ExtraExtensions: append([]pkix.Extension{sanOf(uri)}, more...)})
	}
	many := [][]byte{uri}
	for i := range 65 {
		many = append(many, general(tagDNSName, fmt.Sprintf("n%d.example", i)))
	}
	request := extensionRequest(t, sanOf(uri))
	oid := func(arcs ...int) []byte {
		der, err := asn1.Marshal(asn1.ObjectIdentifier(arcs))
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	password := tlv(tagSequence, oid(1, 2, 840, 113549, 1, 9, 7), tlv(0x31, tlv(0x0c, []byte("secret"))))
	// DER leaves a default value out.
	falseWritten := tlv(tagSequence, oid(oidExtensionRequest...), tlv(0x31, tlv(tagSequence,
		tlv(tagSequence, oid(oidSubjectAltName...), []byte{1, 1, 0}, tlv(tagOctetString, tlv(tagSequence, uri))))))
	cases := map[string]struct {
		der    []byte
		reason string
	}{
		"nothing":           {makeCSR(t, key, x509.CertificateRequest{}), "csr_spiffe_id_missing"},
		"DNS name only":     {namedCSR(t, key, dns), "csr_spiffe_id_missing"},
		"empty SAN":         {namedCSR(t, key), "csr_spiffe_id_missing"},
		"two URIs":          {namedCSR(t, key, uri, general(tagURI, "spiffe://example.org/other")), "csr_san_forbidden"},
		"the same twice":    {namedCSR(t, key, uri, uri), "csr_san_forbidden"},
		"IP address":        {namedCSR(t, key, uri, general(0x87, "\x0a\x00\x00\x01")), "csr_san_forbidden"},
		"e-mail":            {namedCSR(t, key, uri, general(0x81, "a@b")), "csr_san_forbidden"},
		"directory name":    {namedCSR(t, key, uri, tlv(0xa4, []byte{0x30, 0})), "csr_san_forbidden"},
		"other name":        {namedCSR(t, key, uri, tlv(0xa0, []byte{6, 1, 42})), "csr_san_forbidden"},
		"universal tag":     {namedCSR(t, key, uri, general(0x06, "a")), "csr_san_forbidden"},
		"compound URI":      {namedCSR(t, key, tlv(tagURI|0x20, uri)), "csr_san_forbidden"},
		"CN":                {makeCSR(t, key, x509.CertificateRequest{Subject: pkix.Name{CommonName: "web"}, ExtraExtensions: []pkix.Extension{sanOf(uri)}}), "csr_subject_forbidden"},
		"CA":                {with(ext(oidBasicConstraints, 0x30, 3, 1, 1, 0xff)), "csr_extension_forbidden"},
		"keyCertSign":       {with(ext(oidKeyUsage, 3, 2, 2, 4)), "csr_extension_forbidden"},
		"any EKU":           {with(ext(oidExtKeyUsage, 0x30, 6, 6, 4, 0x55, 0x1d, 0x25, 0)), "csr_extension_forbidden"},
		"unknown":           {with(ext(asn1.ObjectIdentifier{1, 2, 3}, 5, 0)), "csr_extension_forbidden"},
		"not the SAN":       {makeCSR(t, key, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{ext(asn1.ObjectIdentifier{1, 2, 3}, 5, 0)}}), "csr_extension_forbidden"},
		"SAN twice":         {asking(t, key, key.Public(), extensionRequest(t, sanOf(uri), sanOf(uri))), "csr_extension_forbidden"},
		"no extension":      {asking(t, key, key.Public(), extensionRequest(t)), "csr_extension_forbidden"},
		"asked twice":       {asking(t, key, key.Public(), request, request), "csr_extension_forbidden"},
		"password":          {asking(t, key, key.Public(), request, password), "csr_extension_forbidden"},
		"password only":     {asking(t, key, key.Public(), password), "csr_extension_forbidden"},
		"odd attribute":     {asking(t, key, key.Public(), tlv(0x0c, []byte("x"))), "csr_extension_forbidden"},
		"false is written":  {asking(t, key, key.Public(), falseWritten), "csr_malformed"},
		"SAN no sequence":   {makeCSR(t, key, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{ext(oidSubjectAltName, 5, 0)}}), "csr_malformed"},
		"SAN and more":      {makeCSR(t, key, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oidSubjectAltName, Value: append(tlv(tagSequence, uri), 5, 0)}}}), "csr_malformed"},
		"trailing byte":     {append(namedCSR(t, key, uri), 0), "csr_malformed"},
		"an element more":   {forge(t, key, bareHead, spkiOf(t, key.Public()), tlv(0xa0, request), []byte{5, 0}), "csr_malformed"},
		"empty":             {nil, "csr_malformed"},
		"too many names":    {namedCSR(t, key, many...), "dns_name_invalid"},
		"bad DNS name":      {namedCSR(t, key, uri, general(tagDNSName, "a..b")), "dns_name_invalid"},
		"numeric DNS name":  {namedCSR(t, key, uri, general(tagDNSName, "10.0.0.1")), "dns_name_invalid"},
		"same DNS name":     {namedCSR(t, key, uri, dns, general(tagDNSName, "A.example")), "dns_name_invalid"},
		"high bytes":        {namedCSR(t, key, uri, general(tagDNSName, "caf\xc3\xa9.example")), "dns_name_invalid"},
		"16 KiB":            {make([]byte, maxCSR+1), "csr_too_large"},
		"RSA 65536":         {asking(t, nil, &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 65535, 1), E: 65537}, request), "key_not_allowed"},
		"another's key":     {asking(t, newKey(), key.Public(), request), "csr_signature_invalid"},
		"signed by nobody":  {asking(t, nil, key.Public(), request), "csr_signature_invalid"},
		"a curve too small": {makeCSR(t, p224(t), x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256, ExtraExtensions: []pkix.Extension{sanOf(uri)}}), "key_not_allowed"},
	}
	for _, id := range []string{
		"", "web", "https://example.org/web", "spiffe://example.org/../web", "spiffe://example.org/a//b", "spiffe://example.org/web/",
		"spiffe://EXAMPLE.org/web", "spiffe://u@example.org/web", "spiffe://example.org:8443/web", "spiffe://example.org/%2e%2e/x",
		"spiffe://example.org/%zz", "spiffe://example.org/web?a", "spiffe://[fe80::1%25eth0]/web", "spiffe://example.org/web\x00",
		"spiffe://ex\xd0\xb0mple.org/web", "spiffe://example.org/" + strings.Repeat("a", 2048),
	} {
		cases["ID "+id] = struct {
			der    []byte
			reason string
		}{namedCSR(t, key, general(tagURI, id)), "spiffe_id_invalid"}
	}
	for name, c := range cases {
		_, err := ParseNamedCSR(c.der)
		if fault.ReasonOf(err) != c.reason || fault.KindOf(err) != fault.Invalid {
			t.Errorf("%.60q: got %v, want %s", name, err, c.reason)
		}
	}
}

func p224(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// What is minted is bound by the mark of what is handed out: nobody reports on
// it, and a rotation has to wait for its end.
func TestMintedCertificateIsUnderTheMarkOfWhatIsHandedOut(t *testing.T) {
	handedOut(t, Minted)
}

func TestMeshCertificateIsUnderTheMarkOfWhatIsHandedOut(t *testing.T) {
	handedOut(t, Mesh)
}

func handedOut(t *testing.T, kind Kind) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.open()
		start(t, a)
		before := w.storedMarks(a)
		req := workload("/web")
		req.Kind = kind
		leaf := issue(t, a, req)
		after := w.storedMarks(a)
		if !after.Stream.Equal(before.Stream) || !after.Own.Equal(before.Own) {
			t.Error("another mark was raised")
		}
		if after.Handed.Before(leaf.NotAfter) || !after.Handed.After(before.Handed) {
			t.Errorf("the certificate ends at %v, its mark is at %v", leaf.NotAfter, after.Handed)
		}
		shape, err := a.Profile(kind)
		if err != nil {
			t.Fatal(err)
		}
		if err := Lint(leaf, shape); err != nil {
			t.Error(err)
		}
	})
}

// wantSound holds what is accepted to its promise: one allowed key, one strict
// SPIFFE ID and DNS names, in the one form there is for them, signed by that
// key.
func wantSound(t *testing.T, der []byte) {
	t.Helper()
	got, err := ParseNamedCSR(der)
	if err != nil {
		if fault.KindOf(err) != fault.Invalid {
			t.Fatalf("refused with %v", err)
		}
		return
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatalf("accepted what package x509 refuses: %v", err)
	}
	// Package x509 sees the same, and nothing besides.
	if len(csr.URIs) != 1 || csr.URIs[0].String() != got.ID.String() || !slices.Equal(csr.DNSNames, got.DNSNames) {
		t.Fatalf("package x509 reads %v %v, we read %v %v", csr.URIs, csr.DNSNames, got.ID, got.DNSNames)
	}
	if len(csr.Subject.Names)+len(csr.IPAddresses)+len(csr.EmailAddresses) != 0 || len(csr.Extensions) != 1 {
		t.Fatal("accepted a request that asks for more")
	}
	if err := csr.CheckSignature(); err != nil {
		t.Fatalf("accepted a bad signature: %v", err)
	}
	if err := checkKey(got.PublicKey); err != nil {
		t.Fatalf("accepted a key that is not allowed: %v", err)
	}
	if again, err := spiffeid.FromString(got.ID.String()); err != nil || again != got.ID {
		t.Fatalf("go-spiffe refuses the ID: %v", err)
	}
}

func FuzzParseNamedCSR(f *testing.F) {
	key := newKey()
	uri := general(tagURI, webURI)
	f.Add(namedCSR(f, key, uri))
	f.Add(namedCSR(f, p384, general(tagDNSName, "a.example"), uri))
	f.Add(makeCSR(f, key, x509.CertificateRequest{}))
	f.Add(makeCSR(f, key, x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}, ExtraExtensions: []pkix.Extension{sanOf(uri)}}))
	f.Add(asking(f, key, key.Public(), extensionRequest(f, sanOf(uri), sanOf(uri))))
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(wantSound)
}

// FuzzNamesOfCSR gives the fuzzer what it can't reach by itself: a signature
// over the attributes that it makes up.
func FuzzNamesOfCSR(f *testing.F) {
	key := newKey()
	uri, dns := general(tagURI, webURI), general(tagDNSName, "a.example")
	f.Add(extensionRequest(f, sanOf(uri)))
	f.Add(extensionRequest(f, sanOf(dns, uri)))
	f.Add(extensionRequest(f, sanOf(uri), sanOf(uri)))
	f.Add(extensionRequest(f, sanOf(uri, general(0x87, "\x0a\x00\x00\x01"))))
	f.Fuzz(func(t *testing.T, attributes []byte) { wantSound(t, asking(t, key, key.Public(), attributes)) })
}

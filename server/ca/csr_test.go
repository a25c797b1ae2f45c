package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func makeCSR(t testing.TB, key crypto.Signer, template x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// forge assembles a request from raw parts, with a signature that is good for
// them if key is given, else garbage.
func forge(t testing.TB, key crypto.Signer, parts ...[]byte) []byte {
	t.Helper()
	info := tlv(tagSequence, parts...)
	signature := []byte("garbage")
	if key != nil {
		h := crypto.SHA256.New()
		h.Write(info)
		var err error
		if signature, err = key.Sign(rand.Reader, h.Sum(nil), crypto.SHA256); err != nil {
			t.Fatal(err)
		}
	}
	return tlv(tagSequence, info, derECDSAWithSHA256, tlv(tagBitString, derZero, signature))
}

func spkiOf(t testing.TB, pub crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestBareCSRGivesItsKey(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{newKey(), p384, rsaKey} {
		got, err := ParseCSR(makeCSR(t, key, x509.CertificateRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		if !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(got) {
			t.Error("another key came out")
		}
	}
	pss := makeCSR(t, rsaKey, x509.CertificateRequest{SignatureAlgorithm: x509.SHA256WithRSAPSS})
	if _, err := ParseCSR(pss); err != nil {
		t.Errorf("RSA-PSS signature: %v", err)
	}
}

// I2, ID-26, NEG-3, NEG-4
func TestCSRThatAsksForAnythingIsRefused(t *testing.T) {
	key := newKey()
	uri := func(s string) []*url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return []*url.URL{u}
	}
	ext := func(all ...pkix.Extension) x509.CertificateRequest {
		return x509.CertificateRequest{ExtraExtensions: all}
	}
	ca := pkix.Extension{Id: oidBasicConstraints, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}
	spki := spkiOf(t, key.Public())
	attribute := func(oid asn1.ObjectIdentifier, value []byte) []byte {
		der, err := asn1.Marshal(oid)
		if err != nil {
			t.Fatal(err)
		}
		return tlv(0xa0, tlv(tagSequence, der, tlv(0x31, value)))
	}
	extension, err := asn1.Marshal(ca)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		der    []byte
		reason string
	}{
		"server's SPIFFE ID": {makeCSR(t, key, x509.CertificateRequest{URIs: uri("spiffe://example.org/assay/server")}), "csr_san_forbidden"},
		"another workload":   {makeCSR(t, key, x509.CertificateRequest{URIs: uri("spiffe://example.org/other")}), "csr_san_forbidden"},
		"DNS name":           {makeCSR(t, key, x509.CertificateRequest{DNSNames: []string{"web"}}), "csr_san_forbidden"},
		"IP address":         {makeCSR(t, key, x509.CertificateRequest{IPAddresses: []net.IP{{10, 0, 0, 1}}}), "csr_san_forbidden"},
		"e-mail":             {makeCSR(t, key, x509.CertificateRequest{EmailAddresses: []string{"a@b"}}), "csr_san_forbidden"},
		"SAN among others":   {makeCSR(t, key, ext(ca, uris("spiffe://example.org/x"))), "csr_san_forbidden"},
		"CN":                 {makeCSR(t, key, x509.CertificateRequest{Subject: pkix.Name{CommonName: "web"}}), "csr_subject_forbidden"},
		"OU and SAN":         {makeCSR(t, key, x509.CertificateRequest{Subject: pkix.Name{OrganizationalUnit: []string{"x"}}, DNSNames: []string{"web"}}), "csr_subject_forbidden"},
		"CA":                 {makeCSR(t, key, ext(ca)), "csr_extension_forbidden"},
		"keyCertSign":        {makeCSR(t, key, ext(pkix.Extension{Id: oidKeyUsage, Critical: true, Value: []byte{3, 2, 2, 4}})), "csr_extension_forbidden"},
		"any EKU":            {makeCSR(t, key, ext(pkix.Extension{Id: oidExtKeyUsage, Value: []byte{0x30, 6, 6, 4, 0x55, 0x1d, 0x25, 0}})), "csr_extension_forbidden"},
		"unknown, critical":  {makeCSR(t, key, ext(pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})), "csr_extension_forbidden"},
		"extension twice":    {forge(t, key, bareHead, spki, attribute(oidExtensionRequest, tlv(tagSequence, extension, extension))), "csr_extension_forbidden"},
		"challenge password": {forge(t, key, bareHead, spki, attribute(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}, tlv(0x0c, []byte("secret")))), "csr_extension_forbidden"},
		"empty extensions":   {forge(t, key, bareHead, spki, attribute(oidExtensionRequest, tlv(tagSequence))), "csr_extension_forbidden"},
		"odd attribute":      {forge(t, key, bareHead, spki, tlv(0xa0, tlv(0x0c, []byte("x")))), "csr_extension_forbidden"},
	} {
		if _, err := ParseCSR(c.der); fault.ReasonOf(err) != c.reason || fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: got %v, want %s", name, err, c.reason)
		}
	}
	// Nothing of it is in the next certificate.
	a := newWorld(t).open()
	pub, err := ParseCSR(makeCSR(t, key, x509.CertificateRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	req := workload("/web")
	req.PublicKey = pub
	if leaf := issue(t, a, req); len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 || leaf.IsCA || len(leaf.URIs) != 1 {
		t.Error("the certificate has names that nobody gave it")
	}
}

// NEG-7: nothing of this costs memory or time, and nothing goes on afterwards.
func TestMalformedCSRIsRefused(t *testing.T) {
	key := newKey()
	good := makeCSR(t, key, x509.CertificateRequest{})
	spki := spkiOf(t, key.Public())
	nested := func(depth int) []byte {
		der := []byte{}
		for range depth {
			der = tlv(tagSequence, der)
		}
		return der
	}
	pemText := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good})
	for name, der := range map[string][]byte{
		"nothing":              nil,
		"a zero":               {0},
		"cut":                  good[:len(good)-1],
		"trailing byte":        append(bytes.Clone(good), 0),
		"two of them":          append(bytes.Clone(good), good...),
		"PEM":                  pemText,
		"two PEM blocks":       append(bytes.Clone(pemText), pemText...),
		"indefinite length":    append(append([]byte{0x30, 0x80}, good[4:]...), 0, 0),
		"long form of length":  append([]byte{0x30, 0x83, 0x00}, good[2:]...),
		"version 1":            forge(t, key, []byte{0x02, 0x01, 0x01, 0x30, 0x00}, spki, bareTail),
		"no attributes":        forge(t, key, bareHead, spki), // RFC 2986: not optional
		"no key":               forge(t, key, bareHead, bareTail),
		"an element too many":  tlv(tagSequence, append(bytes.Clone(good[3:]), 0x05, 0x00)),
		"in the info":          forge(t, key, bareHead, spki, bareTail, []byte{0x05, 0x00}),
		"deep":                 nested(4000),
		"half of a PEM, often": bytes.Repeat([]byte("-----BEGIN CERTIFICATE REQUEST-----\n"), maxCSR/37),
		"zeros":                make([]byte, maxCSR),
	} {
		began := time.Now()
		_, err := ParseCSR(der)
		if fault.ReasonOf(err) != "csr_malformed" {
			t.Errorf("%s: got %v", name, err)
		}
		if took := time.Since(began); took > 20*time.Second { // milliseconds, on a machine of one's own
			t.Errorf("%s: took %v", name, took)
		}
	}
	// What is deeper, or has more names, is longer than is looked at.
	manyNames := make([]string, 10_000)
	for i := range manyNames {
		manyNames[i] = strings.Repeat("a", 1+i%5)
	}
	for name, der := range map[string][]byte{
		"100 000 levels": bytes.Repeat([]byte{tagSequence, 0x82, 0xff, 0xff}, 100_000),
		"10 000 names":   makeCSR(t, key, x509.CertificateRequest{DNSNames: manyNames}),
	} {
		if _, err := ParseCSR(der); fault.ReasonOf(err) != "csr_too_large" {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// NEG-5, L-8: what would cost seconds to verify is refused for its size or its
// key. The signatures here are garbage, so a check of the signature that came
// first would give itself away by its reason.
func TestExpensiveCSRIsRefusedBeforeItsSignature(t *testing.T) {
	rsaSPKI := func(bits int) []byte {
		n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
		return spkiOf(t, &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: 65537})
	}
	// 10 000 names don't fit, 1 500 do.
	names := make([]string, 1500)
	for i := range names {
		names[i] = strings.Repeat("a", 1+i%5)
	}
	for name, c := range map[string]struct {
		der    []byte
		reason string
	}{
		"RSA 32768, 8 KB":    {forge(t, nil, bareHead, rsaSPKI(32768), bareTail), "key_not_allowed"},
		"RSA 65536":          {forge(t, nil, bareHead, rsaSPKI(65536), bareTail), "key_not_allowed"},
		"RSA 524288, 131 KB": {forge(t, nil, bareHead, rsaSPKI(524288), bareTail), "csr_too_large"},
		"4 MB":               {make([]byte, 4<<20), "csr_too_large"},
		"one byte over":      {make([]byte, maxCSR+1), "csr_too_large"},
		"many names":         {makeCSR(t, newKey(), x509.CertificateRequest{DNSNames: names}), "csr_san_forbidden"},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := ParseCSR(c.der)
		runtime.ReadMemStats(&after)
		if fault.ReasonOf(err) != c.reason {
			t.Errorf("%s: got %v, want %s", name, err, c.reason)
		}
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 16<<20 {
			t.Errorf("%s: allocated %d bytes", name, grown)
		}
	}
}

// NEG-6
func TestCSRWithAKeyThatIsNotAllowed(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := spkiOf(t, newKey().Public())
	off := bytes.Clone(good)
	off[len(off)-1] ^= 1
	infinity := bytes.Clone(good)
	copy(infinity[len(infinity)-64:], make([]byte, 64))
	oid := func(arcs ...int) []byte {
		der, err := asn1.Marshal(asn1.ObjectIdentifier(arcs))
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	foreign := func(alg []byte) []byte {
		return tlv(tagSequence, tlv(tagSequence, alg), tlv(tagBitString, derZero, make([]byte, 57)))
	}
	for name, der := range map[string][]byte{
		"Ed25519":           makeCSR(t, ed, x509.CertificateRequest{}),
		"P-224":             makeCSR(t, p224, x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256}),
		"P-521":             makeCSR(t, p521, x509.CertificateRequest{}),
		"off the curve":     forge(t, nil, bareHead, off, bareTail),
		"infinity":          forge(t, nil, bareHead, infinity, bareTail),
		"Ed448":             forge(t, nil, bareHead, foreign(oid(1, 3, 101, 113)), bareTail),
		"DSA":               forge(t, nil, bareHead, foreign(oid(1, 2, 840, 10040, 4, 1)), bareTail),
		"unknown algorithm": forge(t, nil, bareHead, foreign(oid(1, 2, 3, 4)), bareTail),
		"RSA 1024":          forge(t, nil, bareHead, spkiOf(t, &rsa.PublicKey{N: odd(t, 1024), E: 65537}), bareTail),
		"RSA e=1":           forge(t, nil, bareHead, spkiOf(t, &rsa.PublicKey{N: odd(t, 2048), E: 1}), bareTail),
		"RSA ROCA":          forge(t, nil, bareHead, spkiOf(t, &rsa.PublicKey{N: roca(t), E: 65537}), bareTail),
	} {
		if _, err := ParseCSR(der); fault.ReasonOf(err) != "key_not_allowed" || fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// NEG-6
func TestCSRMustBeSignedByItsKey(t *testing.T) {
	key := newKey()
	spki := spkiOf(t, key.Public())
	good := makeCSR(t, key, x509.CertificateRequest{})
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1

	info := tlv(tagSequence, bareHead, spki, bareTail)
	digest := sha1.Sum(info)
	old, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	ecdsaWithSHA1 := []byte{0x30, 0x09, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01}
	for name, der := range map[string][]byte{
		"flipped":        flipped,
		"garbage":        forge(t, nil, bareHead, spki, bareTail),
		"by another key": forge(t, newKey(), bareHead, spki, bareTail),
		"SHA-1":          tlv(tagSequence, info, ecdsaWithSHA1, tlv(tagBitString, derZero, old)),
	} {
		if _, err := ParseCSR(der); fault.ReasonOf(err) != "csr_signature_invalid" || fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: got %v", name, err)
		}
		if _, err := ParseCSR(der); err != nil && bytes.Contains([]byte(err.Error()), der[4:40]) {
			t.Errorf("%s: the error quotes the request", name)
		}
	}
}

// What is accepted holds nothing but a key that is allowed, in the one form
// there is for it, and is signed by it.
func FuzzParseCSR(f *testing.F) {
	key := newKey()
	f.Add(makeCSR(f, key, x509.CertificateRequest{}))
	f.Add(makeCSR(f, p384, x509.CertificateRequest{}))
	f.Add(makeCSR(f, key, x509.CertificateRequest{DNSNames: []string{"web"}, Subject: pkix.Name{CommonName: "x"}}))
	f.Add(forge(f, key, bareHead, spkiOf(f, key.Public())))
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, der []byte) {
		pub, err := ParseCSR(der)
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
		if len(csr.Subject.Names)+len(csr.Extensions)+len(csr.DNSNames)+len(csr.URIs)+len(csr.IPAddresses)+len(csr.EmailAddresses) != 0 {
			t.Fatal("accepted a request that asks for something")
		}
		// Attributes that are no extensions show in the encoding, below.
		if err := csr.CheckSignature(); err != nil {
			t.Fatalf("accepted a bad signature: %v", err)
		}
		if err := checkKey(pub); err != nil {
			t.Fatalf("accepted a key that is not allowed: %v", err)
		}
		algorithm, err := asn1.Marshal(algorithmOf(t, der))
		if err != nil {
			t.Fatal(err)
		}
		spki := csr.RawSubjectPublicKeyInfo
		signature := tlv(tagBitString, derZero, csr.Signature)
		if !bytes.Equal(der, tlv(tagSequence, tlv(tagSequence, bareHead, spki, bareTail), algorithm, signature)) {
			t.Fatalf("accepted another encoding: %x", der)
		}
	})
}

func algorithmOf(t *testing.T, der []byte) pkix.AlgorithmIdentifier {
	t.Helper()
	var raw struct {
		Info      asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &raw); err != nil {
		t.Fatal(err)
	}
	return raw.Algorithm
}

package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net"
	"net/url"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

var sleep = spiffeid.RequireFromString("spiffe://example.org/ns/foo/sa/sleep")

func inPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: csrBlock, Bytes: der})
}

// sidecarCSR is a request as istio-agent makes it: an organization that is
// empty, and the one URI, critical.
func sidecarCSR(t testing.TB, key crypto.Signer, uri string) []byte {
	t.Helper()
	san := sanOf(general(tagURI, uri))
	san.Critical = true
	return makeCSR(t, key, x509.CertificateRequest{
		Subject: pkix.Name{Organization: []string{""}}, ExtraExtensions: []pkix.Extension{san},
	})
}

func rsaKey(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// CA-01, CA-02, CA-03: what the proxies of Istio send.
func TestMeshCSRGivesTheKey(t *testing.T) {
	p256 := newKey()
	for name, c := range map[string]struct {
		key  crypto.Signer
		text func(crypto.Signer) []byte
	}{
		"sidecar, RSA 2048": {rsaKey(t, 2048), func(k crypto.Signer) []byte { return inPEM(sidecarCSR(t, k, sleep.String())) }},
		"sidecar, RSA 4096": {rsaKey(t, 4096), func(k crypto.Signer) []byte { return inPEM(sidecarCSR(t, k, sleep.String())) }},
		"sidecar, P-256":    {p256, func(k crypto.Signer) []byte { return inPEM(sidecarCSR(t, k, sleep.String())) }},
		"sidecar, P-384":    {p384, func(k crypto.Signer) []byte { return inPEM(sidecarCSR(t, k, sleep.String())) }},
		"ztunnel":           {p256, func(k crypto.Signer) []byte { return inPEM(namedCSR(t, k, general(tagURI, sleep.String()))) }},
		"no name at all":    {p256, func(k crypto.Signer) []byte { return inPEM(makeCSR(t, k, x509.CertificateRequest{})) }},
		"organization, no name": {p256, func(k crypto.Signer) []byte {
			return inPEM(makeCSR(t, k, x509.CertificateRequest{Subject: pkix.Name{Organization: []string{""}}}))
		}},
		"organization in UTF-8": {p256, func(k crypto.Signer) []byte {
			return inPEM(makeCSR(t, k, x509.CertificateRequest{RawSubject: emptyOrganizations[1]}))
		}},
		"blank lines around it": {p256, func(k crypto.Signer) []byte {
			return append(append([]byte("\n\n"), inPEM(sidecarCSR(t, k, sleep.String()))...), " \r\n"...)
		}},
	} {
		got, err := ParseMeshCSR(c.text(c.key), sleep)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !c.key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(got) {
			t.Errorf("%s: another key", name)
		}
	}
}

// CA-02, CA-04, CA-05, NEG-4: what it may not hold. The order of the reasons is
// that of the costs: the key before its signature.
func TestMeshCSRThatAsksForMoreIsRefused(t *testing.T) {
	key := newKey()
	uri := general(tagURI, sleep.String())
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	with := func(template x509.CertificateRequest, names ...[]byte) []byte {
		if len(names) > 0 {
			template.ExtraExtensions = append([]pkix.Extension{sanOf(names...)}, template.ExtraExtensions...)
		}
		return inPEM(makeCSR(t, key, template))
	}
	ext := func(oid asn1.ObjectIdentifier, value ...byte) x509.CertificateRequest {
		return x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oid, Critical: true, Value: value}}}
	}
	good := sidecarCSR(t, key, sleep.String())
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	parsed := sleep.URL()
	for name, c := range map[string]struct {
		text []byte
		want string
	}{
		"another account":       {inPEM(sidecarCSR(t, key, "spiffe://example.org/ns/foo/sa/admin")), "csr_identity_mismatch"},
		"another namespace":     {inPEM(sidecarCSR(t, key, "spiffe://example.org/ns/kube-system/sa/sleep")), "csr_identity_mismatch"},
		"another trust domain":  {inPEM(sidecarCSR(t, key, "spiffe://other.org/ns/foo/sa/sleep")), "csr_identity_mismatch"},
		"longer":                {inPEM(sidecarCSR(t, key, sleep.String()+"/x")), "csr_identity_mismatch"},
		"percent":               {inPEM(sidecarCSR(t, key, "spiffe://example.org/ns/foo/sa%2Fsleep")), "spiffe_id_invalid"},
		"upper case":            {inPEM(sidecarCSR(t, key, "SPIFFE://example.org/ns/foo/sa/sleep")), "spiffe_id_invalid"},
		"no URI":                {inPEM(sidecarCSR(t, key, "")), "spiffe_id_invalid"},
		"two URIs":              {with(x509.CertificateRequest{}, uri, uri), "csr_san_forbidden"},
		"DNS name beside":       {with(x509.CertificateRequest{}, uri, general(tagDNSName, "web")), "csr_san_forbidden"},
		"DNS name alone":        {with(x509.CertificateRequest{}, general(tagDNSName, "web")), "csr_spiffe_id_missing"},
		"IP address":            {with(x509.CertificateRequest{URIs: []*url.URL{parsed}, IPAddresses: []net.IP{{192, 0, 2, 1}}}), "csr_san_forbidden"},
		"email":                 {with(x509.CertificateRequest{URIs: []*url.URL{parsed}, EmailAddresses: []string{"a@b"}}), "csr_san_forbidden"},
		"common name":           {with(x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}}, uri), "csr_subject_forbidden"},
		"organization":          {with(x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"system:masters"}}}, uri), "csr_subject_forbidden"},
		"two organizations":     {with(x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"", ""}}}, uri), "csr_subject_forbidden"},
		"CA":                    {with(ext(oidBasicConstraints, 0x30, 0x03, 0x01, 0x01, 0xff), uri), "csr_extension_forbidden"},
		"keyCertSign":           {with(ext(oidKeyUsage, 0x03, 0x02, 0x02, 0x04), uri), "csr_extension_forbidden"},
		"any extended usage":    {with(ext(oidExtKeyUsage, 0x30, 0x06, 0x06, 0x04, 0x55, 0x1d, 0x25, 0x00), uri), "csr_extension_forbidden"},
		"unknown extension":     {with(ext(asn1.ObjectIdentifier{1, 2, 3, 4}, 5, 0), uri), "csr_extension_forbidden"},
		"SAN twice":             {with(ext(oidSubjectAltName, tlv(tagSequence, uri)...), uri), "csr_extension_forbidden"},
		"RSA 1024":              {inPEM(forge(t, nil, bareHead, spkiOf(t, &rsa.PublicKey{N: odd(t, 1024), E: 65537}), bareTail)), "key_not_allowed"},
		"RSA 8192":              {inPEM(forge(t, nil, bareHead, spkiOf(t, &rsa.PublicKey{N: odd(t, 8192), E: 65537}), bareTail)), "key_not_allowed"},
		"P-224":                 {inPEM(sidecarCSR(t, p224, sleep.String())), "key_not_allowed"},
		"bad signature":         {inPEM(flipped), "csr_signature_invalid"},
		"by another key":        {inPEM(forge(t, newKey(), bareHead, spkiOf(t, key.Public()), bareTail)), "csr_signature_invalid"},
		"empty":                 {nil, "csr_malformed"},
		"garbage":               {[]byte("garbage"), "csr_malformed"},
		"DER":                   {good, "csr_malformed"},
		"two blocks":            {append(inPEM(good), inPEM(good)...), "csr_malformed"},
		"text before":           {append([]byte("x\n"), inPEM(good)...), "csr_malformed"},
		"text behind":           {append(inPEM(good), 'x'), "csr_malformed"},
		"certificate":           {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: good}), "csr_malformed"},
		"headers":               {pem.EncodeToMemory(&pem.Block{Type: csrBlock, Headers: map[string]string{"a": "b"}, Bytes: good}), "csr_malformed"},
		"garbage in PEM":        {inPEM([]byte("garbage")), "csr_malformed"},
		"1 MB":                  {inPEM(make([]byte, 1<<20)), "csr_too_large"},
		"1 MB of dashes":        {[]byte(strings.Repeat("-----BEGIN ", 1<<16)), "csr_too_large"},
		"a little too large":    {inPEM(make([]byte, maxCSR+1)), "csr_too_large"},
		"as large as it may be": {inPEM(make([]byte, maxCSR)), "csr_malformed"},
	} {
		if _, err := ParseMeshCSR(c.text, sleep); fault.ReasonOf(err) != c.want || fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: got %v, want %s", name, err, c.want)
		}
	}
}

// What is accepted names the caller or nobody, and is signed by a key that is
// allowed, whatever the bytes. // NEG-4
func FuzzParseMeshCSR(f *testing.F) {
	key := newKey()
	f.Add(sidecarCSR(f, key, sleep.String()), true)
	f.Add(sidecarCSR(f, key, "spiffe://example.org/ns/foo/sa/other"), true)
	f.Add(makeCSR(f, key, x509.CertificateRequest{}), true)
	f.Add(inPEM(makeCSR(f, key, x509.CertificateRequest{})), false)
	f.Fuzz(func(t *testing.T, data []byte, wrap bool) {
		text := data
		if wrap {
			text = inPEM(data)
		}
		pub, err := ParseMeshCSR(text, sleep)
		if err != nil {
			if fault.KindOf(err) != fault.Invalid {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		block, _ := pem.Decode(bytes.TrimSpace(text))
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			t.Fatalf("accepted what package x509 refuses: %v", err)
		}
		for _, named := range csr.Subject.Names {
			if named.Value != "" {
				t.Fatalf("accepted the subject %v", csr.Subject)
			}
		}
		for _, uri := range csr.URIs {
			if uri.String() != sleep.String() {
				t.Fatalf("accepted the name %v", uri)
			}
		}
		if len(csr.URIs) > 1 || len(csr.Extensions) > 1 || len(csr.DNSNames)+len(csr.IPAddresses)+len(csr.EmailAddresses) != 0 {
			t.Fatal("accepted a request that asks for more than its name")
		}
		if err := csr.CheckSignature(); err != nil {
			t.Fatalf("accepted a bad signature: %v", err)
		}
		if err := checkKey(pub); err != nil {
			t.Fatalf("accepted a key that is not allowed: %v", err)
		}
	})
}

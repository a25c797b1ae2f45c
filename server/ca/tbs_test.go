package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// standard has package x509 encode what tbs encodes.
func standard(t testing.TB, l *planned, iss *issuer) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: l.serial.bigInt(), NotBefore: l.notBefore, NotAfter: l.notAfter,
		DNSNames: l.dnsNames, IPAddresses: ips(l.ipAddresses), URIs: []*url.URL{l.id.URL()},
		SignatureAlgorithm: x509.ECDSAWithSHA256, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, MaxPathLen: -1, SubjectKeyId: l.spkiHash[:20],
	}
	if l.cluster != "" {
		template.Subject = pkix.Name{OrganizationalUnit: []string{l.cluster}}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, iss.cert, l.req.PublicKey, iss.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func ips(addresses []netip.Addr) []net.IP {
	var out []net.IP
	for _, a := range addresses {
		out = append(out, a.AsSlice())
	}
	return out
}

func testIssuer(t testing.TB) (*issuer, *profiles) {
	t.Helper()
	b := newBenchPKI(t)
	iss, err := newIssuer(b.issuer, b.issKey, "", b.root.NotAfter, &b.p)
	if err != nil {
		t.Fatal(err)
	}
	return iss, &b.p
}

// compare signs l and checks that the result is what package x509 would have
// signed, to the byte, and that it stands the lints and the issuer's key.
func compare(t testing.TB, l planned, iss *issuer, p *profiles) {
	t.Helper()
	b := batch{issuer: iss, items: []planned{l}}
	b.sign()
	if err := b.items[0].err; err != nil {
		t.Fatal(err)
	}
	got, err := x509.ParseCertificate(b.items[0].der)
	if err != nil {
		t.Fatal(err)
	}
	want := standard(t, &l, iss)
	if !bytes.Equal(got.RawTBSCertificate, want.RawTBSCertificate) {
		t.Fatalf("encoded\n%x\npackage x509 encodes\n%x", got.RawTBSCertificate, want.RawTBSCertificate)
	}
	// Around the TBS there is nothing but algorithm and signature.
	if want := tlv(tagSequence, got.RawTBSCertificate, derECDSAWithSHA256, tlv(tagBitString, derZero, got.Signature)); !bytes.Equal(want, got.Raw) {
		t.Fatalf("the outer encoding is %x", got.Raw)
	}
	if err := got.CheckSignatureFrom(iss.cert); err != nil {
		t.Fatal(err)
	}
	if err := Lint(got, p.leaf[l.req.Kind]); err != nil {
		t.Fatal(err)
	}
}

func TestEncodingIsThatOfPackageX509(t *testing.T) {
	iss, p := testIssuer(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	draw := &serials{random: rand.Reader}
	for _, pub := range []crypto.PublicKey{newKey().Public(), p384.Public(), rsaKey.Public()} {
		for _, cluster := range []string{"", "prod", "prod_eu*", "Zürich", strings.Repeat("ü", 64)} {
			// Lengths on both sides of each step of the DER length.
			for _, path := range []string{"/w", "/" + strings.Repeat("a", 100), "/" + strings.Repeat("a", 127), "/" + strings.Repeat("a", 255), "/" + strings.Repeat("a", 2027)} {
				for _, dns := range [][]string{nil, {"web"}, {"web.example", "*.example"}} {
					req := X509Request{ID: spiffeid.RequireFromPath(example, path), PublicKey: pub, Cluster: cluster, DNSNames: dns}
					l := p.plan(req, iss.cert, time.Now())
					if l.err != nil {
						t.Fatal(l.err)
					}
					if l.serial, err = draw.next(); err != nil {
						t.Fatal(err)
					}
					compare(t, l, iss, p)
				}
			}
		}
	}
}

func TestServersAloneHaveIPAddresses(t *testing.T) {
	iss, p := testIssuer(t)
	addresses := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	for _, dns := range [][]string{nil, {"ca.example"}} {
		req := serverRequest()
		req.IPAddresses, req.DNSNames = addresses, dns
		l := p.plan(req, iss.cert, time.Now())
		if l.err != nil {
			t.Fatal(l.err)
		}
		l.serial = serial{0x40, 1}
		compare(t, l, iss, p)
	}
	refused := map[string]X509Request{"a workload": workload("/w"), "no address": serverRequest(), "mapped": serverRequest(), "zoned": serverRequest()}
	for name, list := range map[string][]netip.Addr{
		"a workload": addresses, "no address": {{}}, "mapped": {netip.MustParseAddr("::ffff:192.0.2.1")}, "zoned": {netip.MustParseAddr("fe80::1%eth0")},
	} {
		req := refused[name]
		req.IPAddresses = list
		if got := fault.ReasonOf(p.plan(req, iss.cert, time.Now()).err); got != "ip_address_invalid" {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// RFC 5280 section 4.1.2.5: the year's form changes in 2050.
func TestTimesChangeTheirFormIn2050(t *testing.T) {
	iss, p := testIssuer(t)
	for _, at := range []string{"2049-12-31T23:59:59Z", "2050-01-01T00:00:00Z", "1950-01-01T00:00:00Z", "1949-12-31T23:59:59Z", "2318-05-05T05:05:05Z"} {
		when, err := time.Parse(time.RFC3339, at)
		if err != nil {
			t.Fatal(err)
		}
		req := workload("/w")
		spki, err := x509.MarshalPKIXPublicKey(req.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		l := planned{req: req, id: req.ID, spki: spki, spkiHash: sha256.Sum256(spki), serial: serial{0x40, 1}, notBefore: when.Add(-time.Hour), notAfter: when}
		compare(t, l, iss, p)
	}
}

func FuzzEncodingIsThatOfPackageX509(f *testing.F) {
	iss, p := testIssuer(f)
	keys := []crypto.PublicKey{newKey().Public(), p384.Public()}
	f.Add("/web", "", "", uint8(0), []byte{1}, int64(0))
	f.Add("/ns/a/sa/b", "Zürich", "web.example,*.web.example", uint8(1), bytes.Repeat([]byte{0xff}, 16), int64(time.Minute))
	f.Add("/"+strings.Repeat("x", 300), "a b'()+,-./:=?", "a", uint8(2), []byte{}, int64(time.Hour))
	f.Fuzz(func(t *testing.T, path, cluster, dns string, key uint8, number []byte, ttl int64) {
		id, err := spiffeid.FromPath(example, path)
		if err != nil {
			return
		}
		req := X509Request{Kind: Workload, ID: id, PublicKey: keys[int(key)%len(keys)], Cluster: cluster, TTL: time.Duration(ttl)}
		if dns != "" {
			req.DNSNames = strings.Split(dns, ",")
		}
		l := p.plan(req, iss.cert, time.Now())
		if l.err != nil {
			return
		}
		copy(l.serial[:], number)
		l.serial[0] = l.serial[0]&0x3f | 0x40
		compare(t, l, iss, p)
	})
}

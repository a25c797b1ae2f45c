package rpc_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
)

// rawSAN puts names into the extension byte by byte, as net/url would not.
func rawSAN(names ...string) pkix.Extension {
	var values []asn1.RawValue
	for _, n := range names {
		values = append(values, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(n)})
	}
	der, err := asn1.Marshal(values)
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: der}
}

// X509-2, X509-3, X509-5, X509-12, X509-33, X509-35, ID-3, ID-5, ID-11, ID-18,
// ID-24, D-1, WL-32, PLAN-1.
func TestVerifyPeerRefusesWhatIsNoX509SVID(t *testing.T) {
	ca, foreign := newPKI(t), newPKI(t)
	cases := map[string]func(*x509.Certificate){
		"no URI":    func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"a.example"} },
		"two URIs":  func(c *x509.Certificate) { c.URIs = append(c.URIs, &url.URL{Scheme: "https", Host: "x"}) },
		"https URI": func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "https", Host: "x", Path: "/a"}} },
		"root path": func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org"}} },
		"upper-case scheme": func(c *x509.Certificate) {
			c.URIs, c.ExtraExtensions = nil, []pkix.Extension{rawSAN("SPIFFE://example.org/a")}
		},
		"upper-case trust domain": func(c *x509.Certificate) {
			c.URIs, c.ExtraExtensions = nil, []pkix.Extension{rawSAN("spiffe://EXAMPLE.org/a")}
		},
		"bare fragment": func(c *x509.Certificate) {
			c.URIs, c.ExtraExtensions = nil, []pkix.Extension{rawSAN("spiffe://example.org/a#")}
		},
		"bare query": func(c *x509.Certificate) {
			c.URIs, c.ExtraExtensions = nil, []pkix.Extension{rawSAN("spiffe://example.org/a?")}
		},
		"too long":            func(c *x509.Certificate) { c.URIs[0].Path = "/" + strings.Repeat("a", 2030) },
		"other trust domain":  func(c *x509.Certificate) { c.URIs[0].Host = "example.com" },
		"CA":                  func(c *x509.Certificate) { c.IsCA = true },
		"keyCertSign":         func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"cRLSign":             func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign },
		"no digitalSignature": func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment },
		"no key usage":        func(c *x509.Certificate) { c.KeyUsage = 0 },
		"only serverAuth":     func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] },
		"not yet valid":       func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) },
		"unknown critical": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		},
	}
	for name, mutate := range cases {
		template := leafTemplate("spiffe://example.org/a")
		mutate(template)
		leaf := ca.sign(template).Leaf
		if _, err := rpc.VerifyPeer([]*x509.Certificate{leaf}, ca.pool(), td, time.Now()); fault.ReasonOf(err) != "svid_invalid" {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := ca.sign(leafTemplate("spiffe://example.org/a")).Leaf
	if _, err := rpc.VerifyPeer([]*x509.Certificate{good}, foreign.pool(), td, time.Now()); fault.ReasonOf(err) != "svid_invalid" {
		t.Errorf("foreign root: %v", err)
	}
	if _, err := rpc.VerifyPeer([]*x509.Certificate{good, good}, ca.pool(), td, time.Now()); fault.ReasonOf(err) != "svid_invalid" {
		t.Errorf("a leaf as intermediate: %v", err)
	}
	if _, err := rpc.VerifyPeer([]*x509.Certificate{good, ca.cert, ca.cert, ca.cert, ca.cert}, ca.pool(), td, time.Now()); fault.ReasonOf(err) != "svid_invalid" {
		t.Errorf("long chain: %v", err)
	}
	if _, err := rpc.VerifyPeer(nil, ca.pool(), td, time.Now()); err == nil {
		t.Error("no certificate is no SVID")
	}
}

// crypto/x509 does not parse such a name today; LeafID does not lean on that.
func TestLeafIDRefusesAnEmptyLabel(t *testing.T) { // ID-29
	for text, want := range map[string]bool{"spiffe://a.b/p": true, "spiffe://a..b/p": false, "spiffe://.a/p": false, "spiffe://a./p": false} {
		leaf := &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, Extensions: []pkix.Extension{rawSAN(text)}}
		if _, err := rpc.LeafID(leaf); (err == nil) != want || err != nil && fault.ReasonOf(err) != "svid_invalid" {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestVerifyPeerTellsExpiredFromInvalid(t *testing.T) {
	ca := newPKI(t)
	template := leafTemplate("spiffe://example.org/a")
	leaf := ca.sign(template).Leaf
	id, err := rpc.VerifyPeer([]*x509.Certificate{leaf}, ca.pool(), td, time.Now())
	if err != nil || id.String() != "spiffe://example.org/a" {
		t.Fatalf("%v, %v", id, err)
	}
	if _, err := rpc.VerifyPeer([]*x509.Certificate{leaf}, ca.pool(), td, time.Now().Add(2*time.Hour)); fault.ReasonOf(err) != "svid_expired" {
		t.Errorf("expired leaf: %v", err)
	}
	if _, err := rpc.VerifyPeer([]*x509.Certificate{leaf}, newPKI(t).pool(), td, time.Now().Add(2*time.Hour)); fault.ReasonOf(err) != "svid_invalid" {
		t.Errorf("expired and foreign: %v", err)
	}
}

func FuzzVerifyPeer(f *testing.F) {
	ca := newPKI(&testing.T{})
	f.Add(ca.sign(leafTemplate("spiffe://example.org/a")).Certificate[0])
	f.Fuzz(func(t *testing.T, der []byte) {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		id, err := rpc.VerifyPeer([]*x509.Certificate{cert}, ca.pool(), td, time.Now())
		if err == nil && !id.MemberOf(td) {
			t.Fatalf("accepted %v", id)
		}
	})
}

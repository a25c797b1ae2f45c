package state

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// FuzzDecoders: what decodes encodes to something that decodes to the same,
// and nothing else panics.
func FuzzDecoders(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/a"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		f.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		f.Fatal(err)
	}
	seed := func(data []byte, err error) {
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	seed(encodeIdentity(&Identity{Key: key, Chain: []*x509.Certificate{cert}}, key))
	seed(encodeKeyFile(key))
	seed(encodeBundle(&Bundle{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Sequence: 1 << 63,
		Authorities: []Authority{{ID: "aa", Certificate: cert}},
	}))
	seed(encodeDelivered([]Delivered{{Sequence: 1, Until: time.Now()}}))
	f.Fuzz(func(t *testing.T, data []byte) {
		if id, previous, err := decodeIdentity(data); err == nil {
			again, err := encodeIdentity(id, previous)
			if err != nil {
				t.Fatal(err)
			}
			if id2, _, err := decodeIdentity(again); err != nil || id2.AgentID != id.AgentID || !id2.Key.Equal(id.Key) {
				t.Fatal("identity changed", err)
			}
		}
		if k, err := decodeKeyFile(data); err == nil {
			if again, err := encodeKeyFile(k); err != nil || len(again) == 0 {
				t.Fatal(err)
			}
		}
		if b, err := decodeBundle(data); err == nil {
			again, err := encodeBundle(b)
			if err != nil {
				t.Fatal(err)
			}
			if b2, err := decodeBundle(again); err != nil || !b2.Equal(b) {
				t.Fatal("bundle changed", err)
			}
		}
		if d, err := decodeDelivered(data); err == nil {
			again, err := encodeDelivered(d)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := decodeDelivered(again); err != nil || bytes.Equal(again, nil) {
				t.Fatal(err)
			}
		}
	})
}

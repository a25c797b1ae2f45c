package attest_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"math/big"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/attest"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// nodeCA is an authority of nodes.
type nodeCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// template is a node's certificate that is as it should be.
func template(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(0x0a1b2c), Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
	}
}

func caTemplate(name string) *x509.Certificate {
	c := template(name)
	c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign
	return c
}

func newNodeCA(t testing.TB, name string) *nodeCA {
	t.Helper()
	key := ecKey(t, elliptic.P256())
	c := caTemplate(name)
	return &nodeCA{cert: (&nodeCA{cert: c, key: key}).sign(t, c, key.Public()), key: key}
}

// below makes an authority under this one.
func (a *nodeCA) below(t testing.TB, name string) *nodeCA {
	t.Helper()
	key := ecKey(t, elliptic.P256())
	return &nodeCA{cert: a.sign(t, caTemplate(name), key.Public()), key: key}
}

func (a *nodeCA) sign(t testing.TB, c *x509.Certificate, public crypto.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func ecKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// rsaPublic is an RSA key of that size whose private half nobody has.
func rsaPublic(bits int) *rsa.PublicKey {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	n.Add(n, big.NewInt(0xabcdef1)) // odd
	return &rsa.PublicKey{N: n, E: 65537}
}

// resigned is the certificate with another signature, in DER.
func resigned(t testing.TB, c *x509.Certificate, signature []byte) []byte {
	t.Helper()
	var outer struct {
		TBS       asn1.RawValue
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(c.Raw, &outer); err != nil {
		t.Fatal(err)
	}
	outer.Signature = asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}
	der, err := asn1.Marshal(outer)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// otherSignature is the second valid signature that every ECDSA signature over
// P-256 has: (r, n-s).
func otherSignature(t testing.TB, signature []byte) []byte {
	t.Helper()
	var v struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(signature, &v); err != nil {
		t.Fatal(err)
	}
	v.S.Sub(elliptic.P256().Params().N, v.S)
	out, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// book is the records of an X509Pop: who attested last, or why nobody may.
type book struct {
	id        spiffeid.ID
	attestor  string
	selectors selector.Set
	calls     int
	err       error
}

func (b *book) RecordAttested(_ context.Context, id spiffeid.ID, attestor string, selectors selector.Set, keyHash, _ string) error {
	b.id, b.attestor, b.selectors, b.calls = id, attestor, selectors, b.calls+1
	return b.err
}

// holder is a node that answers challenges as it should, unless spoil changes
// what it signs or sends.
type holder struct {
	key      crypto.Signer
	leaf     []byte
	export   func(string, []byte, int) ([]byte, error)
	certify  crypto.PublicKey
	message  func([]byte) []byte
	response func([]byte) []byte
	asked    int
	nonces   map[string]bool
}

func (h *holder) ask(t testing.TB) func(context.Context, []byte) ([]byte, error) {
	return func(_ context.Context, challenge []byte) ([]byte, error) {
		h.asked++
		var question agentv1.X509PopChallenge
		if err := proto.Unmarshal(challenge, &question); err != nil || len(question.GetNonce()) != 32 {
			t.Fatalf("challenge %x: %v", challenge, err)
		}
		if h.nonces == nil {
			h.nonces = map[string]bool{}
		}
		h.nonces[hex.EncodeToString(question.GetNonce())] = true
		// What is signed is spelled out here, not taken from the code under test.
		exported, err := h.export("EXPORTER-assay-x509pop", question.GetNonce(), 32)
		if err != nil {
			t.Fatal(err)
		}
		spki, err := x509.MarshalPKIXPublicKey(h.certify)
		if err != nil {
			t.Fatal(err)
		}
		message := []byte("                                                                assay, node attestation x509pop v1\x00")
		message = append(message, exported...)
		for _, part := range [][]byte{h.leaf, spki} {
			sum := sha256.Sum256(part)
			message = append(message, sum[:]...)
		}
		if h.message != nil {
			message = h.message(message)
		}
		answer, err := proto.Marshal(&agentv1.X509PopResponse{Signature: signed(t, h.key, message)})
		if err != nil {
			t.Fatal(err)
		}
		if h.response != nil {
			answer = h.response(answer)
		}
		return answer, nil
	}
}

func signed(t testing.TB, key crypto.Signer, message []byte) []byte {
	t.Helper()
	var opts crypto.SignerOpts = crypto.SHA256
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		opts = map[int]crypto.Hash{256: crypto.SHA256, 384: crypto.SHA384, 521: crypto.SHA512}[k.Params().BitSize]
	case *rsa.PrivateKey:
		opts = &rsa.PSSOptions{SaltLength: 32, Hash: crypto.SHA256}
	default:
		opts = crypto.Hash(0)
	}
	digest := message
	if h := opts.HashFunc(); h != 0 {
		hash := h.New()
		hash.Write(message)
		digest = hash.Sum(nil)
	}
	signature, err := key.Sign(rand.Reader, digest, opts)
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

func popPayload(t testing.TB, ders ...[]byte) []byte {
	t.Helper()
	data, err := proto.Marshal(&agentv1.X509PopPayload{Certificates: ders})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func newPop(roots []*x509.Certificate, records *book) *attest.X509Pop {
	return attest.NewX509Pop(attest.X509PopConfig{TrustDomain: td, ReservedPrefix: "/assay/", Roots: roots, Records: records})
}

// fakeExport stands in for a TLS connection where it doesn't matter.
func fakeExport(label string, context []byte, length int) ([]byte, error) {
	sum := sha256.Sum256(append([]byte(label), context...))
	return sum[:length], nil
}

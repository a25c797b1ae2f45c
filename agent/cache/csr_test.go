package cache_test

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"testing"

	"github.com/seed-caa81108/assay/agent/cache"
)

// The hand-made CSR is what the standard library makes, but for the signature,
// which is random.
func TestCSREqualsTheLibrarys(t *testing.T) {
	for range 200 {
		key := newKey()
		ours := must(cache.CSRFor(key))
		theirs := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))
		a, b := must(x509.ParseCertificateRequest(ours)), must(x509.ParseCertificateRequest(theirs))
		if err := a.CheckSignature(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a.RawTBSCertificateRequest, b.RawTBSCertificateRequest) || a.SignatureAlgorithm != b.SignatureAlgorithm {
			t.Fatalf("ours %x, theirs %x", ours, theirs)
		}
		head := bytes.Index(ours, a.RawTBSCertificateRequest)
		theirHead := bytes.Index(theirs, b.RawTBSCertificateRequest)
		tail, theirTail := ours[head+len(a.RawTBSCertificateRequest):], theirs[theirHead+len(b.RawTBSCertificateRequest):]
		if !bytes.Equal(tail[:12], theirTail[:12]) {
			t.Fatalf("algorithm: ours %x, theirs %x", tail[:12], theirTail[:12])
		}
	}
}

func BenchmarkCSR(b *testing.B) {
	key := newKey()
	for b.Loop() {
		must(cache.CSRFor(key))
	}
}

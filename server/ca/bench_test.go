package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/server/audit"
)

type noAudit struct{}

func (noAudit) Record(context.Context, ...audit.Line) error { return nil }

// benchCSRs are requests by different keys.
func benchCSRs(b *testing.B, n int) [][]byte {
	b.Helper()
	all := make([][]byte, n)
	for i := range all {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, newKey())
		if err != nil {
			b.Fatal(err)
		}
		all[i] = der
	}
	return all
}

// BenchmarkIssueX509 is the work of a signing call behind the API: check the
// CSRs, issue. Compare its certs/s with those of BenchmarkStdlibIssue.
func BenchmarkIssueX509(b *testing.B) {
	for _, size := range []int{1, 50} {
		b.Run(fmt.Sprintf("batch-%d", size), func(b *testing.B) {
			w := newWorld(b)
			w.opts.Audit, w.opts.Log = noAudit{}, slog.New(slog.DiscardHandler)
			a := w.open()
			start(b, a)
			csrs := benchCSRs(b, size)
			id := spiffeid.RequireFromPath(example, "/ns/default/sa/web")
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					reqs := make([]X509Request, size)
					for i, der := range csrs {
						pub, err := ParseCSR(der)
						if err != nil {
							b.Error(err)
							return
						}
						reqs[i] = X509Request{ID: id, PublicKey: pub}
					}
					svids, err := a.IssueX509(context.Background(), audit.Origin{}, reqs)
					if err != nil || svids[0].Err != nil {
						b.Error(err)
						return
					}
				}
			})
			b.ReportMetric(float64(b.N*size)/b.Elapsed().Seconds(), "certs/s")
		})
	}
}

// BenchmarkStdlibIssue is the limit of issuing with the standard library: parse
// and check a CSR, x509.CreateCertificate, on all cores.
func BenchmarkStdlibIssue(b *testing.B) {
	csrs := benchCSRs(b, 50)
	pki := newBenchPKI(b)
	uri := &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/ns/default/sa/web"}
	var serial atomic.Int64
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			if err := stdlibIssue(csrs[i%len(csrs)], pki.issuer, pki.issKey, uri, serial.Add(1)); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "certs/s")
}

func stdlibIssue(der []byte, parent *x509.Certificate, key crypto.Signer, uri *url.URL, number int64) error {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return err
	}
	if err := csr.CheckSignature(); err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial{0x40, byte(number >> 24), byte(number >> 16), byte(number >> 8), byte(number)}.bigInt(),
		NotBefore:    now, NotAfter: now.Add(time.Hour), URIs: []*url.URL{uri},
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	_, err = x509.CreateCertificate(rand.Reader, template, parent, csr.PublicKey, key)
	return err
}

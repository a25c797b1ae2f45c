//go:build kube && bench

package kube

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Certificates for a mesh: by tokens that were reviewed just now, as a ztunnel
// asks with one for all pods of its node, and by tokens that are new each time.
func TestBenchCreateCertificate(t *testing.T) {
	const during = 4 * time.Second
	m := newMeshWith(t, "  requests_per_second_per_caller: 1000000\n")
	m.Account("sleep")
	pod := m.Run(Pod{Name: "sleep-1", Node: m.Node("a").Name, Account: "sleep"})
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, benchKey(t))
	if err != nil {
		t.Fatal(err)
	}
	csr := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	limit := issueLimit(t, der, during)
	out := fmt.Sprintf("\nlimit of this run, parse and verify a CSR and sign with the standard library on %d cores: %.0f/s\n", runtime.NumCPU(), limit)
	for _, clients := range []int{1, 8, 64} {
		for _, fresh := range []bool{false, true} {
			var next atomic.Int64
			tokens := m.tokens(pod, fresh, clients)
			token := func() (string, error) {
				if i := int(next.Add(1)) - 1; i < len(tokens) {
					return tokens[i], nil
				}
				return tokens[len(tokens)-1], nil
			}
			var mu sync.Mutex
			var took []time.Duration
			var all sync.WaitGroup
			began := time.Now()
			for range clients {
				c := m.with("sleep", token)
				all.Go(func() {
					for time.Since(began) < during && (!fresh || int(next.Load()) < len(tokens)) {
						at := time.Now()
						if _, err := c.Send(t.Context(), csr, nil); err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						took = append(took, time.Since(at))
						mu.Unlock()
					}
				})
			}
			all.Wait()
			rate := float64(len(took)) / time.Since(began).Seconds()
			slices.Sort(took)
			at := func(q float64) time.Duration { return took[int(q*float64(len(took)-1))].Round(10 * time.Microsecond) }
			out += fmt.Sprintf("  %2d clients, token reviewed %-13s %5.0f/s (%3.0f %%)  p50 %v  p99 %v\n",
				clients, map[bool]string{false: "just now:", true: "for each:"}[fresh], rate, 100*rate/limit, at(0.5), at(0.99))
		}
	}
	_, _ = fmt.Fprint(os.Stderr, out)
}

// tokens are one that is used all the time, or one for each of some requests.
func (m *mesh) tokens(pod *corev1.Pod, fresh bool, clients int) []string {
	m.t.Helper()
	n := 1
	if fresh {
		n = 300 + 20*clients
	}
	tokens := make([]string, n)
	var all sync.WaitGroup
	var next atomic.Int64
	for range 8 {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				tokens[i] = m.Token("sleep", "istio-ca", pod)
			}
		})
	}
	all.Wait()
	return tokens
}

func benchKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issueLimit is how often in a second all cores do what signing can't do without.
func issueLimit(t *testing.T, csr []byte, during time.Duration) float64 {
	t.Helper()
	key := benchKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	var count atomic.Int64
	var all sync.WaitGroup
	began := time.Now()
	for range runtime.NumCPU() {
		all.Go(func() {
			for time.Since(began) < during {
				req, err := x509.ParseCertificateRequest(csr)
				if err == nil {
					err = req.CheckSignature()
				}
				if err == nil {
					_, err = x509.CreateCertificate(rand.Reader, template, template, req.PublicKey, key)
				}
				if err != nil {
					t.Error(err)
					return
				}
				count.Add(1)
			}
		})
	}
	all.Wait()
	return float64(count.Load()) / time.Since(began).Seconds()
}

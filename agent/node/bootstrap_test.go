package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/agent/state"
)

// A handshake may read the roots while Run fetches them again.
func TestBootstrapIsReadWhileItIsFetched(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "bundle.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("example.org")
	st, err := state.Open(filepath.Join(t.TempDir(), "data"), td)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = st.Close() }()
	n, err := New(Options{
		Config: Config{TrustDomain: td, ReservedPrefix: "/assay/", Addresses: []string{"ca:1"}, TrustBundle: file},
		State:  st, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Registerer: prometheus.NewRegistry(),
		Dial: func(context.Context, string) (net.Conn, error) { return nil, errors.New("nobody there") },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.establishTrust(t.Context()); err != nil {
		t.Fatal(err)
	}
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for range 100 {
				if len(n.roots()) != 1 {
					t.Error("no roots")
				}
			}
		})
	}
	for range 20 {
		if err := n.establishTrust(t.Context()); err != nil {
			t.Error(err)
		}
	}
	readers.Wait()
}

//go:build e2e

package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

const shortTTL = `ca:
  x509_svid_ttl: 10s
  max_x509_svid_ttl: 10s
`

// Zero failed handshakes while SVIDs of ten seconds are renewed over two
// restarts of the agent and one of the server. // CLIENT-7, CLIENT-15, PLAN-2
func TestHandshakesGoOnOverRestartsAndRenewals(t *testing.T) {
	renewUnderRestarts(t, 5)
}

func renewUnderRestarts(t *testing.T, rotations int) {
	s := newSite(t, shortTTL)
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	s.CreateEntry(a.ID, "spiffe://example.org/web")

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute+time.Duration(rotations)*10*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(a.Endpoint())))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close() }()

	h := startHandshakes(t, source)
	renewed := func(n int) {
		t.Helper()
		for range n {
			before := serial(t, source)
			for serial(t, source) == before {
				select {
				case <-source.Updated():
				case <-ctx.Done():
					t.Fatalf("no renewal: %v; handshakes so far: %d", ctx.Err(), h.done.Load())
				}
			}
		}
	}

	renewed(1)
	a.Restart(syscall.SIGTERM)
	renewed(1)
	a.Restart(syscall.SIGKILL)
	renewed(1)
	s.Server.Stop(syscall.SIGTERM)
	s.StartServer()
	renewed(rotations - 3)

	h.enough(rotations * 100)
	h.stop()
	t.Logf("%d renewals, %d handshakes", rotations, h.done.Load())
	if n := h.failed.Load(); n > 0 {
		t.Errorf("%d of %d handshakes failed, first: %v", n, h.done.Load()+n, h.first)
	}
}

func serial(t *testing.T, source *workloadapi.X509Source) string {
	t.Helper()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return svid.Certificates[0].SerialNumber.String()
}

// handshakes makes mutual-TLS connections without pause, both ends with the
// workload's own SVID.
type handshakes struct {
	t            *testing.T
	done, failed atomic.Int64
	first        error
	once         sync.Once
	stop         func()
}

func startHandshakes(t *testing.T, source *workloadapi.X509Source) *handshakes {
	t.Helper()
	return startHandshakesBetween(t, source, source, 5*time.Millisecond)
}

// identity is what a workload makes connections with.
type identity interface {
	x509svid.Source
	x509bundle.Source
}

// startHandshakesBetween is startHandshakes for two workloads, with a pause
// between one and the next.
func startHandshakesBetween(t *testing.T, server, client identity, pause time.Duration) *handshakes {
	t.Helper()
	member := tlsconfig.AuthorizeMemberOf(spiffeid.RequireTrustDomainFromString("example.org"))
	lis, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(server, server, member))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	h := &handshakes{t: t}
	fail := func(err error) {
		h.failed.Add(1)
		h.once.Do(func() { h.first = err })
	}
	var serving, calling sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			if _, err := io.Copy(conn, conn); err != nil && !errors.Is(err, net.ErrClosed) {
				fail(err)
			}
			_ = conn.Close()
		}
	})
	calling.Go(func() {
		for ctx.Err() == nil {
			if err := shakeHands(lis.Addr().String(), tlsconfig.MTLSClientConfig(client, client, member)); err != nil {
				fail(err)
			} else {
				h.done.Add(1)
			}
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	})
	var once sync.Once
	h.stop = func() {
		once.Do(func() {
			cancel()
			calling.Wait() // a handshake under way is not to fail by our own doing
			_ = lis.Close()
			serving.Wait()
		})
	}
	t.Cleanup(h.stop)
	return h
}

// enough waits until there were n good handshakes: fewer prove nothing.
func (h *handshakes) enough(n int) {
	h.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(time.Minute); h.done.Load() < int64(n); {
		select {
		case <-tick.C:
		case <-deadline:
			h.t.Errorf("only %d handshakes, %d failed: the test proves nothing", h.done.Load(), h.failed.Load())
			return
		}
	}
}

func shakeHands(addr string, cfg *tls.Config) error {
	conn, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte("x")); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}

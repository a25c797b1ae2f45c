//go:build e2e

package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	istiov1 "istio.io/api/security/v1alpha1"

	"github.com/seed-caa81108/assay/test/harness"
	"github.com/seed-caa81108/assay/test/istioclient"
)

// mesh is a site whose server is the CA of a mesh.
type mesh struct {
	*harness.Site
	t      *testing.T
	issuer *istioclient.Issuer
	port   int
}

func newMesh(t *testing.T, more string) *mesh {
	t.Helper()
	issuer, err := istioclient.NewIssuer()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := issuer.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{Site: newSite(t, more), t: t, issuer: issuer}
	m.port = m.ServeMesh(issuer.Name, keys)
	m.StartServer()
	return m
}

// rootFile is what the ConfigMap istio-ca-root-cert would have.
func (m *mesh) rootFile() []byte { return []byte(m.CLI("bundle", "show")) }

func (m *mesh) client(account string) *istioclient.Client {
	m.t.Helper()
	c := &istioclient.Client{
		Address: fmt.Sprintf("127.0.0.1:%d", m.port), Roots: m.rootFile, ClusterID: "Kubernetes", NewKey: istioclient.P256,
		Token: func() (string, error) { return m.issuer.Token("foo", account) }, Identity: "spiffe://example.org/ns/foo/sa/" + account,
	}
	m.t.Cleanup(c.Close)
	return c
}

// sidecar renews at half life, as istio-agent does, and serves and calls with what
// it has.
type sidecar struct {
	client *istioclient.Client
	now    atomic.Pointer[istioclient.Answer]
	pushes atomic.Int32 // of other roots
	failed atomic.Int32
	lis    net.Listener
}

func (m *mesh) sidecar(ctx context.Context, running *sync.WaitGroup, account string) *sidecar {
	m.t.Helper()
	s := &sidecar{client: m.client(account)}
	first, err := s.client.Fetch(ctx)
	if err != nil {
		m.t.Fatal(err)
	}
	s.now.Store(first)
	running.Go(func() {
		for {
			timer := time.NewTimer(time.Until(s.now.Load().Leaf.NotAfter) / 2)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return
			}
			got, err := s.client.Fetch(ctx)
			switch before := s.now.Load(); {
			case err != nil && ctx.Err() == nil:
				s.failed.Add(1)
			case err == nil:
				if got.Chain[len(got.Chain)-1] != before.Chain[len(before.Chain)-1] {
					s.pushes.Add(1)
				}
				s.now.Store(got)
			}
		}
	})
	if s.lis, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = s.lis.Close() })
	running.Go(func() {
		for {
			conn, err := s.lis.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer func() { _ = conn.Close() }()
				_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
				server := tls.Server(conn, s.tls())
				_, _ = io.Copy(server, server)
			})
		}
	})
	return s
}

// tls is mutual TLS as Envoy does it: the peer's chain against the last element.
func (s *sidecar) tls() *tls.Config {
	mine := s.now.Load()
	roots := x509.NewCertPool()
	for _, r := range mine.Roots {
		roots.AddCert(r)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{mine.TLS()}, ClientAuth: tls.RequireAnyClientCert,
		InsecureSkipVerify: true, SessionTicketsDisabled: true, // names of a mesh are no host names
		VerifyConnection: func(state tls.ConnectionState) error {
			above := x509.NewCertPool()
			for _, c := range state.PeerCertificates[1:] {
				above.AddCert(c)
			}
			_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: above, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			return err
		},
	}
}

// call makes one connection and hears something over it, so that both ends have
// taken each other.
func (s *sidecar) call(other *sidecar) error {
	raw, err := net.DialTimeout("tcp", other.lis.Addr().String(), 10*time.Second)
	if err != nil {
		return err
	}
	defer func() { _ = raw.Close() }()
	_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
	conn := tls.Client(raw, s.tls())
	if err := conn.Handshake(); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 1)) // the other end has judged us too
	return err
}

// CA-18, CA-19, CA-20: a root is replaced under sidecars that renew every few
// seconds and call each other without pause: each learns of the new root before
// anything is signed under it, and no handshake fails.
func TestARootIsReplacedUnderAMesh(t *testing.T) {
	m := newMesh(t, shortTTL)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	var running sync.WaitGroup
	defer func() { running.Wait() }()
	defer cancel()
	a, b := m.sidecar(ctx, &running, "a"), m.sidecar(ctx, &running, "b")
	defer func() { _ = a.lis.Close(); _ = b.lis.Close() }()
	var done, failed atomic.Int64
	var first atomic.Pointer[error]
	running.Go(func() {
		for ctx.Err() == nil {
			for _, pair := range [][2]*sidecar{{a, b}, {b, a}} {
				if err := pair[0].call(pair[1]); err == nil {
					done.Add(1)
				} else if ctx.Err() == nil {
					failed.Add(1)
					first.CompareAndSwap(nil, &err)
				}
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	roots := func(want int) {
		t.Helper()
		m.Server.Eventually(time.Minute, fmt.Sprintf("both sidecars have %d roots", want), func() error {
			if x, y := len(a.now.Load().Roots), len(b.now.Load().Roots); x != want || y != want {
				return fmt.Errorf("they have %d and %d", x, y)
			}
			return nil
		})
	}
	left := m.client("late") // its root file stays as it is
	stale := m.rootFile()
	left.Roots = func() []byte { return stale }
	if _, err := left.Fetch(ctx); err != nil {
		t.Fatal(err)
	}
	left.Close()

	serial := a.now.Load().Leaf.SerialNumber.String()
	m.CLI("root", "prepare")
	if _, stderr, code := m.Try("assay", "root", "activate"); code == 0 || !strings.Contains(stderr, "handed out") {
		t.Fatalf("activated while sidecars may not have the root: exit %d, %s", code, stderr)
	}
	roots(2)
	if a.now.Load().Leaf.SerialNumber.String() == serial {
		t.Error("nothing was renewed")
	}
	// The gate goes by marks, which stand ten minutes ahead; both have renewed.
	m.CLI("root", "activate", "--force", "--reason", "both sidecars have the new root", "--yes")
	old := a.now.Load().Chain[1]
	m.Server.Eventually(time.Minute, "both have certificates under the new root", func() error {
		if a.now.Load().Chain[1] == old || b.now.Load().Chain[1] == old {
			return errors.New("not yet")
		}
		return nil
	})
	// CA-20: who has not read the root file since fails for a round.
	m.Server.Eventually(time.Minute, "the server shows a certificate under the new root", func() error {
		if _, err := left.Fetch(ctx); err == nil {
			return errors.New("it is taken by the old root file")
		}
		return nil
	})
	left.Roots = m.rootFile
	if _, err := left.Fetch(ctx); err != nil {
		t.Errorf("with the new root file: %v", err)
	}
	m.CLI("root", "revoke", "--force", "--reason", "nothing is under the old root", "--yes")
	roots(1)

	m.Server.Eventually(time.Minute, "handshakes that prove something", func() error {
		if n := done.Load(); n < 200 {
			return fmt.Errorf("only %d, %d failed", n, failed.Load())
		}
		return nil
	})
	cancel()
	t.Logf("%d handshakes", done.Load())
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d handshakes failed, first: %v", n, n+done.Load(), *first.Load())
	}
	for name, s := range map[string]*sidecar{"a": a, "b": b} {
		if s.failed.Load() > 0 || s.pushes.Load() != 2 {
			t.Errorf("%s: %d failed renewals, %d pushes of roots, want one for each change", name, s.failed.Load(), s.pushes.Load())
		}
	}
}

// NEG-30: whoever proves nothing costs the server little, whatever is sent. The
// measure is the processor time of its process, with a handshake for each.
func TestStrangersCostTheMeshsServerLittle(t *testing.T) {
	const goal, most = 5 * time.Millisecond, 10 * time.Millisecond
	m := newMesh(t, "")
	good, err := m.issuer.Token("foo", "sleep")
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(good, ".")
	encode := base64.RawURLEncoding.EncodeToString
	deep := structpb.NewNullValue()
	for range 2000 {
		deep = structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{deep}})
	}
	wide := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for i := range 2500 {
		wide.Fields[strconv.Itoa(i)] = structpb.NewBoolValue(true)
	}
	csr := strings.Repeat("-----BEGIN CERTIFICATE REQUEST-----\n", 850)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(m.rootFile())
	cost := func(name, token string, req *istiov1.IstioCertificateRequest) time.Duration {
		const times = 60
		before := cpuTime(t, m.Server.PID())
		for range times {
			conn, err := grpc.NewClient(fmt.Sprintf("127.0.0.1:%d", m.port), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool})))
			if err != nil {
				t.Fatal(err)
			}
			ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
			if _, err := istiov1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, req); status.Code(err) != codes.Unauthenticated {
				t.Errorf("%s: %v", name, err)
			}
			_ = conn.Close()
		}
		return (cpuTime(t, m.Server.PID()) - before) / times
	}
	// The processors of a machine that is busy, or another one, are slower: what
	// nothing costs tells by how much, within reason.
	limit := max(most, min(3*cost("at first", "", &istiov1.IstioCertificateRequest{}), 5*most))
	for name, c := range map[string]struct {
		token string
		req   *istiov1.IstioCertificateRequest
	}{
		"nothing":             {"", &istiov1.IstioCertificateRequest{}},
		"a large request":     {"", &istiov1.IstioCertificateRequest{Csr: csr}},
		"deep metadata":       {"", &istiov1.IstioCertificateRequest{Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{"x": deep}}}},
		"wide metadata":       {"", &istiov1.IstioCertificateRequest{Metadata: wide}},
		"dots":                {strings.Repeat(".", 15000), &istiov1.IstioCertificateRequest{}},
		"deep claims":         {parts[0] + "." + encode([]byte(strings.Repeat(`{"a":`, 1800)+"1"+strings.Repeat("}", 1800))) + "." + parts[2], &istiov1.IstioCertificateRequest{}},
		"a broken list":       {parts[0] + "." + encode([]byte(strings.Repeat("[", 10000))) + "." + parts[2], &istiov1.IstioCertificateRequest{}},
		"a forged signature":  {parts[0] + "." + parts[1] + "." + encode(make([]byte, 64)), &istiov1.IstioCertificateRequest{Csr: csr}},
		"a signature of 8 KB": {parts[0] + "." + parts[1] + "." + encode(make([]byte, 8000)), &istiov1.IstioCertificateRequest{}},
	} {
		each := cost(name, c.token, c.req)
		t.Logf("%s: %v, the goal is %v", name, each, goal)
		if each > limit {
			t.Errorf("%s costs %v, at most %v", name, each, limit)
		}
	}
}

// cpuTime is what a process has spent so far.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	var ticks int64
	for _, f := range fields[11:13] { // user and system time, in hundredths of a second
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

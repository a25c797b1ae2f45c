package endpoint

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/agent/attest"
	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/pkg/selector"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// authority is a root with one issuer below it.
type authority struct {
	t         testing.TB
	root      *x509.Certificate
	issuer    *x509.Certificate
	issuerKey crypto.Signer
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func uri(s string) []*url.URL { return []*url.URL{{Scheme: "spiffe", Host: td.Name(), Path: s}} }

func newAuthority(t testing.TB) *authority {
	t.Helper()
	ca := func() *x509.Certificate {
		return &x509.Certificate{
			Subject: pkix.Name{CommonName: "test"}, URIs: uri(""), IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		}
	}
	rootKey, issuerKey := newKey(t), newKey(t)
	root := sign(t, ca(), ca(), rootKey.Public(), rootKey)
	return &authority{t, root, sign(t, ca(), root, issuerKey.Public(), rootKey), issuerKey}
}

func (a *authority) svid(path, hint string) *cache.SVID {
	a.t.Helper()
	key := newKey(a.t)
	leaf := sign(a.t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "test"}, URIs: uri(path), KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}, a.issuer, key.Public(), a.issuerKey)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return &cache.SVID{
		EntryID: "entry" + path, ID: spiffeid.RequireFromPath(td, path), Hint: hint, Key: cache.NewPrivateKey(keyDER), NotAfter: leaf.NotAfter,
		CertificatesDER: append(append([]byte{}, leaf.Raw...), a.issuer.Raw...), AuthorityID: "root",
	}
}

func (a *authority) snapshot(svids ...*cache.SVID) *cache.Snapshot {
	return &cache.Snapshot{SVIDs: svids, TrustDomain: td, BundleSequence: 1, BundleDER: a.root.Raw}
}

// source plays the cache: one state for every caller.
type source struct {
	mu         sync.Mutex
	snap       *cache.Snapshot
	err        error
	subs       map[*subscription]struct{}
	subscribed int
	sent       []*cache.Snapshot
	taken      *cache.Snapshot // the last one that a stream asked for
	waits      int             // how often a stream waited for a change
	selectors  selector.Set
	unheard    *cache.Snapshot // what there is by the time that a caller waits no longer
}

type subscription struct {
	source  *source
	changed chan struct{}
	set     selector.Set
}

func (s *source) subscribe(set selector.Set) Subscription {
	s.mu.Lock()
	defer s.mu.Unlock()
	sub := &subscription{s, make(chan struct{}, 1), set}
	if s.subs == nil {
		s.subs = map[*subscription]struct{}{}
	}
	s.subs[sub] = struct{}{}
	s.subscribed++
	s.selectors = set
	return sub
}

// set changes the state and tells all subscribers.
func (s *source) set(snap *cache.Snapshot, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snap, s.err = snap, err
	for sub := range s.subs {
		select {
		case sub.changed <- struct{}{}:
		default:
		}
	}
}

func (s *source) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.subs)
}

func (s *source) wasSent(snap *cache.Snapshot) bool {
	return slices.Contains(s.allSent(), snap)
}

func (s *source) allSent() []*cache.Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.sent)
}

func (s *source) wasTaken(snap *cache.Snapshot) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken == snap
}

func (s *subscription) Hurry() {
	s.source.mu.Lock()
	defer s.source.mu.Unlock()
	if s.source.unheard != nil {
		s.source.snap, s.source.err = s.source.unheard, nil
	}
}

func (s *subscription) Selectors() selector.Set { return s.set }

func (s *source) waited() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waits
}

func (s *subscription) Changed() <-chan struct{} {
	s.source.mu.Lock()
	defer s.source.mu.Unlock()
	s.source.waits++
	return s.changed
}

func (s *subscription) Snapshot() (*cache.Snapshot, error) {
	s.source.mu.Lock()
	defer s.source.mu.Unlock()
	s.source.taken = s.source.snap
	return s.source.snap, s.source.err
}

func (s *subscription) Sent(snap *cache.Snapshot) {
	s.source.mu.Lock()
	defer s.source.mu.Unlock()
	if n := len(s.source.sent); n == 0 || s.source.sent[n-1] != snap {
		s.source.sent = append(s.source.sent, snap)
	}
}

func (s *subscription) Close() {
	s.source.mu.Lock()
	defer s.source.mu.Unlock()
	delete(s.source.subs, s)
}

var (
	errNoIdentity = fault.New(fault.Denied, "no_identity", "no identity issued")
	errNotSynced  = fault.New(fault.NotReady, "not_synced", "not synced")
	errPending    = fault.New(fault.NotReady, "svid_pending", "pending")
	errEnded      = fault.New(fault.NotReady, "svid_expired_server_unreachable", "expired")
)

// endpoint is a server on a real socket.
type endpoint struct {
	t      testing.TB
	server *Server
	source *source
	reg    *prometheus.Registry
	path   string
	sds    string // path of the socket for Envoy
	stop   func()
}

type option func(*Config, *timing)

func withLimits(l Limits) option { return func(c *Config, _ *timing) { c.Limits = l } }

func withTiming(f func(*timing)) option { return func(_ *Config, t *timing) { f(t) } }

func withSource(name string, src attest.Source) option {
	return func(c *Config, _ *timing) { c.Attestor = newAttestor(map[string]attest.Source{name: src}) }
}

func newAttestor(sources map[string]attest.Source) *attest.Attestor {
	a, err := attest.NewAttestor(attest.Options{Sources: sources, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		panic(err)
	}
	return a
}

func serve(t testing.TB, src *source, opts ...option) *endpoint {
	t.Helper()
	reg := prometheus.NewRegistry()
	cfg := Config{
		Attestor: newAttestor(nil), Subscribe: src.subscribe, Log: slog.New(slog.DiscardHandler),
		Calls: rpc.NewMetrics(reg), Registerer: reg,
	}
	waits := defaultTiming
	for _, o := range opts {
		o(&cfg, &waits)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.timing = waits
	dir, err := os.MkdirTemp("", "endpoint")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	e := &endpoint{t: t, server: s, source: src, reg: reg, path: filepath.Join(dir, "api.sock"), sds: filepath.Join(dir, "sds.sock")}
	sockets := Sockets{API: listen(t, e.path), SDS: listen(t, e.sds)}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, sockets) }()
	e.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		if n := s.attestor.Descriptors(); n != 0 {
			t.Errorf("%d descriptors left", n)
		}
		if src.open() != 0 {
			t.Error("subscriptions left")
		}
		if len(s.gate.byUID) != 0 {
			t.Errorf("still counted after the end: %v", s.gate.all)
		}
	})
	t.Cleanup(e.stop)
	return e
}

func listen(t testing.TB, path string) net.Listener {
	t.Helper()
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	return lis
}

func (e *endpoint) conn(opts ...grpc.DialOption) *grpc.ClientConn {
	e.t.Helper()
	return e.connTo(e.path, opts...)
}

func (e *endpoint) connTo(path string, opts ...grpc.DialOption) *grpc.ClientConn {
	e.t.Helper()
	opts = append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))
	cc, err := grpc.NewClient("unix://"+path, opts...)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { _ = cc.Close() })
	return cc
}

func (e *endpoint) client(opts ...grpc.DialOption) workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(e.conn(opts...))
}

func (e *endpoint) dial() net.Conn {
	e.t.Helper()
	c, err := net.Dial("unix", e.path)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { _ = c.Close() })
	return c
}

// withHeader is the context of a well-behaved client. It ends with the test.
func withHeader(t testing.TB) context.Context {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), headerKey, headerValue))
	t.Cleanup(cancel)
	return ctx
}

// value adds the values of a metric up, over the label values given.
func (e *endpoint) value(name string, labels ...string) float64 {
	e.t.Helper()
	families, err := e.reg.Gather()
	if err != nil {
		e.t.Fatal(err)
	}
	var sum float64
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			matches := len(labels) == 0
			for _, l := range m.GetLabel() {
				for _, want := range labels {
					matches = matches || l.GetValue() == want
				}
			}
			if matches {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

func wantStatus(t testing.TB, err error, code codes.Code, reason string) {
	t.Helper()
	if status.Code(err) != code || fault.ReasonOf(fault.FromStatus(err)) != reason {
		t.Fatalf("got %v, want %v %s", err, code, reason)
	}
}

// The test binary plays clients in processes of their own: ASSAY_CLIENT names
// the part.
const (
	clientEnv = "ASSAY_CLIENT"
	socketEnv = "ASSAY_SOCKET"
)

type client struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Reader
}

func startClient(t testing.TB, part, socket string, change ...func(*exec.Cmd)) *client {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), clientEnv+"="+part, socketEnv+"="+socket, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	for _, f := range change {
		f(cmd)
	}
	c := &client{t: t, cmd: cmd}
	var err error
	if c.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.lines = bufio.NewReader(out)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.end() })
	return c
}

func (c *client) end() error {
	_ = c.stdin.Close()
	if err := c.cmd.Wait(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

func (c *client) await(prefix string) string {
	c.t.Helper()
	got, err := c.lines.ReadString('\n')
	rest, ok := strings.CutPrefix(strings.TrimSpace(got), prefix)
	if err != nil || !ok {
		c.t.Fatalf("client said %q (%v), want %q", got, err, prefix)
	}
	return strings.TrimSpace(rest)
}

func (c *client) tell(order string) {
	c.t.Helper()
	if _, err := io.WriteString(c.stdin, order+"\n"); err != nil {
		c.t.Fatal(err)
	}
}

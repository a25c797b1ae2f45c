package node_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/agent/node"
	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

const agentTTL = 12 * time.Hour

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// authority is a root that signs.
type authority struct {
	cert             *x509.Certificate
	key              *ecdsa.PrivateKey
	retired, tainted bool
}

func newAuthority() *authority {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	sum := sha256.Sum256(must(x509.MarshalPKIXPublicKey(&key.PublicKey)))
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "root"}, SubjectKeyId: sum[:20],
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	return &authority{cert: must(x509.ParseCertificate(der)), key: key}
}

func serial() *big.Int { return must(rand.Int(rand.Reader, big.NewInt(1<<62))) }

func (a *authority) sign(id spiffeid.ID, pub crypto.PublicKey, ttl time.Duration) *x509.Certificate {
	template := &x509.Certificate{
		SerialNumber: serial(), NotBefore: time.Now().Add(-2 * time.Minute), NotAfter: time.Now().Add(ttl),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{id.URL()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, a.cert, pub, a.key))))
}

func (a *authority) pin() string {
	sum := sha256.Sum256(a.cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// record is what the fake server knows about an agent.
type record struct {
	active, pending       string // serials
	activeKey, pendingKey string // hashes of keys
	banned                bool
}

// fake is a server with real TLS, real certificates and the rules of the real
// one as far as an agent can see them.
type fake struct {
	agentv1.UnimplementedAgentServer
	root *authority // in the bundle, signs agents
	tls  *authority // signs the server's own certificate

	mu       sync.Mutex
	sequence uint64
	bundled  []*authority
	tokens   map[string]string // token -> hash of the key that redeemed it
	agents   map[string]*record
	// rejoin false refuses attestor "rejoin".
	rejoin bool
	// denial, if set, is the answer to Bundle.
	denial error
	// away makes SignX509 fail before it looks at the caller.
	away bool
	// lag is how long the answers of SignX509 are on their way.
	lag time.Duration
	// follows are the Sync streams, by the serial that they came with; closed
	// when that is superseded.
	follows map[string]chan struct{}
	// lose is how many replies of a method get lost after the work was done.
	lose map[string]int
	// corrupt, if set, changes what Attest and Renew answer.
	corrupt func(*agentv1.Identity)
	calls   map[string]int
	keys    []string // every key that was certified, in order
	evil    func()   // called when a token arrives
	// taken are keys that other agents have.
	taken map[string]bool
	// challenges replace the one that x509pop sends.
	challenges [][]byte

	lis  *bufconn.Listener
	grpc *grpc.Server
}

func newFake() *fake {
	root := newAuthority()
	return &fake{
		root: root, tls: root, sequence: 1, bundled: []*authority{root}, tokens: map[string]string{},
		agents: map[string]*record{}, rejoin: true, lose: map[string]int{}, calls: map[string]int{},
		follows: map[string]chan struct{}{},
	}
}

func (f *fake) start() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lis = bufconn.Listen(1 << 20)
	f.grpc = grpc.NewServer(grpc.Creds(f.creds()), grpc.ConnectionTimeout(5*time.Second),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 30 * time.Second}))
	agentv1.RegisterAgentServer(f.grpc, f)
	go func(s *grpc.Server, l net.Listener) { _ = s.Serve(l) }(f.grpc, f.lis)
}

func (f *fake) stop() {
	f.mu.Lock()
	s := f.grpc
	f.lis, f.grpc = nil, nil
	f.mu.Unlock()
	if s != nil {
		s.Stop()
	}
}

func (f *fake) creds() credentials.TransportCredentials {
	return rpc.ServerTLS(func() (*tls.Certificate, error) {
		key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		f.mu.Lock()
		signer := f.tls
		f.mu.Unlock()
		leaf := signer.sign(spiffeid.RequireFromPath(td, "/assay/server"), &key.PublicKey, time.Hour)
		return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
	}, func() (spiffeid.TrustDomain, *x509.CertPool) {
		pool := x509.NewCertPool()
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, a := range f.bundled {
			pool.AddCert(a.cert)
		}
		return td, pool
	})
}

// dial is the network: one address that leads to the server while it is up.
func (f *fake) dial(ctx context.Context, address string) (net.Conn, error) {
	f.mu.Lock()
	lis := f.lis
	f.mu.Unlock()
	if lis == nil || address != "server:8443" {
		return nil, &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}
	}
	return lis.DialContext(ctx)
}

func (f *fake) bundle() *agentv1.TrustBundle {
	b := &agentv1.TrustBundle{TrustDomain: td.Name(), Sequence: f.sequence}
	for _, a := range f.bundled {
		b.X509Authorities = append(b.X509Authorities, &agentv1.Authority{Id: hex.EncodeToString(a.cert.SubjectKeyId), Certificate: a.cert.Raw, Retired: a.retired, Tainted: a.tainted})
	}
	return b
}

func (f *fake) Bundle(context.Context, *agentv1.BundleRequest) (*agentv1.BundleResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls["Bundle"]++
	if f.denial != nil {
		return nil, wire(f.denial)
	}
	return &agentv1.BundleResponse{Bundle: f.bundle()}, nil
}

func wire(err error) error { return fault.Status(err, "R").Err() }

func hash(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// lost says whether the reply to method gets lost.
func (f *fake) lost(method string) bool {
	if f.lose[method] == 0 {
		return false
	}
	f.lose[method]--
	return true
}

var errLost = wire(fault.New(fault.NotReady, "connection_lost", "the reply got lost"))

func (f *fake) Attest(stream grpc.BidiStreamingServer[agentv1.AttestRequest, agentv1.AttestResponse]) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	start := req.GetStart()
	f.calls["Attest/"+start.GetAttestor()]++
	csr, err := x509.ParseCertificateRequest(start.GetCsr())
	if err != nil || csr.CheckSignature() != nil || len(csr.Subject.Names)+len(csr.Extensions) > 0 {
		return wire(fault.New(fault.Invalid, "csr_malformed", "bad CSR"))
	}
	var agentID string
	switch start.GetAttestor() {
	case "join_token":
		agentID, err = f.redeem(string(start.GetPayload()), csr)
	case "rejoin":
		agentID, err = f.takeBack(stream.Context(), start.GetPayload())
	case "x509pop":
		agentID, err = f.prove(stream, start.GetPayload(), csr)
	}
	if err != nil {
		return wire(err)
	}
	r := f.agents[agentID]
	if r.banned {
		return wire(fault.New(fault.Denied, "agent_banned", "this agent is banned"))
	}
	identity := f.certify(agentID, csr)
	if start.GetAttestor() == "join_token" {
		r.active, r.activeKey, r.pending, r.pendingKey = r.pending, r.pendingKey, "", ""
	}
	if f.lost("Attest") {
		return errLost
	}
	return stream.Send(&agentv1.AttestResponse{Step: &agentv1.AttestResponse_Identity{Identity: identity}})
}

func (f *fake) redeem(token string, csr *x509.CertificateRequest) (string, error) {
	if f.evil != nil {
		f.evil()
	}
	key := hash(csr.RawSubjectPublicKeyInfo)
	by, ok := f.tokens[token]
	if !ok || by != "" && by != key {
		return "", fault.New(fault.Denied, "join_token_invalid", "the join token is not valid")
	}
	f.tokens[token] = key
	sum := sha256.Sum256([]byte(token))
	id := "spiffe://example.org/assay/agent/join_token/" + hex.EncodeToString(sum[:16])
	if f.agents[id] == nil {
		f.agents[id] = &record{}
	}
	return id, nil
}

func (f *fake) takeBack(ctx context.Context, payload []byte) (string, error) {
	denied := fault.New(fault.Denied, "rejoin_refused", "this agent can't come back this way")
	var p agentv1.RejoinPayload
	if proto.Unmarshal(payload, &p) != nil || !f.rejoin || rpc.CallerFrom(ctx).State != rpc.CertNone {
		return "", denied
	}
	r := f.agents[p.GetAgentId()]
	if r == nil {
		return "", denied
	}
	if r.banned {
		return "", fault.New(fault.Denied, "agent_banned", "this agent is banned")
	}
	if h := hash(p.GetPublicKey()); h != r.activeKey && h != r.pendingKey {
		return "", denied
	}
	pub, err := x509.ParsePKIXPublicKey(p.GetPublicKey())
	if err != nil {
		return "", denied
	}
	conn, _ := rpc.ConnectionState(ctx)
	material := must(conn.ExportKeyingMaterial("EXPORTER-assay-rejoin", []byte(p.GetAgentId()), 32))
	digest := sha256.Sum256(material)
	if !ecdsa.VerifyASN1(pub.(*ecdsa.PublicKey), digest[:], p.GetSignature()) {
		return "", denied
	}
	return p.GetAgentId(), nil
}

func (f *fake) certify(agentID string, csr *x509.CertificateRequest) *agentv1.Identity {
	leaf := f.root.sign(spiffeid.RequireFromString(agentID), csr.PublicKey, agentTTL)
	r := f.agents[agentID]
	r.pending, r.pendingKey = leaf.SerialNumber.Text(16), hash(csr.RawSubjectPublicKeyInfo)
	f.keys = append(f.keys, r.pendingKey)
	identity := &agentv1.Identity{AgentId: agentID, Chain: [][]byte{leaf.Raw}, Bundle: f.bundle()}
	if f.corrupt != nil {
		f.corrupt(identity)
	}
	return identity
}

// admit is the rule of the authenticated methods.
func (f *fake) admit(ctx context.Context) (string, error) {
	c := rpc.CallerFrom(ctx)
	r := f.agents[c.ID.String()]
	switch {
	case c.State == rpc.CertNone:
		return "", fault.New(fault.Unauthenticated, "certificate_missing", "present a certificate")
	case c.State == rpc.CertExpired || time.Now().After(c.NotAfter):
		return "", fault.New(fault.Unauthenticated, "svid_expired", "the certificate has expired")
	case r == nil:
		return "", fault.New(fault.Denied, "agent_unknown", "no such agent")
	case r.banned:
		return "", fault.New(fault.Denied, "agent_banned", "this agent is banned")
	case c.Serial == r.pending:
		if end := f.follows[r.active]; end != nil {
			close(end)
			delete(f.follows, r.active)
		}
		r.active, r.activeKey, r.pending, r.pendingKey = r.pending, r.pendingKey, "", ""
	case c.Serial != r.active:
		return "", fault.New(fault.Denied, "agent_svid_not_active", "this certificate was superseded")
	}
	return c.ID.String(), nil
}

func (f *fake) Renew(ctx context.Context, req *agentv1.RenewRequest) (*agentv1.RenewResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls["Renew"]++
	agentID, err := f.admit(ctx)
	if err != nil {
		return nil, wire(err)
	}
	identity := f.certify(agentID, must(x509.ParseCertificateRequest(req.GetCsr())))
	if f.lost("Renew") {
		return nil, errLost
	}
	return &agentv1.RenewResponse{Identity: identity}, nil
}

func (f *fake) SignX509(ctx context.Context, _ *agentv1.SignX509Request) (*agentv1.SignX509Response, error) {
	defer func() { time.Sleep(f.lag) }() // without the lock
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls["SignX509"]++
	if f.away {
		return nil, errLost
	}
	if _, err := f.admit(ctx); err != nil {
		return nil, wire(err)
	}
	return &agentv1.SignX509Response{}, nil
}

// Sync sends one message and ends when the caller's certificate is superseded,
// as the server does.
func (f *fake) Sync(stream grpc.BidiStreamingServer[agentv1.SyncRequest, agentv1.SyncResponse]) error {
	end := make(chan struct{})
	f.mu.Lock()
	f.calls["Sync"]++
	_, err := f.admit(stream.Context())
	f.follows[rpc.CallerFrom(stream.Context()).Serial] = end
	f.mu.Unlock()
	if err != nil {
		return wire(err)
	}
	if err := stream.Send(&agentv1.SyncResponse{}); err != nil {
		return err
	}
	select {
	case <-end:
		return wire(fault.New(fault.Denied, "agent_svid_not_active", "this certificate was superseded"))
	case <-stream.Context().Done():
		return errLost
	}
}

// with does something to the server under its lock.
func (f *fake) with(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

func (f *fake) count(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

// known is how many agents there are.
func (f *fake) known() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.agents)
}

func (f *fake) addToken(token string) { f.with(func() { f.tokens[token] = "" }) }

func (f *fake) certified() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.keys)
}

// host is the machine of one agent, which survives restarts of the agent.
type host struct {
	t      *testing.T
	fake   *fake
	dir    string
	cfg    node.Config
	dial   func(context.Context, string) (net.Conn, error)
	logTo  io.Writer
	state  *state.State
	node   *node.Node
	done   chan struct{}
	err    error
	cancel context.CancelFunc
}

// newHost gives a machine that trusts f by pin and holds a good token. Inside
// a bubble the directory has to come from outside, as t.TempDir does not work
// with the bubble's t.
func newHost(t *testing.T, f *fake, dir string) *host {
	t.Helper()
	h := &host{t: t, fake: f, dir: dir, dial: f.dial, logTo: io.Discard, cfg: node.Config{
		TrustDomain: td, ReservedPrefix: "/assay/", Addresses: []string{"server:8443"}, Pin: f.root.pin(),
		JoinTokenFile: filepath.Join(dir, "token"), Version: "test",
	}}
	f.addToken("token-1")
	h.putToken("token-1")
	return h
}

func (h *host) putToken(token string) {
	if err := os.WriteFile(h.cfg.JoinTokenFile, []byte(token+"\n"), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) start() {
	h.t.Helper()
	var err error
	if h.state, err = state.Open(filepath.Join(h.dir, "data"), td); err != nil {
		h.t.Fatal(err)
	}
	h.node, err = node.New(node.Options{
		Config: h.cfg, State: h.state, Log: slog.New(slog.NewTextHandler(h.logTo, nil)), Registerer: prometheus.NewRegistry(), Dial: h.dial,
	})
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	h.done = make(chan struct{})
	go func() {
		h.err = h.node.Run(ctx)
		close(h.done)
	}()
}

// stop ends the agent and returns what Run returned.
func (h *host) stop() error {
	h.t.Helper()
	h.cancel()
	<-h.done
	if err := h.state.Close(); err != nil {
		h.t.Fatal(err)
	}
	return h.err
}

// kill ends the agent if the test did not.
func (h *host) kill() {
	if h.cancel != nil {
		h.cancel()
		<-h.done
		_ = h.state.Close()
	}
}

func (h *host) restart() {
	h.t.Helper()
	if err := h.stop(); err != nil {
		h.t.Fatal(err)
	}
	h.start()
}

// conn returns a working connection and releases it at the end of the test.
func (h *host) conn() *node.Conn {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	c, err := h.node.Conn(ctx)
	if err != nil {
		h.t.Fatalf("no connection: %v", err)
	}
	return c
}

func (h *host) identity() state.Identity {
	h.t.Helper()
	id, ok := h.state.Identity()
	if !ok {
		h.t.Fatal("the agent has no identity")
	}
	return id
}

// leafFor is a good certificate for a key that the agent does not have.
func leafFor(a *authority, id string) []byte {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	return a.sign(spiffeid.RequireFromString(id), &key.PublicKey, agentTTL).Raw
}

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

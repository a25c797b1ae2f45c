package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

const domain = "example.org"

var serverID = spiffeid.RequireFromString("spiffe://example.org/assay/server")

// harness is a server on real files, sockets and TLS, which tests can stop
// and start again.
type harness struct {
	t    *testing.T
	cfg  Config
	logs *syncBuffer

	server *Server
	rooms  *rooms
	reg    *prometheus.Registry
	cancel context.CancelFunc
	done   chan error
}

// start runs a server for a new trust domain.
func start(t *testing.T, changes ...func(*Config)) *harness {
	t.Helper()
	h := &harness{t: t, logs: &syncBuffer{}, cfg: newConfig(t)}
	for _, change := range changes {
		change(&h.cfg)
	}
	h.run()
	t.Cleanup(func() {
		h.stop()
		if t.Failed() {
			t.Log(h.logs.String())
		}
	})
	return h
}

// newConfig is a configuration below a directory of the test's own.
func newConfig(t *testing.T) Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "as") // short: socket paths are
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cfg := Config{
		TrustDomain: domain, Bootstrap: time.Now().UTC().Format(time.DateOnly), SealKeyFile: filepath.Join(dir, "seal.key"),
		Listen: "127.0.0.1:0", DataDir: filepath.Join(dir, "data"),
		Admin: AdminConfig{Socket: filepath.Join(dir, "run", "admin.sock")},
	}
	if err := WriteSealKey(cfg.SealKeyFile); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func (h *harness) run() {
	h.t.Helper()
	log := slog.New(slog.NewTextHandler(h.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	h.reg = prometheus.NewRegistry()
	var err error
	if h.server, err = New(h.cfg, Deps{Log: log, Registerer: h.reg, Version: "v-test"}); err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	if h.rooms, err = h.server.open(ctx); err != nil {
		cancel()
		h.t.Fatal(err)
	}
	h.cancel, h.done = cancel, make(chan error, 1)
	go func(s *Server, r *rooms, done chan<- error) { done <- s.run(ctx, r) }(h.server, h.rooms, h.done)
	select {
	case <-h.server.Started():
	case err := <-h.done:
		h.t.Fatalf("server ended at start: %v", err)
	case <-time.After(30 * time.Second):
		h.t.Fatal("server did not start")
	}
}

func (h *harness) stop() {
	h.t.Helper()
	if h.cancel == nil {
		return
	}
	h.cancel()
	h.cancel = nil
	if err := <-h.done; err != nil {
		h.t.Errorf("server ended with %v", err)
	}
}

func (h *harness) restart() {
	h.t.Helper()
	h.stop()
	h.run()
}

// audit returns the lines of the audit log so far.
func (h *harness) audit() []map[string]any {
	h.t.Helper()
	data, err := os.ReadFile(filepath.Join(h.cfg.DataDir, "audit.log"))
	if err != nil {
		h.t.Fatal(err)
	}
	var lines []map[string]any
	for raw := range bytes.Lines(data) {
		var line map[string]any
		if err := json.Unmarshal(raw, &line); err != nil {
			h.t.Fatalf("audit line %q: %v", raw, err)
		}
		lines = append(lines, line)
	}
	return lines
}

// audited returns the newest line of an action, nil if there is none.
func (h *harness) audited(action string) map[string]any {
	h.t.Helper()
	var found map[string]any
	for _, line := range h.audit() {
		if line["action"] == action {
			found = line
		}
	}
	return found
}

func protoID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

func sub(line map[string]any, path ...string) any {
	var at any = line
	for _, p := range path {
		m, ok := at.(map[string]any)
		if !ok {
			return nil
		}
		at = m[p]
	}
	return at
}

// operator is a connection to the admin socket.
type operator struct {
	conn    *grpc.ClientConn
	entries entryv1.EntryClient
	agents  spireagentv1.AgentClient
	bundles bundlev1.BundleClient
	svids   svidv1.SVIDClient
	admin   adminv1.AdminClient
}

func (h *harness) operator() *operator {
	h.t.Helper()
	conn, err := grpc.NewClient("unix://"+h.server.AdminSocket(), grpc.WithTransportCredentials(rpc.LocalCreds()))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = conn.Close() })
	return &operator{
		conn: conn, entries: entryv1.NewEntryClient(conn), agents: spireagentv1.NewAgentClient(conn),
		bundles: bundlev1.NewBundleClient(conn), svids: svidv1.NewSVIDClient(conn), admin: adminv1.NewAdminClient(conn),
	}
}

func (h *harness) token() string {
	h.t.Helper()
	token, err := h.operator().agents.CreateJoinToken(h.t.Context(), &spireagentv1.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		h.t.Fatal(err)
	}
	return token.GetValue()
}

// roots are those of the running server.
func (h *harness) roots() []*x509.Certificate {
	var out []*x509.Certificate
	for _, root := range h.rooms.authority.Bundle().Roots {
		out = append(out, root.Certificate)
	}
	return out
}

// dial connects to the agents' listener, with a certificate or without.
func (h *harness) dial(leaf *tls.Certificate) agentv1.AgentClient {
	h.t.Helper()
	return agentv1.NewAgentClient(h.connect(leaf))
}

func (h *harness) connect(leaf *tls.Certificate) *grpc.ClientConn {
	h.t.Helper()
	creds := rpc.ClientTLS(serverID, h.roots, func() *tls.Certificate { return leaf })
	conn, err := grpc.NewClient("passthrough:///"+h.server.Addr().String(), grpc.WithTransportCredentials(creds))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// agent is an attested agent.
type agent struct {
	id   spiffeid.ID
	key  *ecdsa.PrivateKey
	leaf *tls.Certificate
	agentv1.AgentClient
}

func (h *harness) newAgent() *agent {
	h.t.Helper()
	key := newKey(h.t)
	identity, err := h.attest(key, h.token())
	if err != nil {
		h.t.Fatal(err)
	}
	return h.agentOf(identity, key)
}

func (h *harness) agentOf(identity *agentv1.Identity, key *ecdsa.PrivateKey) *agent {
	h.t.Helper()
	leaf := certificate(h.t, identity, key)
	return &agent{id: spiffeid.RequireFromString(identity.GetAgentId()), key: key, leaf: leaf, AgentClient: h.dial(leaf)}
}

func certificate(t *testing.T, identity *agentv1.Identity, key *ecdsa.PrivateKey) *tls.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(identity.GetChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: identity.GetChain(), PrivateKey: key, Leaf: leaf}
}

// attest joins with a token over a connection of its own.
func (h *harness) attest(key *ecdsa.PrivateKey, token string) (*agentv1.Identity, error) {
	h.t.Helper()
	conn := h.connect(nil)
	defer conn.Close()
	return attestOver(h.t, agentv1.NewAgentClient(conn), &agentv1.AttestRequest_Start{
		Attestor: "join_token", Payload: []byte(token), Csr: newCSR(h.t, key, nil),
	})
}

func attestOver(t *testing.T, client agentv1.AgentClient, start *agentv1.AttestRequest_Start) (*agentv1.Identity, error) {
	t.Helper()
	stream, err := client.Attest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&agentv1.AttestRequest{Step: &agentv1.AttestRequest_Start_{Start: start}}); err != nil {
		t.Logf("send start: %v", err) // the answer tells why
	}
	resp, err := stream.Recv()
	return resp.GetIdentity(), err
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// newCSR is a request by key; ask may put things into it that it may not have.
func newCSR(t *testing.T, key *ecdsa.PrivateKey, ask func(*x509.CertificateRequest)) []byte {
	t.Helper()
	var template x509.CertificateRequest
	if ask != nil {
		ask(&template)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// entry is one for workloads of uid below parent.
func entry(parent spiffeid.ID, path string, selectors ...string) *types.Entry {
	e := &types.Entry{
		SpiffeId: &types.SPIFFEID{TrustDomain: domain, Path: path},
		ParentId: protoID(parent),
	}
	if len(selectors) == 0 {
		selectors = []string{"uid:1000"}
	}
	for _, s := range selectors {
		e.Selectors = append(e.Selectors, &types.Selector{Type: "unix", Value: s})
	}
	return e
}

// create stores entries that have to be accepted and returns their ids.
func (o *operator) create(t *testing.T, entries ...*types.Entry) []string {
	t.Helper()
	ids := make([]string, 0, len(entries))
	for batch := range slices.Chunk(entries, 500) {
		resp, err := o.entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: batch})
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range resp.GetResults() {
			if r.GetStatus().GetCode() != int32(codes.OK) {
				t.Fatalf("entry %d: %v", i, r.GetStatus())
			}
			ids = append(ids, r.GetEntry().GetId())
		}
	}
	return ids
}

// wantReason fails unless err is a refusal of that kind and reason.
func wantReason(t *testing.T, what string, err error, kind fault.Kind, reason string) {
	t.Helper()
	got := fault.FromStatus(err)
	if err == nil || !errors.Is(got, kind) || fault.ReasonOf(got) != reason {
		t.Errorf("%s: got %v, want %v %s", what, err, kind, reason)
	}
}

// eventually waits for something that a test can't be told about.
func eventually(t *testing.T, what string, within time.Duration, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s did not happen within %v", what, within)
		}
	}
}

// syncBuffer is a log that can be read while it is written.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// denials is how often the agents' listener refused for that reason.
func (h *harness) denials(t *testing.T, reason string) float64 {
	t.Helper()
	return h.counted(t, "assay_rpc_denials_total", reason)
}

// counted is a counter of the agents' listener, by reason.
func (h *harness) counted(t *testing.T, counter, reason string) (n float64) {
	t.Helper()
	families, err := h.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != counter {
			continue
		}
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if labels["server"] == "agents" && labels["reason"] == reason {
				n += m.GetCounter().GetValue()
			}
		}
	}
	return n
}

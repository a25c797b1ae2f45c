package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/api"
)

// TestMain also is the operator of another user: see TestOperatorNeedsToBeListed.
func TestMain(m *testing.M) {
	if socket := os.Getenv("ASSAY_TEST_OPERATOR_SOCKET"); socket != "" {
		os.Exit(operate(socket))
	}
	os.Exit(m.Run())
}

// operate asks for the status and exits with the gRPC code.
func operate(socket string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(rpc.LocalCreds()))
	if err != nil {
		return 100
	}
	defer conn.Close()
	_, err = adminv1.NewAdminClient(conn).Status(ctx, &adminv1.StatusRequest{})
	_, _ = os.Stderr.WriteString(status.Convert(err).Message())
	return int(status.Code(err))
}

// I11, NEG-25: every method of every service has a rule, and no rule is for a
// method that is not there.
func TestEveryMethodHasARule(t *testing.T) {
	h := start(t)
	own, err := h.server.newIdentity(t.Context(), h.rooms)
	if err != nil {
		t.Fatal(err)
	}
	servers, err := h.server.grpcServers(h.rooms, own, h.server.agentService(h.rooms), newHandover(nil), newRootWatch(nil, nil))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		server  *grpc.Server
		methods rpc.Methods
	}{
		"agents":    {servers.agents, api.AgentMethods("/assay/", h.rooms.registry, nil)},
		"operators": {servers.remote, api.RemoteMethods(nil, nil)},
		"admin":     {servers.admin, api.AdminMethods(api.Operators{}, nil)},
	} {
		if missing := rpc.Uncovered(c.server, c.methods); len(missing) > 0 {
			t.Errorf("%s: no rule for %v", name, missing)
		}
		served := 0
		for _, info := range c.server.GetServiceInfo() {
			served += len(info.Methods)
		}
		if served != len(c.methods) {
			t.Errorf("%s: %d rules for %d methods", name, len(c.methods), served)
		}
	}
	if _, ok := servers.admin.GetServiceInfo()["grpc.reflection.v1alpha.ServerReflection"]; !ok {
		t.Error("reflection v1alpha is not served")
	}
}

// NEG-24: other writings of a path are other methods, and the operators'
// methods are not the agents'. Who tries is in the audit log.
func TestOtherPathFormsAreUnknown(t *testing.T) {
	h := start(t)
	a := h.newAgent()
	conn := h.connect(a.leaf)
	for _, path := range []string{
		"//assay.agent.v1.Agent/Bundle", "/assay.agent.v1.agent/bundle", "/assay.agent.v1.Agent/Bundle/", "/assay.agent.v1.Agent%2FBundle",
		"/assay.agent.v1.Agent//Bundle", "/assay.agent.v1.Agent", "/", "/assay.admin.v1.Admin/status", "/spire.api.server.entry.v1.Entry//ListEntries",
	} {
		if err := conn.Invoke(t.Context(), path, &agentv1.BundleRequest{}, &agentv1.BundleResponse{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, path := range []string{
		"/assay.admin.v1.Admin/Status", "/spire.api.server.entry.v1.Entry/ListEntries", "/spire.api.server.svid.v1.SVID/MintX509SVID",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
	} {
		err := conn.Invoke(t.Context(), path, &agentv1.BundleRequest{}, &agentv1.BundleResponse{})
		wantReason(t, path, err, fault.Denied, "operator_not_allowed")
	}
	if err := conn.Invoke(t.Context(), "/assay.agent.v1.Agent/Bundle", &agentv1.BundleRequest{}, &agentv1.BundleResponse{}); err != nil {
		t.Errorf("the path itself: %v", err)
	}
	for _, reason := range []string{"method_unknown", "operator_not_allowed"} {
		eventually(t, reason+" in the audit log", 5*time.Second, func() bool {
			return slices.ContainsFunc(h.audit(), func(line map[string]any) bool {
				return line["action"] == "call.refuse" && sub(line, "result", "reason") == reason && sub(line, "actor", "spiffe_id") == a.id.String()
			})
		})
	}
	if err := conn.Invoke(t.Context(), "assay.agent.v1.Agent/Bundle", &agentv1.BundleRequest{}, &agentv1.BundleResponse{}); err == nil {
		t.Error("a path without its first slash is served")
	}
}

func TestAgentsMethodsNeedACertificateAndBundleDoesNot(t *testing.T) {
	h := start(t)
	client := h.dial(nil)
	b, err := client.Bundle(t.Context(), &agentv1.BundleRequest{})
	if err != nil || len(b.GetBundle().GetX509Authorities()) != 1 {
		t.Errorf("%v, %v", b, err)
	}
	_, err = client.Renew(t.Context(), &agentv1.RenewRequest{})
	wantReason(t, "renew", err, fault.Unauthenticated, "agent_svid_missing")
	_, err = client.SignX509(t.Context(), &agentv1.SignX509Request{})
	wantReason(t, "sign", err, fault.Unauthenticated, "agent_svid_missing")
	stream, err := client.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantReason(t, "sync", err, fault.Unauthenticated, "agent_svid_missing")
}

// A workload's certificate is a good one of this trust domain and no agent's.
func TestWorkloadIsNoAgent(t *testing.T) {
	h := start(t)
	a := h.newAgent()
	id := h.operator().create(t, entry(a.id, "/workload"))[0]
	key := newKey(t)
	resp, err := a.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{EntryId: id, Csr: newCSR(t, key, nil)}}})
	if err != nil {
		t.Fatal(err)
	}
	leaf := certificate(t, &agentv1.Identity{Chain: resp.GetResults()[0].GetChain().GetCertificates()}, key)
	_, err = h.dial(leaf).SignX509(t.Context(), &agentv1.SignX509Request{})
	wantReason(t, "workload", err, fault.Denied, "not_an_agent")
}

func TestServerSpeaksTLS13OnlyAsItself(t *testing.T) { // X509-11: as a leaf of its own
	h := start(t)
	_, err := tls.Dial("tcp", h.server.Addr().String(), &tls.Config{MaxVersion: tls.VersionTLS12, MinVersion: tls.VersionTLS12, InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err == nil {
		t.Error("TLS 1.2 is accepted")
	}
	conn, err := tls.Dial("tcp", h.server.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	chain := conn.ConnectionState().PeerCertificates
	id, err := rpc.VerifyPeer(chain, h.rooms.authority.Bundle().Pool(), serverID.TrustDomain(), time.Now())
	if err != nil || id != serverID {
		t.Errorf("the server is %v, %v", id, err)
	}
	if life := time.Until(chain[0].NotAfter); life > time.Hour {
		t.Errorf("its certificate lives %v", life)
	}
	if got := gauge(t, h.reg, "assay_server_svid_not_after_timestamp_seconds"); int64(got) != chain[0].NotAfter.Unix() {
		t.Errorf("metric says %v", got)
	}
}

func gauge(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func TestServerRenewsItsCertificateWithoutARestart(t *testing.T) {
	h := start(t, func(c *Config) { c.CA.X509SVIDTTL = 5 * time.Second })
	serial := func() string {
		conn, err := tls.Dial("tcp", h.server.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	first := serial()
	eventually(t, "a new certificate", 10*time.Second, func() bool { return serial() != first })
	if err := h.server.Ready(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestRestartKeepsEverything(t *testing.T) {
	h := start(t)
	o, a := h.operator(), h.newAgent()
	ids := o.create(t, entry(a.id, "/a"), entry(a.id, "/b"))
	token := h.token()
	before := one(t, openSync(t, a, nil))
	h.cfg.Bootstrap = "" // nothing has to be made
	h.restart()
	if got := len(h.rooms.registry.Agents()); got != 1 {
		t.Errorf("%d agents", got)
	}
	same := h.agentOf(&agentv1.Identity{AgentId: a.id.String(), Chain: a.leaf.Certificate}, a.key)
	after := one(t, openSync(t, same, nil))
	if after.GetEpoch() != before.GetEpoch() || after.GetRevision() < before.GetRevision() || len(after.GetEntries()) != 2 ||
		after.GetBundle().GetSequence() != before.GetBundle().GetSequence() ||
		!bytes.Equal(after.GetBundle().GetX509Authorities()[0].GetCertificate(), before.GetBundle().GetX509Authorities()[0].GetCertificate()) {
		t.Errorf("before %v, after %v", before, after)
	}
	resp, err := same.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{EntryId: ids[1], Csr: newCSR(t, newKey(t), nil)}}})
	if err != nil || resp.GetResults()[0].GetChain() == nil {
		t.Errorf("%v, %v", resp, err)
	}
	if _, err := h.attest(newKey(t), token); err != nil {
		t.Errorf("the token from before: %v", err)
	}
	_, err = h.attest(newKey(t), token)
	wantReason(t, "the token again", err, fault.Denied, "join_token_invalid")
	lines := h.audit()
	for i, line := range lines {
		if line["seq"] != float64(i+1) {
			t.Fatalf("audit line %d has number %v", i, line["seq"])
		}
	}
}

// NEG-44: a socket that somebody removed comes back.
func TestRemovedAdminSocketComesBack(t *testing.T) {
	h := start(t)
	if err := os.Remove(h.server.AdminSocket()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a new socket", time.Minute, func() bool {
		_, err := os.Stat(h.server.AdminSocket())
		return err == nil
	})
	if _, err := h.operator().admin.Status(t.Context(), &adminv1.StatusRequest{}); err != nil {
		t.Error(err)
	}
	h.stop()
	if _, err := os.Stat(h.server.AdminSocket()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

// A server that was killed leaves its socket; it must not be in its own way.
func TestDeadSocketIsReplaced(t *testing.T) {
	cfg := newConfig(t)
	cfg.Admin.Group = "30002"
	if err := os.MkdirAll(filepath.Dir(cfg.Admin.Socket), 0o750); err != nil {
		t.Fatal(err)
	}
	lis, err := net.ListenUnix("unix", &net.UnixAddr{Name: cfg.Admin.Socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	lis.SetUnlinkOnClose(false)
	if err := errors.Join(lis.Close(), os.Chmod(cfg.Admin.Socket, 0o660)); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(cfg.Admin.Socket, -1, 30002); err != nil {
			t.Fatal(err)
		}
	} else {
		cfg.Admin.Group = ""
	}
	h := start(t, func(c *Config) { *c = cfg })
	if _, err := h.operator().admin.Status(t.Context(), &adminv1.StatusRequest{}); err != nil {
		t.Error(err)
	}
}

// NEG-20
func TestConnectionsWithoutACertificateAreBounded(t *testing.T) {
	h := start(t, func(c *Config) { c.Limits.AnonymousConnections = 5 })
	a := h.newAgent()
	if _, err := a.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of earlier connections", 10*time.Second, func() bool {
		var open []net.Conn
		defer func() {
			for _, c := range open {
				_ = c.Close()
			}
		}()
		closed := 0
		for range 20 {
			conn, err := net.Dial("tcp", h.server.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, conn)
		}
		for _, conn := range open {
			// A place is kept by silence; who has none is turned away at once.
			if err := conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				closed++
			}
		}
		if _, err := a.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
			t.Errorf("an agent suffers from strangers: %v", err)
		}
		return closed >= 15
	})
}

func TestConnectionsOfOneAgentAreBounded(t *testing.T) {
	h := start(t, func(c *Config) { c.Limits.AgentConnections, c.Limits.AnonymousConnections = 2, 4 })
	a, other := h.newAgent(), h.newAgent()
	// Who has shown a certificate takes no stranger's place.
	for range 6 {
		next := h.newAgent()
		if _, err := next.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
		t.Fatal(err)
	}
	second := h.connect(a.leaf)
	if _, err := agentv1.NewAgentClient(second).SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.dial(a.leaf).SignX509(t.Context(), &agentv1.SignX509Request{}); status.Code(err) != codes.Unavailable {
		t.Errorf("a third connection: %v", err)
	}
	if _, err := other.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
		t.Errorf("another agent: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a place for a new connection", 5*time.Second, func() bool {
		_, err := h.dial(a.leaf).SignX509(t.Context(), &agentv1.SignX509Request{})
		return err == nil
	})
}

func TestRPCsAreCounted(t *testing.T) {
	h := start(t)
	if _, err := h.operator().admin.Status(t.Context(), &adminv1.StatusRequest{}); err != nil {
		t.Fatal(err)
	}
	if n, err := testutil.GatherAndCount(h.reg, "assay_rpc_requests_total"); err != nil || n == 0 {
		t.Errorf("%d, %v", n, err)
	}
}

// wantNowhere looks for a secret in everything that the server has written.
func (h *harness) wantNowhere(t *testing.T, secret string) {
	t.Helper()
	err := filepath.WalkDir(h.cfg.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte(secret)) {
			t.Errorf("%s holds the secret", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(h.logs.String(), secret) {
		t.Error("the log holds the secret")
	}
}

// A write to the store that may or may not have been kept ends the server with
// the reason that becomes exit code 74 (NEG-53).
func TestServerEndsWhenAWriteMayBeLost(t *testing.T) {
	// In a process of its own: the limit below is one of the whole process, and
	// package testing writes files as well.
	const alone = "ASSAY_TEST_ALONE"
	if os.Getenv(alone) == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), alone+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("PASS")) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	h := start(t)
	o := h.operator()
	o.create(t, entry(node, "/a"))
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	// From now on every write to a file fails, with an error that is not
	// "no space".
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	resp, err := o.entries.BatchCreateEntry(t.Context(), createOf(entry(node, "/b")))
	if back := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); back != nil {
		t.Fatal(back)
	}
	if err == nil && resp.GetResults()[0].GetStatus().GetCode() == 0 {
		t.Error("a write that failed was reported as done")
	}
	select {
	case err = <-h.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the server goes on")
	}
	h.cancel()
	h.cancel = nil
	if fault.ReasonOf(err) != "store_commit_unknown" {
		t.Errorf("the server ended with %v", err)
	}
	h.run()
	if _, err := h.operator().entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil {
		t.Error(err)
	}
}

func TestFloodOfAttestationsIsRefusedAndAgentsAreServed(t *testing.T) {
	h := start(t, func(c *Config) { c.Limits.AttestRate = 1 })
	a := h.newAgent()
	refused := 0
	for range 30 {
		if _, err := h.attest(newKey(t), "x"); fault.ReasonOf(fault.FromStatus(err)) == "attest_rate" {
			refused++
			if status.Code(err) != codes.ResourceExhausted {
				t.Error(err)
			}
		}
	}
	if refused < 10 {
		t.Errorf("%d of 30 were refused", refused)
	}
	if _, err := a.Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, a.key, nil)}); err != nil {
		t.Error(err)
	}
}

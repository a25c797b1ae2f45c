package agent_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/agent"
	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// mine is an entry that this process matches.
func mine(path string) *agentv1.Entry {
	return &agentv1.Entry{
		Id: "entry-1", SpiffeId: "spiffe://example.org/" + path, CreatedAt: timestamppb.Now(),
		Selectors: []*agentv1.Selector{{Type: "unix", Value: "uid:" + strconv.Itoa(os.Geteuid())}},
	}
}

// machine is the place of one agent, which survives its restarts.
type machine struct {
	t      *testing.T
	cfg    agent.Config
	agent  *agent.Agent
	log    logBuffer
	level  slog.Level
	reg    *prometheus.Registry
	cancel context.CancelFunc
	done   chan struct{}
	err    error
}

func newMachine(t *testing.T, f *fake) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "assay") // short: a socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	m := &machine{t: t, cfg: agent.Config{
		TrustDomain: td.Name(), Server: agent.ServerConfig{Addresses: []string{f.addr}}, Pin: f.pin(),
		JoinTokenFile: filepath.Join(dir, "token"), Sockets: agent.SocketsConfig{Dir: filepath.Join(dir, "pub")},
		DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"),
	}}
	if err := os.WriteFile(m.cfg.JoinTokenFile, []byte(f.token), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if m.cancel != nil {
			m.cancel()
			<-m.done
		}
	})
	return m
}

func (m *machine) start() {
	m.t.Helper()
	m.reg = prometheus.NewRegistry()
	var err error
	m.agent, err = agent.New(m.cfg, agent.Deps{Log: slog.New(slog.NewTextHandler(&m.log, &slog.HandlerOptions{Level: m.level})), Registerer: m.reg, Version: "test"})
	if err != nil {
		m.t.Fatal(err)
	}
	if err := m.agent.Ready(context.Background()); fault.ReasonOf(err) != "agent_starting" {
		m.t.Errorf("ready before Run: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel = cancel
	m.done = make(chan struct{})
	go func() {
		m.err = m.agent.Run(ctx)
		close(m.done)
	}()
}

func (m *machine) stop() error {
	m.cancel()
	<-m.done
	return m.err
}

// eventually polls until check succeeds.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("waiting for %s: %v", what, err)
		case <-tick.C:
		}
	}
}

func (m *machine) fetch() (*x509svid.SVID, error) {
	// Without a deadline that the agent knows: it holds the call for longer.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer time.AfterFunc(20*time.Second, cancel).Stop()
	return workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+filepath.Join(m.cfg.Sockets.Dir, "api.sock")))
}

func (m *machine) awaitReady() {
	m.t.Helper()
	eventually(m.t, "readiness", func() error { return m.agent.Ready(context.Background()) })
}

func TestAgentJoinsAndServesAWorkload(t *testing.T) {
	f := newFake(t, mine("web"))
	f.start(t)
	m := newMachine(t, f)
	m.start()
	m.awaitReady()
	svid, err := m.fetch()
	if err != nil || svid.ID.String() != "spiffe://example.org/web" {
		t.Fatalf("%v, %v", svid, err)
	}
	if len(m.log.lines("serving workloads", "callers_pinned_by=p")) != 1 {
		t.Error("the log does not say how callers are pinned")
	}
	for path, mode := range map[string]os.FileMode{
		m.cfg.Sockets.Dir: 0o755 | os.ModeDir, filepath.Join(m.cfg.Sockets.Dir, "api.sock"): 0o666 | os.ModeSocket, filepath.Join(m.cfg.Sockets.Dir, "sds.sock"): 0o666 | os.ModeSocket,
		m.cfg.DataDir: 0o700 | os.ModeDir, m.cfg.RunDir: 0o700 | os.ModeDir,
	} {
		if info := must(os.Stat(path)); info.Mode() != mode {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
	}
	want := map[string]bool{}
	for _, name := range []string{
		"svid_not_after_timestamp_seconds", "last_sync_timestamp_seconds", "entries", "svids",
		"workload_svid_earliest_not_after_timestamp_seconds", "bundle_sequence", "sync_connected", "authority_not_after_timestamp_seconds",
	} {
		want["assay_agent_"+name] = true
	}
	for _, family := range must(m.reg.Gather()) {
		if want[family.GetName()] && family.GetMetric()[0].GetGauge().GetValue() > 0 {
			delete(want, family.GetName())
		}
	}
	if len(want) > 0 {
		t.Errorf("metrics missing or zero: %v", want)
	}
	if err := m.stop(); err != nil {
		t.Fatal(err)
	}
	if err := m.agent.Ready(context.Background()); fault.ReasonOf(err) != "agent_starting" {
		t.Errorf("ready after Run: %v", err)
	}
}

// I9, P4: with the server gone, also over a restart of the agent.
func TestAgentServesThroughAnOutageAndItsRestart(t *testing.T) {
	f := newFake(t, mine("web"))
	f.start(t)
	m := newMachine(t, f)
	m.start()
	m.awaitReady()
	before, err := m.fetch()
	if err != nil {
		t.Fatal(err)
	}
	f.stop()
	if err := m.stop(); err != nil {
		t.Fatal(err)
	}
	m.start()
	m.awaitReady()
	after, err := m.fetch()
	if err != nil || after.Certificates[0].SerialNumber.Cmp(before.Certificates[0].SerialNumber) != 0 {
		t.Fatalf("%v, %v", after, err)
	}
	f.start(t)
	if err := m.stop(); err != nil {
		t.Fatal(err)
	}
	if f.joined != 1 {
		t.Errorf("joined %d times", f.joined)
	}
}

// NEG-13: a banned agent keeps nothing and ends with agent_banned.
func TestBannedAgentKeepsNothing(t *testing.T) {
	f := newFake(t, mine("web"))
	f.start(t)
	m := newMachine(t, f)
	m.start()
	m.awaitReady()
	if _, err := m.fetch(); err != nil {
		t.Fatal(err)
	}
	sealed := filepath.Join(m.cfg.RunDir, "svids.sealed")
	eventually(t, "the sealed file", func() error { _, err := os.Stat(sealed); return err })
	f.ban()
	f.stop() // the ban is seen on the next connection
	f.start(t)
	select {
	case <-m.done:
	case <-time.After(20 * time.Second):
		t.Fatal("the agent goes on")
	}
	if err := m.stop(); fault.ReasonOf(err) != "agent_banned" || fault.KindOf(err) != fault.Denied {
		t.Errorf("ended with %v", err)
	}
	for _, path := range []string{sealed, filepath.Join(m.cfg.DataDir, "identity.json")} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestSecondAgentInOnePlaceIsRefused(t *testing.T) {
	f := newFake(t)
	f.start(t)
	m := newMachine(t, f)
	m.start()
	m.awaitReady()
	second, err := agent.New(m.cfg, agent.Deps{Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); fault.ReasonOf(err) != "data_dir_locked" {
		t.Error(err)
	}
	if err := m.agent.Ready(t.Context()); err != nil {
		t.Errorf("the first one: %v", err)
	}
}

func TestNewNeedsLogAndRegisterer(t *testing.T) {
	f := newFake(t)
	m := newMachine(t, f)
	if _, err := agent.New(m.cfg, agent.Deps{}); err == nil {
		t.Error("made without")
	}
	m.cfg.TrustDomain = ""
	if _, err := agent.New(m.cfg, agent.Deps{}); fault.ReasonOf(err) != "config_invalid" {
		t.Error(err)
	}
}

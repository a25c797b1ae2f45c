package rotation_test

import (
	"context"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/keys"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/rotation"
	"github.com/seed-caa81108/assay/server/store"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

type ledger struct {
	mu    sync.Mutex
	lines []audit.Line
}

func (l *ledger) Record(_ context.Context, lines ...audit.Line) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, lines...)
	return nil
}

func (l *ledger) taken(action string) []audit.Line {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(l.lines), func(line audit.Line) bool { return line.Action != action })
}

func (l *ledger) count(action, code string) (n int) {
	for _, line := range l.taken(action) {
		if line.Result.Code == code {
			n++
		}
	}
	return n
}

// site is a real authority on a real store, with a fleet that the test speaks
// for.
type site struct {
	t     *testing.T
	opts  ca.Options
	audit *ledger

	registry  *prometheus.Registry // of the rotator
	authority *ca.Authority
	rotator   *rotation.Rotator
	stop      context.CancelFunc
	ended     sync.WaitGroup

	mu        sync.Mutex
	agents    []*agent
	automatic bool
	clock     *schedule.Clock
	dozes     func() bool // whether an agent that is awake lets this look pass
}

// agent is what the server knows of one: it takes every bundle and renews all
// that it has as soon as a root is retired, unless it is asleep.
type agent struct {
	name   string
	asleep bool
	trusts []ca.Root // of the bundle that it acknowledged
	status registry.AgentStatus
}

func inBubble(t *testing.T, do func(*testing.T, *site)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		bolt, err := store.OpenBolt(store.BoltConfig{Dir: filepath.Join(dir, "store"), NoSync: true})
		if err != nil {
			t.Fatal(err)
		}
		seal, err := keys.NewSealKey()
		if err != nil {
			t.Fatal(err)
		}
		s := &site{t: t, audit: &ledger{}}
		s.opts = ca.Options{
			TrustDomain: td, AgentSVIDTTL: 12 * time.Hour, ReservedPrefix: "/assay/", Bootstrap: time.Now().UTC().Format(time.DateOnly),
			Store: bolt, Keys: keys.NewSealed(seal, td), MAC: seal.MAC, Audit: s.audit, Log: slog.New(slog.DiscardHandler),
		}
		s.start()
		defer func() { // t.Fatal, too, has to leave nobody behind
			s.kill()
			if err := bolt.Close(); err != nil {
				t.Error(err)
			}
		}()
		do(t, s)
	})
}

// start is a server that comes up on the store as it is.
func (s *site) start() {
	if err := s.open(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) open() error {
	authority, err := ca.Open(s.t.Context(), s.opts)
	if err != nil {
		return err
	}
	s.authority = authority
	s.registry = prometheus.NewPedanticRegistry()
	s.rotator = rotation.New(rotation.Options{
		Authority: s.authority, Fleet: s.fleet, MaxTTL: time.Hour, Audit: s.opts.Audit, Log: s.opts.Log, Automatic: s.automatic, Clock: s.clock,
		OwnAuthority: func() string { return s.authority.Issuer().AuthorityID }, Registerer: s.registry,
	})
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	s.ended.Go(func() { _ = s.authority.Run(ctx) })
	s.ended.Go(func() { _ = s.rotator.Run(ctx) })
	return nil
}

func (s *site) kill() {
	s.stop()
	s.ended.Wait()
}

func (s *site) join(names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		a := &agent{name: name}
		a.status.ID = spiffeid.RequireFromPath(td, "/assay/agent/join_token/"+name)
		a.status.Connected, a.status.ActiveSerial = true, "01"
		s.agents = append(s.agents, a)
	}
}

func (s *site) agent(name string, change func(*agent)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.agents {
		if a.name == name {
			change(a)
		}
	}
}

// fleet lets every agent that is awake do what an agent does.
func (s *site) fleet() []registry.AgentStatus {
	bundle, issuer := s.authority.Bundle(), s.authority.Issuer().AuthorityID
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []registry.AgentStatus
	for _, a := range s.agents {
		if !a.asleep && (s.dozes == nil || !s.dozes()) {
			a.trusts = bundle.Roots
			a.status.AcknowledgedSequence = bundle.Sequence
			a.status.NotAfter = time.Now().Add(12 * time.Hour)
			a.status.Authority = issuer
			a.status.ReportSequence = bundle.Sequence
			a.status.Live = []registry.LiveSVIDs{{AuthorityID: issuer, Count: 3, LatestExpiry: time.Now().Add(time.Hour)}}
		}
		list = append(list, a.status)
	}
	return list
}

func (s *site) request() rotation.Request {
	return rotation.Request{Who: "uid 0", Reason: "friday"}
}

func (s *site) begin(deadline time.Duration) rotation.Status {
	s.t.Helper()
	st, err := s.rotator.Start(s.t.Context(), s.request(), deadline)
	if err != nil {
		s.t.Fatal(err)
	}
	return st
}

func (s *site) status() rotation.Status {
	s.t.Helper()
	st, err := s.rotator.Status(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return st
}

// after lets time pass and returns the status then.
func (s *site) after(d time.Duration) rotation.Status {
	s.t.Helper()
	time.Sleep(d)
	synctest.Wait()
	return s.status()
}

func (s *site) state(id string) ca.State {
	for _, root := range s.authority.Authorities() {
		if root.ID == id {
			return root.State
		}
	}
	return ""
}

func wantReason(t *testing.T, err error, reason string) {
	t.Helper()
	if fault.ReasonOf(err) != reason {
		t.Fatalf("got error %v, want reason %s", err, reason)
	}
}

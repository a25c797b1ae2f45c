package cache_test

import (
	"context"
	"crypto/x509"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// agent is a cache with its surroundings on one machine.
type agent struct {
	t      *testing.T
	dir    string
	fake   *fake
	conns  *connector
	state  *state.State
	cache  *cache.Cache
	reg    *prometheus.Registry
	clock  *schedule.Clock
	log    io.Writer
	cancel context.CancelFunc
	done   chan struct{}
}

// newAgent returns a machine whose agent has attested.
func newAgent(t *testing.T, f *fake, dir string) *agent {
	t.Helper()
	a := &agent{t: t, dir: dir, fake: f, conns: &connector{fake: f}, log: io.Discard}
	a.open()
	a.attest("one")
	if err := a.state.Close(); err != nil {
		t.Fatal(err)
	}
	a.state = nil
	return a
}

func (a *agent) open() {
	a.t.Helper()
	var err error
	if a.state, err = state.Open(filepath.Join(a.dir, "data"), td); err != nil {
		a.t.Fatal(err)
	}
}

// attest gives the agent a new key and name.
func (a *agent) attest(name string) {
	a.t.Helper()
	id := spiffeid.RequireFromPath(td, "/assay/agent/join_token/"+name)
	key := must(a.state.NextKey())
	leaf := sign(leafTemplate(id, 12*time.Hour), a.fake.signer.issuer, &key.PublicKey, a.fake.signer.issuerKey)
	if err := a.state.SaveIdentity(state.Identity{AgentID: id, Key: key, Chain: []*x509.Certificate{leaf}}); err != nil {
		a.t.Fatal(err)
	}
}

func (a *agent) restart() {
	a.t.Helper()
	a.stop()
	a.start()
}

// inBubble runs a test with a server that is up and an attested agent, which
// is not started.
func inBubble(t *testing.T, do func(t *testing.T, f *fake, a *agent)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.start()
		a := newAgent(t, f, dir)
		defer func() {
			a.stop()
			f.stop()
		}()
		do(t, f, a)
	})
}

func sel(texts ...string) selector.Set {
	var list []selector.Selector
	for _, text := range texts {
		list = append(list, must(selector.Parse(text)))
	}
	return selector.NewSet(list...)
}

var born = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// entry makes an entry spiffe://example.org/<path> with the given selectors.
func entry(id, path string, selectors ...string) *agentv1.Entry {
	e := &agentv1.Entry{Id: id, SpiffeId: "spiffe://example.org/" + path, CreatedAt: timestamppb.New(born)}
	for _, s := range sel(selectors...) {
		e.Selectors = append(e.Selectors, &agentv1.Selector{Type: s.Type, Value: s.Value})
	}
	return e
}

// changed returns a copy of e after do.
func changed(e *agentv1.Entry, do func(e *agentv1.Entry)) *agentv1.Entry {
	e = proto.CloneOf(e)
	do(e)
	return e
}

func ttl(d time.Duration) func(*agentv1.Entry) {
	return func(e *agentv1.Entry) { e.X509SvidTtl = durationpb.New(d) }
}

// paths of a subscription's snapshot, or the reason why there is none.
func paths(s *cache.Subscription) []string {
	snap, err := s.Snapshot()
	if err != nil {
		return []string{"!" + fault.ReasonOf(err)}
	}
	var list []string
	for _, svid := range snap.SVIDs {
		list = append(list, svid.ID.Path()[1:])
	}
	return list
}

func wantPaths(t *testing.T, s *cache.Subscription, want ...string) {
	t.Helper()
	if got := paths(s); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// notified says whether the subscription was told of a change, and forgets it.
func notified(s *cache.Subscription) bool {
	select {
	case <-s.Changed():
		return true
	default:
		return false
	}
}

// awaitPaths waits until the subscription has the given paths, and says how
// long that took.
func awaitPaths(t *testing.T, s *cache.Subscription, want ...string) time.Duration {
	t.Helper()
	start := time.Now()
	for !slices.Equal(paths(s), want) {
		select {
		case <-s.Changed():
		case <-time.After(time.Hour):
			t.Fatalf("after an hour: got %v, want %v", paths(s), want)
		}
	}
	return time.Since(start)
}

// breakState makes the state's directory useless, mendState repairs it.
func (a *agent) breakState() {
	a.t.Helper()
	if err := os.Rename(filepath.Join(a.dir, "data"), filepath.Join(a.dir, "away")); err != nil {
		a.t.Fatal(err)
	}
}

func (a *agent) mendState() {
	a.t.Helper()
	if err := os.Rename(filepath.Join(a.dir, "away"), filepath.Join(a.dir, "data")); err != nil {
		a.t.Fatal(err)
	}
}

package registry_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/registry"
)

// attestedAgents makes n agents with certificates that live 12 hours.
func attestedAgents(t *testing.T, r *registry.Registry, n int) []spiffeid.ID {
	t.Helper()
	var agents []spiffeid.ID
	for i := range n {
		agents = append(agents, join(t, r, key(i+1)))
		issued(t, r, agents[i], "01", key(i+1))
		use(t, r, agents[i], "01")
	}
	slices.SortFunc(agents, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
	return agents
}

func lagging(w *registry.Reach) []spiffeid.ID {
	var out []spiffeid.ID
	for _, lag := range w.Lagging() {
		out = append(out, lag.ID)
	}
	return out
}

func TestReachFollowsEachAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		agents := attestedAgents(t, s.Registry, 3)
		early := s.Connected(agents[0], "1")
		early.Report(registry.Report{Revision: s.Revision() + 100}) // as it happens, it has it already
		revision := s.Revision()

		w := s.Reach(revision)
		defer w.Close()
		if w.Counted() != 3 || !slices.Equal(lagging(w), agents[1:]) {
			t.Fatalf("%d count, behind are %v", w.Counted(), w.Lagging())
		}
		c := s.Connected(agents[1], "1")
		<-w.News()
		if got := w.Lagging(); len(got) != 2 || !got[0].Connected || got[0].LastSeen.IsZero() || got[1].Connected || !got[1].LastSeen.IsZero() {
			t.Errorf("connected: %+v", got)
		}
		c.Report(registry.Report{Revision: revision - 1})
		<-w.News()
		if got := w.Lagging(); len(got) != 2 || got[0].Revision != revision-1 {
			t.Errorf("not far enough: %+v", got)
		}
		c.Report(registry.Report{Revision: revision})
		<-w.News()
		if got := lagging(w); !slices.Equal(got, agents[2:]) {
			t.Errorf("behind are %v", got)
		}
		c.Close()
		<-w.News()
		late := join(t, s.Registry, key(9)) // starts with all that there is
		if got := lagging(w); !slices.Equal(got, agents[2:]) {
			t.Errorf("behind are %v, %v came late", got, late)
		}
		for i := range 10 { // who is gone once, is gone
			c := s.Connected(agents[1], "1")
			c.Report(registry.Report{Revision: int64(i)})
			c.Close()
		}
		if got := lagging(w); !slices.Equal(got, agents[2:]) {
			t.Errorf("behind are %v", got)
		}
		w.Close()
		w.Close()
		select {
		case <-w.News():
		default:
		}
		s.Connected(agents[2], "1").Report(registry.Report{Revision: revision})
		select {
		case <-w.News():
			t.Error("news after the end")
		default:
		}
	})
}

func TestReachWaitsForNobodyWhoServesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		agents := attestedAgents(t, s.Registry, 4)
		if err := s.Ban(t.Context(), agents[0]); err != nil {
			t.Fatal(err)
		}
		fresh := join(t, s.Registry, key(8)) // its first certificate is not used yet
		issued(t, s.Registry, fresh, "08", key(8))
		w := s.Reach(s.Revision())
		defer w.Close()
		if got := lagging(w); w.Counted() != 4 || len(got) != 4 || slices.Contains(got, agents[0]) || !slices.Contains(got, fresh) {
			t.Fatalf("%d count, behind are %v", w.Counted(), got)
		}
		if err := s.Ban(t.Context(), agents[1]); err != nil {
			t.Fatal(err)
		}
		if err := s.Evict(t.Context(), agents[2]); err != nil {
			t.Fatal(err)
		}
		if got := lagging(w); len(got) != 2 || slices.Contains(got, agents[1]) || slices.Contains(got, agents[2]) {
			t.Errorf("banned %v and evicted %v; behind are %v", agents[1], agents[2], got)
		}
		time.Sleep(24 * time.Hour)
		if got := w.Lagging(); len(got) != 0 {
			t.Errorf("their certificates have ended: %v", got)
		}
	})
}

// An agent for which nothing changed has no update with the revision; one is
// sent because somebody waits for it.
func TestReachAsksThoseForWhomNothingChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		agents := attestedAgents(t, s.Registry, 2)
		feed := s.Follow(agents[0], "", 0)
		defer feed.Close()
		first := next(t, feed)
		create(t, s.Registry, web("/other", agents[1]))
		revision := s.Revision()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if u, err := feed.Next(ctx); err == nil {
			t.Fatalf("an update for a change of another: %+v", u)
		}

		w := s.Reach(revision)
		defer w.Close()
		u := next(t, feed)
		if u.Revision < revision || u.Revision <= first.Revision || u.Snapshot || len(u.Entries)+len(u.Removed) != 0 {
			t.Errorf("got %+v, want an empty update of revision %d", u, revision)
		}
		// Once, and nobody asks for what there is not.
		ahead := s.Reach(revision + 1000)
		ahead.Close()
		ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if u, err := feed.Next(ctx); err == nil {
			t.Errorf("another update: %+v", u)
		}
		// A change still gets through, and a feed that starts late has it.
		create(t, s.Registry, web("/mine", agents[0]))
		if u := next(t, feed); len(u.Entries) != 1 {
			t.Errorf("got %+v", u)
		}
		late := s.Follow(agents[1], "", 0)
		defer late.Close()
		s.Reach(s.Revision()).Close()
		if u := next(t, late); u.Revision < s.Revision() {
			t.Errorf("got %+v", u)
		}
	})
}

// Who gives up leaves nothing behind.
func TestWaitersThatGiveUpAreForgotten(t *testing.T) {
	s := start(t, t.TempDir())
	for range 100 {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.WaitRevision(ctx, s.Revision()+1000) }()
		cancel()
		wantFault(t, <-done, fault.NotReady, "request_ended")
	}
	if n := s.Waiters(); n != 0 {
		t.Errorf("%d waiters are left", n)
	}
}

package registry_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/store"
)

func TestFirstUpdateIsTheWholeViewAtOnce(t *testing.T) {
	s := start(t, t.TempDir())
	made := create(t, s.Registry, web("/b", node(1)), web("/a", node(1)), web("/c", node(2)))
	f := s.Follow(node(1), "", 0)
	defer f.Close()
	u := next(t, f)
	if !u.Snapshot || u.Epoch != s.Epoch() || u.Revision != s.Revision() || !u.CommittedAt.IsZero() ||
		!slices.Equal(ids(u.Entries), ids(made[:2])) || len(u.Removed) != 0 {
		t.Fatalf("got %+v", u)
	}
	empty := s.Follow(node(9), "", 0)
	defer empty.Close()
	if u := next(t, empty); !u.Snapshot || len(u.Entries) != 0 {
		t.Fatalf("an agent without entries got %+v", u)
	}
}

// The time from a commit to the first change is none, that to its followers at
// most 10 ms. // WL-24: the end of a request is a fault, not its context's error
func TestFirstChangeGoesOutAtOnceAndFollowersTogether(t *testing.T) { // WL-25
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		f := s.Follow(node(1), "", 0)
		defer f.Close()
		next(t, f)
		made := create(t, s.Registry, web("/first", node(1)))
		begin := time.Now()
		u := next(t, f)
		if time.Since(begin) != 0 || u.Snapshot || len(u.Entries) != 1 || u.Entries[0].ID != made[0].ID || u.Revision != s.Revision() || u.CommittedAt.IsZero() {
			t.Fatalf("after %v: %+v", time.Since(begin), u)
		}
		create(t, s.Registry, web("/second", node(1)))
		time.Sleep(4 * time.Millisecond)
		create(t, s.Registry, web("/third", node(1)))
		if err := s.DeleteEntries(t.Context(), []string{made[0].ID})[0]; err != nil {
			t.Fatal(err)
		}
		u = next(t, f)
		if time.Since(begin) != registry.Gather || len(u.Entries) != 2 || !slices.Equal(u.Removed, []string{made[0].ID}) {
			t.Fatalf("after %v: %+v", time.Since(begin), u)
		}
		time.Sleep(registry.Gather)
		begin = time.Now()
		create(t, s.Registry, web("/fourth", node(1)))
		if u = next(t, f); time.Since(begin) != 0 || len(u.Entries) != 1 {
			t.Fatalf("after a quiet time %v: %+v", time.Since(begin), u)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := f.Next(ctx)
		wantFault(t, err, fault.NotReady, "request_ended")
	})
}

func TestOthersChangesDoNotWakeAFeed(t *testing.T) { // NEG-42
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		f := s.Follow(node(1), "", 0)
		defer f.Close()
		next(t, f)
		var woken atomic.Int32
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			if _, err := f.Next(ctx); err == nil {
				woken.Add(1)
			}
		}()
		made := create(t, s.Registry, many(500, node(2))...)
		s.DeleteEntries(t.Context(), ids(made))
		synctest.Wait()
		if woken.Load() != 0 {
			t.Error("woken by the entries of another agent")
		}
		cancel()
		synctest.Wait()
	})
}

func TestMovedEntryLeavesOneAgentForAnother(t *testing.T) {
	s := start(t, t.TempDir())
	made := create(t, s.Registry, web("/a", node(1)))[0]
	from, to := s.Follow(node(1), "", 0), s.Follow(node(2), "", 0)
	defer from.Close()
	defer to.Close()
	next(t, from)
	next(t, to)
	if _, err := s.UpdateEntry(t.Context(), made.ID, func(e *registry.Entry) { e.ParentID = node(2) }); err != nil {
		t.Fatal(err)
	}
	if u := next(t, from); !slices.Equal(u.Removed, []string{made.ID}) || len(u.Entries) != 0 {
		t.Errorf("the old agent got %+v", u)
	}
	if u := next(t, to); !slices.Equal(ids(u.Entries), []string{made.ID}) || len(u.Removed) != 0 || u.Entries[0].Revision != 1 {
		t.Errorf("the new agent got %+v", u)
	}
	if _, err := s.EntryFor(node(1), made.ID); fault.ReasonOf(err) != "entry_not_authorized" {
		t.Errorf("the old agent may still sign: %v", err)
	}
}

func TestExpiredEntryLeavesTheViewAtItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		f := s.Follow(node(1), "", 0)
		defer f.Close()
		next(t, f)
		time.Sleep(time.Second) // the timer has to learn of an end sooner than it waits for
		late, soon := web("/late", node(1)), web("/soon", node(1))
		late.ExpiresAt, soon.ExpiresAt = time.Now().Add(5*time.Second), time.Now().Add(3*time.Second)
		made := create(t, s.Registry, late, soon)
		if u := next(t, f); len(u.Entries) != 2 {
			t.Fatalf("got %+v", u)
		}
		revision := s.Revision()
		begin := time.Now()
		for i, want := range []int{1, 0} {
			u := next(t, f)
			if after := time.Since(begin); after != time.Duration(3+2*i)*time.Second || !slices.Equal(u.Removed, []string{made[want].ID}) || !u.CommittedAt.Equal(made[want].ExpiresAt) {
				t.Fatalf("after %v: %+v", after, u)
			}
		}
		// Nothing was committed, yet who was away learns of it.
		back := s.Follow(node(1), s.Epoch(), revision)
		defer back.Close()
		if u := next(t, back); u.Snapshot || len(u.Removed) != 2 || s.Revision() != revision {
			t.Errorf("a resumed agent got %+v", u)
		}
		if _, ok := s.Entry(made[0].ID); !ok {
			t.Error("operators don't see it any more")
		}
	})
}

func TestEntryExpiredWhileNoServerRanIsNotResumedOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		short := web("/short", node(1))
		short.ExpiresAt = time.Now().Add(time.Minute)
		create(t, s.Registry, short, web("/a", node(1)))
		revision := s.Revision()
		if err := s.stop(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		s = start(t, s.dir)
		f := s.Follow(node(1), s.Epoch(), revision)
		defer f.Close()
		if u := next(t, f); !u.Snapshot || len(u.Entries) != 1 || u.Revision != revision {
			t.Errorf("got %+v", u)
		}
	})
}

func TestResume(t *testing.T) {
	s := start(t, t.TempDir())
	s.LimitChanges(10)
	made := create(t, s.Registry, many(3, node(1))...)
	f := s.Follow(node(1), "", 0)
	at := next(t, f).Revision
	f.Close()
	resume := func(epoch string, since int64) registry.Update {
		t.Helper()
		f := s.Follow(node(1), epoch, since)
		defer f.Close()
		return next(t, f)
	}
	if u := resume(s.Epoch(), at); u.Snapshot || len(u.Entries)+len(u.Removed) != 0 || u.Revision != at {
		t.Errorf("nothing changed: %+v", u)
	}
	if err := s.DeleteEntries(t.Context(), []string{made[0].ID})[0]; err != nil {
		t.Fatal(err)
	}
	added := create(t, s.Registry, web("/added", node(1)))
	u := resume(s.Epoch(), at)
	if u.Snapshot || !slices.Equal(u.Removed, []string{made[0].ID}) || !slices.Equal(ids(u.Entries), ids(added)) || u.CommittedAt.IsZero() {
		t.Errorf("two changes: %+v", u)
	}
	for name, u := range map[string]registry.Update{
		"another epoch": resume("other", at), "no epoch": resume("", at), "no revision": resume(s.Epoch(), 0),
		"the future": resume(s.Epoch(), s.Revision()+1), "before the store": resume(s.Epoch(), 1),
	} {
		if !u.Snapshot || len(u.Entries) != 3 {
			t.Errorf("%s: %+v", name, u)
		}
	}
	at = s.Revision()
	create(t, s.Registry, many(20, node(2))...) // more than is remembered
	if u := resume(s.Epoch(), at); u.Snapshot || len(u.Entries) != 0 {
		t.Errorf("only others changed: %+v", u)
	}
	if u := resume(s.Epoch(), at-1); !u.Snapshot {
		t.Errorf("changes are forgotten: %+v", u)
	}
	// The same for an agent of which nothing is left but what it may hold.
	at = s.Revision()
	for _, err := range s.DeleteEntries(t.Context(), append(ids(added), made[1].ID, made[2].ID)) {
		if err != nil {
			t.Fatal(err)
		}
	}
	create(t, s.Registry, many(20, node(3))...)
	if u := resume(s.Epoch(), at); s.Parents() != 2 || !u.Snapshot || len(u.Entries) != 0 {
		t.Errorf("all changes are forgotten: %d parents, %+v", s.Parents(), u)
	}
}

func TestSlowReaderGetsASnapshot(t *testing.T) {
	s := start(t, t.TempDir())
	s.LimitChanges(10)
	f := s.Follow(node(1), "", 0)
	defer f.Close()
	next(t, f)
	create(t, s.Registry, many(30, node(1))...)
	if u := next(t, f); !u.Snapshot || len(u.Entries) != 30 {
		t.Errorf("got a snapshot: %v, %d entries", u.Snapshot, len(u.Entries))
	}
	create(t, s.Registry, web("/more", node(1)))
	if u := next(t, f); u.Snapshot || len(u.Entries) != 1 {
		t.Errorf("then %+v", u)
	}
}

// forgetful is a store whose watch loses its place: it hears nothing from lose
// until list, and then that the history is gone.
type forgetful struct {
	store.KV
	lose, lost, list chan struct{}
}

func (k *forgetful) Watch(ctx context.Context, prefix string, from int64) iter.Seq2[store.Batch, error] {
	return func(yield func(store.Batch, error) bool) {
		inner, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() {
			select {
			case <-k.lose:
				cancel()
			case <-inner.Done():
			}
		}()
		for b, err := range k.KV.Watch(inner, prefix, from) {
			if err != nil && ctx.Err() == nil {
				k.lost <- struct{}{}
				<-k.list
				yield(store.Batch{}, store.ErrCompacted)
				return
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

func TestLostWatchIsMadeUpForByListing(t *testing.T) {
	s := start(t, t.TempDir())
	kv := &forgetful{KV: s.kv, lose: make(chan struct{}), lost: make(chan struct{}), list: make(chan struct{})}
	r, _ := run(t, options(kv))
	made := create(t, s.Registry, many(5, node(1))...)
	other := create(t, s.Registry, web("/other", node(2)))[0]
	if err := r.WaitRevision(t.Context(), s.Revision()); err != nil {
		t.Fatal(err)
	}
	f, quiet := r.Follow(node(1), "", 0), r.Follow(node(2), "", 0)
	defer f.Close()
	defer quiet.Close()
	next(t, f)
	since := next(t, quiet).Revision

	kv.lose <- struct{}{}
	<-kv.lost
	for _, err := range s.DeleteEntries(t.Context(), []string{made[0].ID}) {
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.UpdateEntry(t.Context(), made[1].ID, func(e *registry.Entry) { e.Hint = "new" }); err != nil {
		t.Fatal(err)
	}
	added := create(t, s.Registry, web("/added", node(1)))[0]
	kv.list <- struct{}{}

	u := next(t, f)
	if u.Snapshot || !slices.Equal(u.Removed, []string{made[0].ID}) || len(u.Entries) != 2 || u.Revision != s.Revision() {
		t.Errorf("got %+v", u)
	}
	if !slices.Contains(ids(u.Entries), added.ID) || !slices.Contains(ids(u.Entries), made[1].ID) {
		t.Errorf("got %v", ids(u.Entries))
	}
	// What did not change is not sent again, and resuming over the gap is not trusted.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := quiet.Next(ctx); fault.ReasonOf(err) != "request_ended" {
		t.Errorf("a feed without changes: %v", err)
	}
	back := r.Follow(node(2), r.Epoch(), since)
	defer back.Close()
	if u := next(t, back); !u.Snapshot || !slices.Equal(ids(u.Entries), []string{other.ID}) {
		t.Errorf("resumed over a gap: %+v", u)
	}
	create(t, r, web("/later", node(1))) // and the watch goes on
	if u := next(t, f); len(u.Entries) != 1 {
		t.Errorf("got %+v", u)
	}
}

// follower is an agent: it applies updates and remembers where it is.
type follower struct {
	agent    spiffeid.ID
	epoch    string
	revision int64
	view     map[string]registry.Entry
	feed     *registry.Feed
}

func (f *follower) apply(u registry.Update) {
	if u.Snapshot {
		clear(f.view)
	}
	for _, e := range u.Entries {
		f.view[e.ID] = e
	}
	for _, id := range u.Removed {
		delete(f.view, id)
	}
	f.epoch, f.revision = u.Epoch, u.Revision
}

// catchUp applies updates until none comes for a while, and that at a moment at
// which no entry ends: whether its end was told by then is a toss-up.
func (f *follower) catchUp(t *testing.T, r *registry.Registry) {
	t.Helper()
	if f.feed == nil {
		f.feed = r.Follow(f.agent, f.epoch, f.revision)
	}
	for {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		u, err := f.feed.Next(ctx)
		cancel()
		if err == nil {
			f.apply(u)
			continue
		}
		if !errors.Is(err, fault.NotReady) {
			t.Fatal(err)
		}
		list, _ := r.ListEntries(registry.EntryFilter{}, "", 0)
		if !slices.ContainsFunc(list, func(e registry.Entry) bool { return e.ExpiresAt.Equal(time.Now()) }) {
			return
		}
	}
}

func (f *follower) disconnect() {
	if f.feed != nil {
		f.feed.Close()
		f.feed = nil
	}
}

// direct is the view of an agent as the rules have it, without any index.
func direct(r *registry.Registry, agent spiffeid.ID) map[string]registry.Entry {
	view := map[string]registry.Entry{}
	list, _ := r.ListEntries(registry.EntryFilter{}, "", 0)
	for _, e := range list {
		if got, err := r.EntryFor(agent, e.ID); err == nil {
			view[e.ID] = got
		}
	}
	return view
}

// Whatever happens, in whatever order: a follower that has caught up has the
// view that the rules give its agent.
func TestFollowerAlwaysEndsUpWithTheDirectView(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { followAtRandom(t, rand.New(rand.NewPCG(seed, 7))) })
		})
	}
}

func followAtRandom(t *testing.T, rnd *rand.Rand) {
	s := start(t, t.TempDir())
	s.LimitChanges(40)
	followers := make([]*follower, 4)
	for i := range followers {
		followers[i] = &follower{agent: node(i % 3), view: map[string]registry.Entry{}}
	}
	fresh := 0
	someID := func() string {
		list, _ := s.ListEntries(registry.EntryFilter{}, "", 0)
		if len(list) == 0 {
			return "none"
		}
		return list[rnd.IntN(len(list))].ID
	}
	for range 250 {
		switch rnd.IntN(12) {
		case 0, 1, 2:
			var batch []registry.Entry
			for range 1 + rnd.IntN(8) {
				fresh++
				e := web(fmt.Sprintf("/w/%d", fresh), node(rnd.IntN(3)))
				if rnd.IntN(4) == 0 {
					e.ExpiresAt = time.Now().Add(time.Duration(rnd.IntN(20000)+1) * time.Millisecond)
				}
				batch = append(batch, e)
			}
			create(t, s.Registry, batch...)
		case 3, 4:
			s.DeleteEntries(t.Context(), []string{someID(), someID(), someID()})
		case 5, 6:
			agent, ends := node(rnd.IntN(3)), time.Time{}
			if rnd.IntN(2) == 0 {
				ends = time.Now().Add(time.Duration(rnd.IntN(20000)+1) * time.Millisecond)
			}
			_, err := s.UpdateEntry(t.Context(), someID(), func(e *registry.Entry) { e.ParentID, e.ExpiresAt = agent, ends })
			if err != nil && !errors.Is(err, fault.NotFound) {
				t.Fatal(err)
			}
		case 7:
			followers[rnd.IntN(len(followers))].disconnect()
		case 8, 9:
			followers[rnd.IntN(len(followers))].catchUp(t, s.Registry)
		case 10:
			time.Sleep(time.Duration(rnd.IntN(8000)) * time.Millisecond)
		case 11:
			if rnd.IntN(4) > 0 {
				break
			}
			for _, f := range followers {
				f.disconnect()
			}
			s = s.restart(t)
			s.LimitChanges(40)
		}
	}
	for i, f := range followers {
		f.catchUp(t, s.Registry)
		want := direct(s.Registry, f.agent)
		for entry, e := range want {
			if got, ok := f.view[entry]; !ok || got.Revision != e.Revision || got.ParentID != f.agent {
				t.Errorf("follower %d has %+v, want %+v", i, got, e)
			}
		}
		if len(f.view) != len(want) {
			t.Errorf("follower %d has %d entries, want %d", i, len(f.view), len(want))
		}
		f.disconnect()
	}
}

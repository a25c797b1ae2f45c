package cache_test

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

func TestEntriesThatCantBeServedAreLeftOut(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		bad := map[string]func(*agentv1.Entry){
			"no selectors":         func(e *agentv1.Entry) { e.Selectors = nil },
			"empty selector":       func(e *agentv1.Entry) { e.Selectors[0].Value = "" },
			"foreign trust domain": func(e *agentv1.Entry) { e.SpiffeId = "spiffe://other.org/x" },
			"trust domain itself":  func(e *agentv1.Entry) { e.SpiffeId = "spiffe://example.org" },
			"the server":           func(e *agentv1.Entry) { e.SpiffeId = "spiffe://example.org/assay/server" },
			"an agent":             func(e *agentv1.Entry) { e.SpiffeId = "spiffe://example.org/assay/agent/x" },
			"not an ID":            func(e *agentv1.Entry) { e.SpiffeId = "web" },
		}
		list := []*agentv1.Entry{entry("good", "web", "unix:uid:1")}
		for name, spoil := range bad {
			list = append(list, changed(entry(name, "bad", "unix:uid:1"), spoil))
		}
		f.set(list...)
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "web")
		if !slices.Equal(f.seen().signed, []string{"good"}) {
			t.Errorf("signed %v", f.seen().signed)
		}
		// One that becomes bad is not served as it was before.
		f.set(changed(entry("good", "web", "unix:uid:1"), bad["an agent"]))
		synctest.Wait()
		wantPaths(t, s, "!no_identity")
	})
}

// A taint makes holders renew at once, soonest end first; until the server
// signs under another root there is no storm. // BUN-23
func TestTaintedAuthorityIsLeftAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		for i := range 100 {
			f.set(entry(fmt.Sprint(i), fmt.Sprintf("w/%d", i), "unix:uid:1"))
		}
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		must(s.Snapshot())
		old, next := f.signer, newAuthority("root 2")
		f.changeBundle(func() { f.bundled = append(f.bundled, next) })
		synctest.Wait()
		f.with(func() { f.signer = next })
		start, before := time.Now(), len(f.seen().signed)
		f.changeBundle(func() { old.tainted = true })
		synctest.Wait()
		for _, svid := range must(s.Snapshot()).SVIDs {
			if svid.AuthorityID != next.id() {
				t.Fatalf("%v is still under the old root", svid.ID)
			}
		}
		if time.Since(start) > 0 || len(f.seen().signed)-before != 100 {
			t.Errorf("%d signatures in %v", len(f.seen().signed)-before, time.Since(start))
		}
		// The server's own root gets tainted without a successor.
		before = len(f.seen().signed)
		f.changeBundle(func() { next.tainted = true })
		time.Sleep(10 * time.Minute)
		if n := len(f.seen().signed) - before; n < 200 || n > 10_000 {
			t.Errorf("%d signatures", n)
		}
	})
}

// A server that can't keep up with a taint gets what ends first at first, and a
// workload that starts meanwhile waits for none of it.
func TestUnderLoadATaintIsLeftSoonestEndFirst(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		const entries = 2000
		var list []*agentv1.Entry
		for i := range entries {
			life := time.Duration(20+i*7919%entries/50) * time.Minute // from 20 to 60 minutes, in no order
			list = append(list, changed(entry(fmt.Sprint(i), fmt.Sprintf("w/%d", i), "unix:uid:1"), func(e *agentv1.Entry) { e.X509SvidTtl = durationpb.New(life) }))
		}
		f.set(list...)
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		ends := map[string]time.Time{}
		for _, svid := range must(s.Snapshot()).SVIDs {
			ends[svid.EntryID] = svid.NotAfter
		}
		old, next := f.signer, newAuthority("root 2")
		f.changeBundle(func() { f.bundled = append(f.bundled, next) })
		synctest.Wait()
		before := len(f.seen().batches)
		f.with(func() { f.signer, f.slow = next, time.Second })
		f.changeBundle(func() { old.tainted = true })
		<-time.After(3 * time.Second)

		f.set(entry("new", "new", "unix:uid:2"))
		began := time.Now()
		late := a.cache.Subscribe(sel("unix:uid:2"))
		defer late.Close()
		if _, err := late.Snapshot(); err != nil {
			<-late.Changed()
		}
		wantPaths(t, late, "new")
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("the new workload waited %v", took)
		}
		<-time.After(time.Minute)
		var order []time.Time
		for _, batch := range f.seen().batches[before:] {
			for _, id := range batch {
				if id != "new" {
					order = append(order, ends[id])
				}
			}
		}
		if len(order) != entries {
			t.Fatalf("%d signatures", len(order))
		}
		const inFlight = 6 * 50 // calls that run together may arrive in any order
		for i := range len(order) - inFlight {
			if order[i].After(order[i+inFlight]) {
				t.Fatalf("item %d ends at %v, after item %d, which ends at %v", i, order[i], i+inFlight, order[i+inFlight])
			}
		}
	})
}

// A retired root costs nobody anything: what it signed is replaced within a
// twelfth of its life, spread over that time, and only once.
func TestRetiredAuthorityIsLeftWithinAWindow(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		for i := range 100 {
			f.set(entry(fmt.Sprint(i), fmt.Sprintf("w/%d", i), "unix:uid:1"))
		}
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		must(s.Snapshot())
		old, next := f.signer, newAuthority("root 2")
		f.changeBundle(func() { f.bundled = append(f.bundled, next) })
		synctest.Wait()
		before := len(f.seen().signed)
		f.with(func() { f.signer = next })
		f.changeBundle(func() { old.retired = true })
		under := func(id string) (n int) {
			for _, svid := range must(s.Snapshot()).SVIDs {
				if svid.AuthorityID == id {
					n++
				}
			}
			return n
		}
		time.Sleep(150 * time.Second)
		if n := under(next.id()); n < 20 || n > 80 {
			t.Errorf("in half of the window %d of 100 SVIDs were replaced", n)
		}
		time.Sleep(151 * time.Second)
		if n := under(old.id()); n != 0 {
			t.Errorf("after the window %d SVIDs are under the old root", n)
		}
		if n := len(f.seen().signed) - before; n != 100 {
			t.Errorf("%d signatures for 100 SVIDs", n)
		}
		// A restart that finds the bundle and old SVIDs goes on where it was.
		f.with(func() { f.signer = old })
		f.changeBundle(func() { old.retired, next.retired = false, true })
		time.Sleep(30 * time.Second)
		a.stop()
		a.start()
		time.Sleep(5*time.Minute + time.Second)
		again := a.cache.Subscribe(sel("unix:uid:1"))
		defer again.Close()
		for _, svid := range must(again.Snapshot()).SVIDs {
			if svid.AuthorityID == next.id() {
				t.Fatalf("%v is still under the retired root", svid.ID)
			}
		}
	})
}

// What a server still signs under a root that it has said is retired comes
// into nobody's hands: the agent's acknowledgement of that bundle must stay
// true.
func TestNothingNewComesUnderARetiredRoot(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "w/1", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		kept := must(s.Snapshot()).SVIDs[0]
		old, next := f.signer, newAuthority("root 2")
		f.changeBundle(func() { f.bundled, old.retired = append(f.bundled, next), true })
		f.set(entry("2", "w/2", "unix:uid:1"))
		time.Sleep(8 * time.Minute)
		got := must(s.Snapshot()).SVIDs
		if len(got) != 1 || got[0] != kept {
			t.Fatalf("%d SVIDs, want the one from before alone", len(got))
		}
		f.with(func() { f.signer = next })
		time.Sleep(2 * time.Minute)
		for _, svid := range must(s.Snapshot()).SVIDs {
			if svid.AuthorityID != next.id() {
				t.Errorf("%v is under the retired root", svid.ID)
			}
		}
		if n := len(must(s.Snapshot()).SVIDs); n != 2 {
			t.Errorf("%d SVIDs", n)
		}
	})
}

// The same in an emergency: taint follows at once, and the agent may hear of both
// in one bundle.
func TestNothingNewComesUnderATaintedRoot(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "w/1", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		kept := must(s.Snapshot()).SVIDs[0]
		old, next := f.signer, newAuthority("root 2")
		f.changeBundle(func() { f.bundled, old.tainted = append(f.bundled, next), true })
		f.set(entry("2", "w/2", "unix:uid:1"))
		time.Sleep(8 * time.Minute)
		got := must(s.Snapshot()).SVIDs
		if len(got) != 1 || got[0] != kept {
			t.Fatalf("%d SVIDs, want the one from before alone", len(got))
		}
		f.with(func() { f.signer = next })
		time.Sleep(2 * time.Minute)
		for _, svid := range must(s.Snapshot()).SVIDs {
			if svid.AuthorityID != next.id() {
				t.Errorf("%v is under the tainted root", svid.ID)
			}
		}
		if n := len(must(s.Snapshot()).SVIDs); n != 2 {
			t.Errorf("%d SVIDs", n)
		}
	})
}

func TestResumesWhereItWas(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.chunk = 1 // every snapshot comes in several messages
		f.set(entry("1", "a", "unix:uid:1"), entry("2", "b", "unix:uid:1"), entry("3", "c", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "a", "b", "c")
		f.stop()
		f.set(entry("4", "d", "unix:uid:1"))
		f.remove("1")
		f.start()
		awaitPaths(t, s, "b", "c", "d")
		h := last(f.seen().hellos)
		if h.GetEpoch() != "epoch-1" || h.GetRevision() != 1 || h.GetAgentVersion() != "test" {
			t.Errorf("hello: %v", h)
		}
		if len(f.seen().signed) != 4 {
			t.Errorf("signed %v", f.seen().signed)
		}
		// Another store: all anew.
		f.stop()
		f.with(func() {
			f.epoch, f.revision = "epoch-2", 1
			delete(f.entries, "2")
		})
		f.start()
		awaitPaths(t, s, "c", "d")
		// Another agent ID: the revision is worth nothing either.
		a.stop()
		a.open()
		a.attest("two")
		a.start()
		synctest.Wait()
		if h := last(f.seen().hellos); h.GetEpoch() != "" || h.GetRevision() != 0 {
			t.Errorf("hello of another agent: %v", h)
		}
	})
}

func TestReplacedConnectionIsLeftAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		a.start()
		synctest.Wait()
		a.conns.replace()
		synctest.Wait()
		start := time.Now()
		if len(f.seen().hellos) != 2 || f.seen().streams != 1 {
			t.Errorf("%d hellos, %d streams", len(f.seen().hellos), f.seen().streams)
		}
		f.set(entry("1", "web", "unix:uid:1"))
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "web")
		if time.Since(start) > 0 {
			t.Error("took time")
		}
	})
}

func TestRolledBackBundleIsRefusedWithTheMessageThatBroughtIt(t *testing.T) { // BUN-4
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.sequence = 5
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "web")
		f.stop()
		f.with(func() { f.sequence = 4 })
		f.remove("1")
		f.start()
		time.Sleep(time.Minute)
		if snap, err := s.Snapshot(); err != nil || snap.BundleSequence != 5 {
			t.Errorf("serves %+v, %v", snap, err)
		}
		if b, _ := a.state.Bundle(); b.Sequence != 5 {
			t.Errorf("state has %d", b.Sequence)
		}
		f.with(func() { f.sequence = 6 })
		awaitPaths(t, s, "!no_identity")
	})
}

// A change to a view that the agent does not have is no view.
func TestChangeOfAnotherEpochIsNotApplied(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		f.with(func() {
			f.push(&agentv1.SyncResponse{Epoch: "other", Revision: 99, RemovedEntryIds: []string{"1"}, Entries: []*agentv1.Entry{entry("2", "x", "unix:uid:1")}})
		})
		synctest.Wait()
		wantPaths(t, s, "web")
		time.Sleep(10 * time.Second)
		if h := last(f.seen().hellos); h.GetEpoch() != "" || h.GetRevision() != 0 {
			t.Errorf("hello: %v", h)
		}
		wantPaths(t, s, "web")
	})
}

// I9: a server that never sends the last chunk is left, and what there is is
// served.
func TestUpdateWithoutAnEndIsLeft(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "web")
		endless := make([]*agentv1.SyncResponse, 17_000)
		for i := range endless {
			endless[i] = &agentv1.SyncResponse{Epoch: "epoch-1", Revision: 2, More: true}
		}
		f.with(func() { f.push(endless...) })
		time.Sleep(time.Minute)
		if n := len(f.seen().hellos); n != 2 {
			t.Errorf("%d hellos, want another stream", n)
		}
		wantPaths(t, s, "web")
		f.set(entry("1", "api", "unix:uid:1"))
		awaitPaths(t, s, "api")
	})
}

// A change that goes back in time would make the view a mixture of two.
func TestChangeOfALowerRevisionIsNotApplied(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "old", "unix:uid:1"))
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "web")
		f.with(func() {
			f.push(&agentv1.SyncResponse{Epoch: "epoch-1", Revision: 1, Entries: []*agentv1.Entry{entry("1", "old", "unix:uid:1")}})
		})
		synctest.Wait()
		wantPaths(t, s, "web")
		time.Sleep(10 * time.Second)
		if h := last(f.seen().hellos); len(f.seen().hellos) != 2 || h.GetEpoch() != "" || h.GetRevision() != 0 {
			t.Errorf("hello: %v", h)
		}
		wantPaths(t, s, "web")
	})
}

func TestPurgeLeavesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "web")
		if err := a.cache.Purge(); err != nil {
			t.Fatal(err)
		}
		if !notified(s) {
			t.Error("not told")
		}
		wantPaths(t, s, "!no_identity")
		f.set(entry("2", "late", "unix:uid:1"))
		time.Sleep(time.Minute)
		wantPaths(t, s, "!no_identity")
		f.stop()
		a.restart()
		s2 := a.cache.Subscribe(sel("unix:uid:1"))
		defer s2.Close()
		wantPaths(t, s2, "!not_synced")
	})
}

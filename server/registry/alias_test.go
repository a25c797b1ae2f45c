package registry_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/registry"
)

var serverID = id("/assay/server")

// attested puts an agent with these selectors on record.
func attested(t testing.TB, r *registry.Registry, agent spiffeid.ID, texts ...string) spiffeid.ID {
	t.Helper()
	if err := r.PutAgent(t.Context(), registry.Agent{ID: agent, Attestor: "test", Selectors: selectors(texts...), AttestedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	return agent
}

// alias is an entry that gives nodes with all these selectors an alias.
func alias(path string, texts ...string) registry.Entry {
	return registry.Entry{SPIFFEID: id(path), ParentID: serverID, Selectors: selectors(texts...)}
}

// wantView fails the test unless these entries are the agent's, and no others.
func wantView(t *testing.T, r *registry.Registry, agent spiffeid.ID, want ...registry.Entry) {
	t.Helper()
	f := r.Follow(agent, "", 0)
	defer f.Close()
	if u := next(t, f); !slices.Equal(ids(u.Entries), ids(want)) {
		t.Errorf("%s has %v, want %v", agent, ids(u.Entries), ids(want))
	}
	all, _ := r.ListEntries(registry.EntryFilter{}, "", 0)
	for _, e := range all {
		_, err := r.EntryFor(agent, e.ID)
		if listed := slices.Contains(ids(want), e.ID); listed != (err == nil) {
			t.Errorf("%s may sign for %s of %s: %v", agent, e.SPIFFEID, e.ParentID, err)
		} else if !listed {
			wantFault(t, err, fault.NotFound, "entry_not_authorized") // as for one that does not exist
		}
	}
}

func TestNodeSelectorsGiveAnAlias(t *testing.T) {
	s := start(t, t.TempDir())
	both := attested(t, s.Registry, node(1), "x509pop:role:web", "x509pop:zone:a")
	one := attested(t, s.Registry, node(2), "x509pop:role:web")
	none := attested(t, s.Registry, node(3))
	made := create(t, s.Registry, alias("/group/web", "x509pop:role:web", "x509pop:zone:a"), alias("/group/any", "x509pop:role:web"),
		web("/a", id("/group/web")), web("/b", id("/group/any")), web("/c", both), web("/d", none))
	a, b, c, d := made[2], made[3], made[4], made[5]
	wantView(t, s.Registry, both, a, b, c)
	wantView(t, s.Registry, one, b)
	wantView(t, s.Registry, none, d)
	s = s.restart(t)
	wantView(t, s.Registry, both, a, b, c)
	wantView(t, s.Registry, one, b)
	late := attested(t, s.Registry, node(4), "x509pop:role:web", "x509pop:zone:a", "x509pop:more:1")
	wantView(t, s.Registry, late, a, b)
	if err := s.ChangeAgent(t.Context(), both, func(a *registry.Agent) { a.Selectors = selectors("x509pop:zone:a") }); err != nil {
		t.Fatal(err)
	}
	wantView(t, s.Registry, both, c)
	if err := s.Evict(t.Context(), late); err != nil {
		t.Fatal(err)
	}
	wantView(t, s.Registry, late)
}

// What SPIRE's CreateJoinToken writes, and what names an agent from the server's side.
func TestAnAgentsOwnIDGivesItAnAlias(t *testing.T) {
	s := start(t, t.TempDir())
	mine, other := attested(t, s.Registry, node(1)), attested(t, s.Registry, node(2))
	self := alias("/host/1", "spiffe_id:"+mine.String())
	self.ParentID = mine
	created := create(t, s.Registry, self, alias("/host/one", "spiffe_id:"+mine.String()), web("/a", id("/host/1")), web("/b", id("/host/one")))
	wantView(t, s.Registry, mine, created[2:]...)
	wantView(t, s.Registry, other)
	// Of another agent's children none names this one.
	foreign := alias("/host/1", "spiffe_id:"+mine.String())
	foreign.ParentID = other
	create(t, s.Registry, foreign)
	wantView(t, s.Registry, mine, created[2:]...)
	if view := direct(s.Registry, other); len(view) != 1 { // an entry that no process has, as any other selector that does not exist
		t.Errorf("the other agent has %v", view)
	}
}

func TestNoSelectorOfARecordMakesAnAgentAnother(t *testing.T) {
	s := start(t, t.TempDir())
	mine := attested(t, s.Registry, node(1))
	other := attested(t, s.Registry, node(2), "spiffe_id:"+mine.String(), "x509pop:role:web")
	created := create(t, s.Registry, alias("/host/1", "spiffe_id:"+mine.String()), alias("/host/web", "spiffe_id:"+mine.String(), "x509pop:role:web"),
		web("/a", id("/host/1")), web("/b", id("/host/web")))
	wantView(t, s.Registry, mine, created[2])
	wantView(t, s.Registry, other)
}

// Tools that have SPIRE's own IDs written down name its server.
func TestAliasesUnderTheReservedPrefix(t *testing.T) {
	for prefix, given := range map[string]bool{"/spire/": true, "/assay/": false} {
		s := start(t, t.TempDir(), func(o *registry.Options) { o.ReservedPrefix = prefix })
		agent := attested(t, s.Registry, id(prefix+"agent/x509pop/1"), "x509pop:role:web")
		spires := alias("/group", "x509pop:role:web")
		spires.ParentID = id("/spire/server")
		made := create(t, s.Registry, spires, web("/a", id("/group")))
		if given {
			wantView(t, s.Registry, agent, made[1])
		} else {
			wantView(t, s.Registry, agent)
		}
	}
}

// An alias reaches the entries whose parent it is, and no further.
func TestAnAliasIsOneStep(t *testing.T) {
	s := start(t, t.TempDir())
	agent := attested(t, s.Registry, node(1), "x509pop:role:web")
	made := create(t, s.Registry, alias("/group", "x509pop:role:web"), web("/workload", id("/group")),
		web("/of-workload", id("/workload")), // SPIRE would give it as well
		registry.Entry{SPIFFEID: id("/group/2"), ParentID: id("/group"), Selectors: selectors("spiffe_id:" + id("/group").String())},
		web("/second", id("/group/2")),
		registry.Entry{SPIFFEID: id("/group"), ParentID: agent, Selectors: selectors("unix:uid:5")}, // a workload of the same ID
	)
	wantView(t, s.Registry, agent, made[1], made[5])
	store := alias("/store", "x509pop:role:web")
	store.StoreSVID = true
	create(t, s.Registry, store, web("/in-store", id("/store")))
	wantView(t, s.Registry, agent, made[1], made[5])
}

func TestAliasChangesReachOpenStreams(t *testing.T) {
	s := start(t, t.TempDir())
	agent := attested(t, s.Registry, node(1), "x509pop:role:web")
	made := create(t, s.Registry, web("/own", agent), web("/a", id("/group")), web("/b", id("/group")))
	f := s.Follow(agent, "", 0)
	defer f.Close()
	next(t, f)
	steps := []struct {
		do   func() error
		want []registry.Entry
	}{
		{func() error {
			return s.CreateEntries(t.Context(), []registry.Entry{alias("/group", "x509pop:role:web")})[0].Err
		}, made},
		{func() error {
			return s.ChangeAgent(t.Context(), agent, func(a *registry.Agent) { a.Selectors = nil })
		}, made[:1]},
		{func() error {
			return s.ChangeAgent(t.Context(), agent, func(a *registry.Agent) { a.Selectors = selectors("x509pop:role:web", "x509pop:x:y") })
		}, made},
		{func() error { return s.Evict(t.Context(), agent) }, made[:1]},
		{func() error {
			return s.PutAgent(t.Context(), registry.Agent{ID: agent, Attestor: "test", Selectors: selectors("x509pop:role:web"), AttestedAt: time.Now()})
		}, made},
		{func() error {
			list, _ := s.ListEntries(registry.EntryFilter{ParentID: serverID}, "", 0)
			return s.DeleteEntries(t.Context(), ids(list))[0]
		}, made[:1]},
	}
	for i, step := range steps {
		if err := step.do(); err != nil {
			t.Fatal(i, err)
		}
		if u := next(t, f); !u.Snapshot || !slices.Equal(ids(u.Entries), ids(step.want)) || u.Revision != s.Revision() {
			t.Errorf("step %d: %+v", i, u)
		}
	}
	if aliases, selectors := s.AliasIndex(); aliases != 0 || selectors != 1 {
		t.Errorf("%d aliases and %d selectors in the index", aliases, selectors)
	}
}

// Entries under an alias come and go as deltas; what changes no view wakes nobody.
func TestEntriesOfAnAliasComeAsDeltas(t *testing.T) { // NEG-42
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		agent := attested(t, s.Registry, node(1), "x509pop:role:web", "x509pop:zone:a")
		made := create(t, s.Registry, alias("/group", "x509pop:role:web"), alias("/group", "x509pop:zone:a"), web("/old", id("/group")))
		f := s.Follow(agent, "", 0)
		defer f.Close()
		next(t, f)
		added := create(t, s.Registry, web("/new", id("/group")))[0]
		if u := next(t, f); u.Snapshot || !slices.Equal(ids(u.Entries), []string{added.ID}) {
			t.Fatalf("added: %+v", u)
		}
		if _, err := s.UpdateEntry(t.Context(), added.ID, func(e *registry.Entry) { e.ParentID = agent }); err != nil {
			t.Fatal(err)
		}
		if u := next(t, f); u.Snapshot || !slices.Equal(ids(u.Entries), []string{added.ID}) || len(u.Removed) != 0 {
			t.Fatalf("moved from the alias to the agent: %+v", u)
		}
		if err := s.DeleteEntries(t.Context(), []string{made[2].ID})[0]; err != nil {
			t.Fatal(err)
		}
		if u := next(t, f); u.Snapshot || !slices.Equal(u.Removed, []string{made[2].ID}) || len(u.Entries) != 0 {
			t.Fatalf("removed: %+v", u)
		}
		// One of two entries that give the alias goes, the other is edited, the agent's certificate is renewed.
		if err := s.DeleteEntries(t.Context(), []string{made[0].ID})[0]; err != nil {
			t.Fatal(err)
		}
		if _, err := s.UpdateEntry(t.Context(), made[1].ID, func(e *registry.Entry) { e.Hint = "x" }); err != nil {
			t.Fatal(err)
		}
		if err := s.RecordIssued(t.Context(), agent, registry.Issued{Serial: "01", KeyHash: key(1), NotAfter: time.Now().Add(time.Hour)}); err != nil {
			t.Fatal(err)
		}
		create(t, s.Registry, alias("/other", "x509pop:role:db"), web("/x", id("/other")))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if u, err := f.Next(ctx); !errors.Is(err, fault.NotReady) {
			t.Errorf("woken for %+v, %v", u, err)
		}
	})
}

func TestResumeUnderAnAlias(t *testing.T) {
	s := start(t, t.TempDir())
	s.LimitChanges(10)
	agent := attested(t, s.Registry, node(1), "x509pop:role:web")
	made := create(t, s.Registry, alias("/group", "x509pop:role:web"), web("/a", id("/group")), web("/own", agent))
	resume := func(since int64) registry.Update {
		t.Helper()
		f := s.Follow(agent, s.Epoch(), since)
		defer f.Close()
		return next(t, f)
	}
	at := s.Revision()
	if u := resume(at); u.Snapshot || len(u.Entries)+len(u.Removed) != 0 {
		t.Errorf("nothing changed: %+v", u)
	}
	added := create(t, s.Registry, web("/b", id("/group")))
	if err := s.DeleteEntries(t.Context(), ids(made[1:2]))[0]; err != nil {
		t.Fatal(err)
	}
	if u := resume(at); u.Snapshot || !slices.Equal(ids(u.Entries), ids(added)) || !slices.Equal(u.Removed, ids(made[1:2])) {
		t.Errorf("two changes: %+v", u)
	}
	// An alias that came and went again: what it gave meanwhile is not known.
	at = s.Revision()
	more := create(t, s.Registry, alias("/more", "x509pop:role:web"), web("/c", id("/more")))
	between := s.Revision()
	if err := s.DeleteEntries(t.Context(), ids(more[:1]))[0]; err != nil {
		t.Fatal(err)
	}
	for _, since := range []int64{at, between} {
		if u := resume(since); !u.Snapshot || !slices.Equal(ids(u.Entries), ids(append(added, made[2]))) {
			t.Errorf("from %d: %+v", since, u)
		}
	}
	if u := resume(s.Revision()); u.Snapshot || len(u.Entries)+len(u.Removed) != 0 {
		t.Errorf("after it: %+v", u)
	}
	// The alias's own changes are forgotten, the agent's are not.
	at = s.Revision()
	create(t, s.Registry, many(8, id("/group"))...)
	create(t, s.Registry, many(5, node(2))...)
	if u := resume(at); !u.Snapshot || len(u.Entries) != 10 {
		t.Errorf("forgotten: %+v", u)
	}
}

// What happened to aliases while the watch had lost its place comes with the listing.
func TestAliasesAreRightAfterALostWatch(t *testing.T) {
	s := start(t, t.TempDir())
	kv := &forgetful{KV: s.kv, lose: make(chan struct{}), lost: make(chan struct{}), list: make(chan struct{})}
	r, _ := run(t, options(kv))
	gains, loses, leaves := node(1), attested(t, s.Registry, node(2), "x509pop:role:web"), attested(t, s.Registry, node(3), "x509pop:role:web")
	made := create(t, s.Registry, alias("/group", "x509pop:role:web"), alias("/late", "x509pop:role:db"), web("/a", id("/group")), web("/b", id("/late")))
	if err := r.WaitRevision(t.Context(), s.Revision()); err != nil {
		t.Fatal(err)
	}
	var feeds []*registry.Feed
	for _, agent := range []spiffeid.ID{gains, loses, leaves} {
		f := r.Follow(agent, "", 0)
		defer f.Close()
		next(t, f)
		feeds = append(feeds, f)
	}
	since := r.Revision()

	kv.lose <- struct{}{}
	<-kv.lost
	attested(t, s.Registry, gains, "x509pop:role:web")
	if err := s.ChangeAgent(t.Context(), loses, func(a *registry.Agent) { a.Selectors = selectors("x509pop:role:db") }); err != nil {
		t.Fatal(err)
	}
	if err := s.Evict(t.Context(), leaves); err != nil {
		t.Fatal(err)
	}
	kv.list <- struct{}{}

	for i, want := range [][]registry.Entry{made[2:3], made[3:], nil} {
		if u := next(t, feeds[i]); !u.Snapshot || !slices.Equal(ids(u.Entries), ids(want)) {
			t.Errorf("feed %d: %+v", i, u)
		}
	}
	wantView(t, r, gains, made[2])
	wantView(t, r, loses, made[3])
	wantView(t, r, leaves)
	back := r.Follow(loses, r.Epoch(), since)
	defer back.Close()
	if u := next(t, back); !u.Snapshot || !slices.Equal(ids(u.Entries), ids(made[3:])) {
		t.Errorf("resumed: %+v", u)
	}
}

func TestExpiredAliasGivesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		agent := attested(t, s.Registry, node(1), "x509pop:role:web")
		ending := alias("/group", "x509pop:role:web")
		ending.ExpiresAt = time.Now().Add(3 * time.Second)
		made := create(t, s.Registry, ending, web("/a", id("/group")), web("/own", agent))
		f := s.Follow(agent, "", 0)
		defer f.Close()
		if u := next(t, f); len(u.Entries) != 2 {
			t.Fatalf("got %+v", u)
		}
		revision, begin := s.Revision(), time.Now()
		if u := next(t, f); time.Since(begin) != 3*time.Second || !u.Snapshot || !slices.Equal(ids(u.Entries), ids(made[2:])) {
			t.Fatalf("after %v: %+v", time.Since(begin), u)
		}
		wantView(t, s.Registry, agent, made[2])
		// Nothing was committed, yet who was away learns of it, also from the next server.
		for range 2 {
			back := s.Follow(agent, s.Epoch(), revision)
			if u := next(t, back); !u.Snapshot || len(u.Entries) != 1 {
				t.Errorf("a resumed agent got %+v", u)
			}
			back.Close()
			if s.Revision() != revision {
				t.Fatal("something was committed")
			}
			f.Close()
			s = s.restart(t)
			f = s.Follow(agent, "", 0)
		}
		if _, err := s.UpdateEntry(t.Context(), made[0].ID, func(e *registry.Entry) { e.ExpiresAt = time.Time{} }); err != nil {
			t.Fatal(err)
		}
		wantView(t, s.Registry, agent, made[1], made[2])
	})
}

// An alias that one selector of many agents would match is found by the other.
func TestAliasesThatShareASelectorStayApart(t *testing.T) {
	s := start(t, t.TempDir())
	for i := range 20 {
		agent := attested(t, s.Registry, node(i), "k8s_psat:cluster:c", fmt.Sprintf("k8s_psat:agent_node_uid:%d", i))
		group := fmt.Sprintf("/node/%d", i)
		made := create(t, s.Registry, alias(group, "k8s_psat:cluster:c", fmt.Sprintf("k8s_psat:agent_node_uid:%d", i)), web("/w", id(group)))
		wantView(t, s.Registry, agent, made[1])
	}
	if aliases, selectors := s.AliasIndex(); aliases != 20 || selectors != 21 {
		t.Errorf("%d aliases, %d selectors", aliases, selectors)
	}
	for i := range 20 {
		if err := s.Evict(t.Context(), node(i)); err != nil {
			t.Fatal(err)
		}
		wantView(t, s.Registry, node(i))
	}
	list, _ := s.ListEntries(registry.EntryFilter{}, "", 0)
	s.DeleteEntries(t.Context(), ids(list))
	if aliases, selectors := s.AliasIndex(); aliases+selectors != 0 {
		t.Errorf("%d aliases, %d selectors are left", aliases, selectors)
	}
}

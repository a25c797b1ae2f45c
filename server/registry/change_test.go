package registry_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/registry"
)

func TestUpdateChangesWhatItMayAndCounts(t *testing.T) {
	s := start(t, t.TempDir())
	made := create(t, s.Registry, web("/a", node(1)))[0]
	got, err := s.UpdateEntry(t.Context(), made.ID, func(e *registry.Entry) {
		e.ID, e.CreatedAt, e.Revision = "x", time.Unix(1, 0), 99
		e.Hint, e.ParentID = "hint", node(2)
	})
	if err != nil || got.ID != made.ID || !got.CreatedAt.Equal(made.CreatedAt) || got.Revision != 1 || got.Hint != "hint" {
		t.Fatalf("%+v, %v", got, err)
	}
	if there, _ := s.Entry(made.ID); there.Hint != "hint" || there.ParentID != node(2) {
		t.Errorf("the mirror has %+v", there)
	}
	// The old identity is free, the new one taken.
	create(t, s.Registry, web("/a", node(1)))
	result := s.CreateEntries(t.Context(), []registry.Entry{web("/a", node(2))})[0]
	wantFault(t, result.Err, fault.Exists, "entry_exists")
}

func TestUpdateIsHeldToTheRules(t *testing.T) {
	s := start(t, t.TempDir())
	made := create(t, s.Registry, web("/a", node(1)), web("/b", node(1)))
	for reason, change := range map[string]func(*registry.Entry){
		"entry_exists":      func(e *registry.Entry) { e.SPIFFEID = id("/b") },
		"spiffe_id_invalid": func(e *registry.Entry) { e.SPIFFEID = id("/assay/server") },
		"selector_missing":  func(e *registry.Entry) { e.Selectors = nil },
		"expires_at_past":   func(e *registry.Entry) { e.ExpiresAt = time.Now().Add(-time.Second) },
	} {
		if _, err := s.UpdateEntry(t.Context(), made[0].ID, change); fault.ReasonOf(err) != reason {
			t.Errorf("got %v, want %s", err, reason)
		}
	}
	_, err := s.UpdateEntry(t.Context(), "none", func(*registry.Entry) {})
	wantFault(t, err, fault.NotFound, "entry_unknown")
	if got, _ := s.Entry(made[0].ID); got.Revision != 0 || got.SPIFFEID != id("/a") {
		t.Errorf("a refused update changed the entry: %+v", got)
	}
}

func TestConcurrentUpdatesAllCount(t *testing.T) {
	s := start(t, t.TempDir())
	other, _ := run(t, options(s.kv))
	made := create(t, s.Registry, web("/a", node(1)))[0]
	var wg sync.WaitGroup
	var mu sync.Mutex
	done := int64(0)
	for i := range 20 {
		wg.Go(func() {
			for {
				_, err := []*registry.Registry{s.Registry, other}[i%2].UpdateEntry(t.Context(), made.ID, func(e *registry.Entry) {
					e.Hint += "."
				})
				if errors.Is(err, fault.Conflict) {
					continue
				}
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				done++
				mu.Unlock()
				return
			}
		})
	}
	wg.Wait()
	if got, _, _ := lastEntry(t, s, made.ID); done != 20 || got.Revision != 20 || len(got.Hint) != 20 {
		t.Errorf("%d updates, entry %+v", done, got)
	}
}

func lastEntry(t *testing.T, s *server, id string) (registry.Entry, bool, error) {
	t.Helper()
	p, err := s.kv.List(t.Context(), "", "", 1)
	if err == nil {
		err = s.WaitRevision(t.Context(), p.Revision)
	}
	e, ok := s.Entry(id)
	return e, ok, err
}

func TestDeleteRemovesAndFreesTheIdentity(t *testing.T) {
	s := start(t, t.TempDir())
	made := create(t, s.Registry, many(130, node(1))...)
	list := append(ids(made), "none", made[0].ID)
	errs := s.DeleteEntries(t.Context(), list)
	for i, err := range errs {
		if i < 130 && err != nil {
			t.Fatalf("%d: %v", i, err)
		}
		if i >= 130 {
			wantFault(t, err, fault.NotFound, "entry_unknown")
		}
	}
	if n := s.CountEntries(registry.EntryFilter{}); n != 0 || s.Parents() != 1 {
		t.Errorf("%d entries, %d parents", n, s.Parents())
	}
	create(t, s.Registry, many(130, node(1))...)
}

// Another server changed one of the entries; this one has not seen it yet.
func TestDeleteRemovesAnEntryAsTheStoreHasIt(t *testing.T) {
	s := start(t, t.TempDir())
	made := create(t, s.Registry, many(3, node(1))...)
	o := options(s.kv)
	blind, err := registry.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.UpdateEntry(t.Context(), made[1].ID, func(e *registry.Entry) { e.SPIFFEID = id("/moved") }); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteEntries(t.Context(), []string{made[2].ID})[0]; err != nil {
		t.Fatal(err)
	}
	done := make(chan []error)
	go func() { done <- blind.DeleteEntries(t.Context(), []string{made[0].ID, made[1].ID, made[2].ID}) }()
	p, _ := s.kv.List(t.Context(), "", "", 1)
	if err := s.WaitRevision(t.Context(), p.Revision); err != nil {
		t.Fatal(err)
	}
	go func() { _ = blind.Run(t.Context()) }()
	errs := <-done
	if errs[0] != nil || errs[1] != nil || fault.ReasonOf(errs[2]) != "entry_unknown" {
		t.Fatalf("got %v", errs)
	}
	if _, ok, err := lastEntry(t, s, made[1].ID); ok || err != nil || s.CountEntries(registry.EntryFilter{}) != 0 {
		t.Errorf("left: %v", err)
	}
	create(t, s.Registry, web("/moved", node(1))) // its index record went, too
}

// A guard sees an entry as the store has it when it is written, not as a
// mirror that lags behind has it.
func TestGuardSeesTheEntryAsTheStoreHasIt(t *testing.T) {
	s := start(t, t.TempDir())
	made := create(t, s.Registry, many(2, node(1))...)
	blind, err := registry.Open(t.Context(), options(s.kv))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range made {
		if _, err := s.UpdateEntry(t.Context(), e.ID, func(e *registry.Entry) { e.SPIFFEID = id("/guarded/" + e.ID) }); err != nil {
			t.Fatal(err)
		}
	}
	guard := func(e *registry.Entry) error {
		if strings.HasPrefix(e.SPIFFEID.Path(), "/guarded/") {
			return fault.New(fault.Denied, "guarded", "it is guarded")
		}
		return nil
	}
	for _, err := range blind.DeleteEntries(t.Context(), ids(made), guard) {
		wantFault(t, err, fault.Denied, "guarded")
	}
	_, err = blind.UpdateEntry(t.Context(), made[0].ID, func(e *registry.Entry) { e.SPIFFEID = id("/free") }, guard)
	wantFault(t, err, fault.Denied, "guarded")
	if n := s.CountEntries(registry.EntryFilter{}); n != 2 {
		t.Errorf("%d entries are left", n)
	}
	free := create(t, s.Registry, web("/free", node(1)))
	_, err = s.UpdateEntry(t.Context(), free[0].ID, func(e *registry.Entry) { e.SPIFFEID = id("/guarded/x") }, guard)
	wantFault(t, err, fault.Denied, "guarded")
	results := s.CreateEntries(t.Context(), []registry.Entry{web("/guarded/y", node(1)), web("/free2", node(1))}, guard)
	wantFault(t, results[0].Err, fault.Denied, "guarded")
	if results[1].Err != nil {
		t.Error(results[1].Err)
	}
}

func TestListPagesAreStableUnderChanges(t *testing.T) {
	s := start(t, t.TempDir())
	list := many(1000, node(1))
	for i := range list {
		list[i].ID = fmt.Sprintf("e%04d", 2*i)
	}
	create(t, s.Registry, list...)
	seen := map[string]int{}
	after := ""
	for page := 0; ; page++ {
		got, next := s.ListEntries(registry.EntryFilter{}, after, 70)
		for i, e := range got {
			seen[e.ID]++
			if e.ID <= after || i > 0 && e.ID <= got[i-1].ID {
				t.Fatalf("%s after %s", e.ID, after)
			}
		}
		if next == "" {
			break
		}
		// Delete the very token, and something behind; add something before it.
		for _, err := range s.DeleteEntries(t.Context(), []string{next, got[0].ID}) {
			if err != nil {
				t.Fatal(err)
			}
		}
		extra := web(fmt.Sprintf("/extra/%d", page), node(1))
		extra.ID = got[0].ID + "-"
		create(t, s.Registry, extra)
		after = next
	}
	for i := range list {
		if seen[list[i].ID] != 1 {
			t.Errorf("%s was listed %d times", list[i].ID, seen[list[i].ID])
		}
	}
}

func TestFilters(t *testing.T) {
	s := start(t, t.TempDir())
	e := make([]registry.Entry, 4)
	for i, sel := range [][]string{{"a:1", "b:2", "c:3"}, {"a:1", "b:2"}, {"a:1"}, {"z:9"}} {
		e[i] = web(fmt.Sprintf("/e%d", i+1), node(i%2))
		e[i].ID, e[i].Selectors, e[i].Hint = fmt.Sprintf("e%d", i+1), selectors(sel...), []string{"", "h"}[i%2]
	}
	create(t, s.Registry, e...)
	h, none := "h", ""
	cases := map[string]struct {
		filter registry.EntryFilter
		want   string
	}{
		"all":            {registry.EntryFilter{}, "[e1 e2 e3 e4]"},
		"SPIFFE ID":      {registry.EntryFilter{SPIFFEID: id("/e2")}, "[e2]"},
		"parent":         {registry.EntryFilter{ParentID: node(1)}, "[e2 e4]"},
		"hint":           {registry.EntryFilter{Hint: &h}, "[e2 e4]"},
		"no hint":        {registry.EntryFilter{Hint: &none}, "[e1 e3]"},
		"exact":          {registry.EntryFilter{Selectors: selectors("b:2", "a:1")}, "[e2]"},
		"subset":         {registry.EntryFilter{Selectors: selectors("a:1", "b:2"), Match: registry.MatchSubset}, "[e2 e3]"},
		"superset":       {registry.EntryFilter{Selectors: selectors("a:1", "b:2"), Match: registry.MatchSuperset}, "[e1 e2]"},
		"any":            {registry.EntryFilter{Selectors: selectors("c:3", "z:9"), Match: registry.MatchAny}, "[e1 e4]"},
		"nothing":        {registry.EntryFilter{ParentID: node(5)}, "[]"},
		"all conditions": {registry.EntryFilter{ParentID: node(1), Selectors: selectors("a:1"), Match: registry.MatchAny}, "[e2]"},
	}
	for name, c := range cases {
		got, next := s.ListEntries(c.filter, "", 0)
		if fmt.Sprint(ids(got)) != c.want || next != "" || s.CountEntries(c.filter) != len(got) {
			t.Errorf("%s: got %v, want %s", name, ids(got), c.want)
		}
	}
	if got, next := s.ListEntries(registry.EntryFilter{ParentID: node(0)}, "", 2); len(got) != 2 || next != "" {
		t.Errorf("a last page that is full has the token %q", next)
	}
}

// NEG-21: foreign, unknown and expired are one answer.
func TestEntryForAnswersOnlyItsAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		short := web("/short", node(1))
		short.ExpiresAt = time.Now().Add(time.Minute)
		made := create(t, s.Registry, web("/a", node(1)), web("/b", node(2)), short)
		for _, i := range []int{0, 2} {
			if got, err := s.EntryFor(node(1), made[i].ID); err != nil || got.ID != made[i].ID {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Minute)
		texts := map[string]bool{}
		for _, entry := range []string{made[1].ID, made[2].ID, "unknown", ""} {
			_, err := s.EntryFor(node(1), entry)
			wantFault(t, err, fault.NotFound, "entry_not_authorized")
			texts[err.Error()] = true
		}
		if len(texts) != 1 {
			t.Errorf("different answers: %v", texts)
		}
	})
}

func TestEntriesLongExpiredGoFromTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		short, kept := web("/short", node(1)), web("/kept", node(1))
		short.ExpiresAt, kept.ExpiresAt = time.Now().Add(time.Hour), time.Now().Add(time.Hour)
		made := create(t, s.Registry, short, kept, web("/for-ever", node(1)))
		time.Sleep(30 * time.Minute)
		if _, err := s.UpdateEntry(t.Context(), made[1].ID, func(e *registry.Entry) { e.ExpiresAt = time.Now().Add(100 * time.Hour) }); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30*time.Minute + registry.KeepExpired - time.Second)
		if s.CountEntries(registry.EntryFilter{}) != 3 {
			t.Fatal("gone too early: an operator must still see it")
		}
		time.Sleep(time.Second + 2*registry.PruneEvery)
		if got, _ := s.ListEntries(registry.EntryFilter{}, "", 0); len(got) != 2 {
			t.Fatalf("left: %v", ids(got))
		}
		create(t, s.Registry, web("/short", node(1))) // the identity is free again
	})
}

package server

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"

	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
)

// step is a line of an audit log, written at a revision of the store.
type step struct {
	revision       int64
	action, target string
}

// logOf writes an audit log and returns its path.
func logOf(t *testing.T, steps ...step) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := audit.Open(audit.Config{Path: path}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range steps {
		l.Follow(func() int64 { return s.revision })
		line := audit.Line{Action: s.action, Target: audit.Target{AgentID: s.target, EntryID: s.target, AuthorityID: s.target}, Result: audit.Result{Code: "ok"}}
		if err := l.Record(t.Context(), line); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// since is what a log tells of the time after a revision of the store that has
// these roots.
func since(t *testing.T, revision int64, roots map[string]ca.State, steps ...step) Since {
	t.Helper()
	h, err := readHistory(logOf(t, steps...), revision)
	if err != nil {
		t.Fatal(err)
	}
	return h.of(roots)
}

func TestWhatTheAuditLogTellsOfTheTimeSinceABackup(t *testing.T) {
	const bad, back = "spiffe://example.org/assay/agent/x509pop/1", "spiffe://example.org/assay/agent/x509pop/2"
	r := map[string]ca.State{"r": ca.Active}
	s := since(t, 10, r, step{1, "root.create", "r"}, step{5, "entry.create", "old"}, step{10, "agent.ban", bad}, step{12, "agent.evict", back},
		step{13, "entry.delete", "e"}, step{14, "entry.delete", "e"}, step{20, "x509_svid.issue", "e"})
	if !s.Complete || len(s.Acts) != 2 || s.Acts[0].Evict || !s.Acts[1].Evict || len(s.Created.List) != 0 || fmt.Sprint(s.Deleted.List) != "[e]" {
		t.Errorf("got %+v", s)
	}
	// One that begins after the backup, ends before it, or begins with a line of
	// no revision does not tell all.
	if s := since(t, 10, r, step{11, "agent.ban", bad}); s.Complete || len(s.Acts) != 1 {
		t.Errorf("a log that was pruned: %+v", s)
	}
	if s := since(t, 500, r, step{1, "root.create", "r"}, step{100, "entry.create", "e"}); s.Complete {
		t.Errorf("a log that was taken back with its disk: %+v", s)
	}
	if s := since(t, 10, r, step{0, "audit.repair", ""}, step{50, "agent.ban", bad}); s.Complete || len(s.Acts) != 1 {
		t.Errorf("a log that begins with its repair: %+v", s)
	}
	if h, err := readHistory(filepath.Join(t.TempDir(), "audit.log"), 1); err != nil || h.of(r).Complete {
		t.Errorf("no log: %+v, %v", h, err)
	}
}

// Of two stores that wrote the log, one begun anew after the other, the one that
// the backup is of counts.
func TestALogOfTwoStores(t *testing.T) {
	const bad, back = "spiffe://example.org/assay/agent/x509pop/1", "spiffe://example.org/assay/agent/x509pop/2"
	log := []step{
		{1, "root.create", "lost"},
		{1, "root.create", "a"},
		{500, "backup.take", ""},
		{600, "agent.ban", bad},
		{700, "root.create", "b"},
		{701, "root.taint", "a"},
		{1, "root.create", "c"},
		{4, "agent.ban", back},
		{0, "audit.repair", ""},
		{20, "entry.create", "x"},
	}
	first := map[string]ca.State{"a": ca.Active}
	s := since(t, 500, first, log...)
	if !s.Complete || len(s.Acts) != 1 || s.Acts[0].Agent.String() != bad || s.rootsLost(first) == "" {
		t.Errorf("the first: %+v", s)
	}
	second := map[string]ca.State{"c": ca.Active}
	s = since(t, 3, second, log...)
	if !s.Complete || len(s.Acts) != 1 || s.Acts[0].Agent.String() != back || s.rootsLost(second) != "" {
		t.Errorf("the second: %+v", s)
	}
	if s := since(t, 3, map[string]ca.State{"z": ca.Active}, log...); s.Complete {
		t.Errorf("one that is not there: %+v", s)
	}
	again := append(slices.Clone(log), step{702, "store.restore", "a"}, step{703, "agent.ban", back})
	if s := since(t, 500, first, again...); s.Complete || len(s.Acts) != 1 {
		t.Errorf("the first, which went on in the second's place: %+v", s)
	}
	if s := since(t, 703, first, append(again, step{710, "agent.evict", bad})...); !s.Complete || len(s.Acts) != 2 || s.rootsLost(first) != "" {
		t.Errorf("a backup of after that: %+v", s)
	}
	h, err := readHistory(logOf(t, log...), 3)
	if err != nil || h.reached != 701 {
		t.Errorf("the highest revision is %d, %v", h.reached, err)
	}
}

func TestMovesOfRootsThatCannotBeGoneBackBehind(t *testing.T) {
	for name, tc := range map[string]struct {
		steps []step
		in    map[string]ca.State // the backup
		lost  bool
	}{
		"nothing":                                    {nil, map[string]ca.State{"a": ca.Active}, false},
		"another was made":                           {[]step{{9, "root.prepare", "b"}}, map[string]ca.State{"a": ca.Active}, false},
		"another signs":                              {[]step{{9, "root.activate", "b"}}, map[string]ca.State{"a": ca.Active}, true},
		"the prepared one signs":                     {[]step{{9, "root.activate", "b"}}, map[string]ca.State{"a": ca.Active, "b": ca.Prepared}, false},
		"the active one was tainted":                 {[]step{{9, "root.taint", "a"}}, map[string]ca.State{"a": ca.Active}, true},
		"the active one is gone":                     {[]step{{9, "root.revoke", "a"}}, map[string]ca.State{"a": ca.Active}, true},
		"the end of a rotation":                      {[]step{{9, "root.revoke", "a"}}, map[string]ca.State{"a": ca.Retired, "b": ca.Active}, false},
		"that ended in a taint":                      {[]step{{9, "root.taint", "a"}, {10, "root.revoke", "a"}}, map[string]ca.State{"a": ca.Retired, "b": ca.Active}, true},
		"all of it before the backup":                {[]step{{2, "root.activate", "b"}, {3, "root.taint", "a"}, {4, "root.revoke", "a"}}, map[string]ca.State{"a": ca.Revoked, "b": ca.Active}, false},
		"a line before the backup, its commit after": {[]step{{4, "root.activate", "b"}, {6, "entry.create", "e"}}, map[string]ca.State{"a": ca.Active}, true},
		"a rotation that was given up":               {[]step{{6, "rotation.abort", "a"}, {7, "root.revoke", "b"}}, map[string]ca.State{"a": ca.Active, "b": ca.Prepared}, true},
		"one that was begun since, too":              {[]step{{6, "root.prepare", "b"}, {7, "root.activate", "b"}, {8, "root.activate", "a"}, {9, "root.revoke", "b"}}, map[string]ca.State{"a": ca.Active}, false},
		"two that followed":                          {[]step{{6, "root.activate", "b"}, {7, "root.activate", "c"}, {9, "root.revoke", "b"}}, map[string]ca.State{"a": ca.Retired}, true},
		"what a restore before it gave up":           {[]step{{2, "root.activate", "b"}, {3, "store.restore", "a"}}, map[string]ca.State{"a": ca.Active}, false},
		"what one of half a rotation gave up":        {[]step{{2, "root.revoke", "b"}, {3, "store.restore", "a"}, {4, "root.activate", "b"}}, map[string]ca.State{"a": ca.Retired, "b": ca.Active}, false},
		"a restore after it":                         {[]step{{6, "root.activate", "b"}, {9, "store.restore", "a"}}, map[string]ca.State{"a": ca.Active}, true},
	} {
		s := since(t, 5, tc.in, append([]step{{1, "root.create", "a"}}, tc.steps...)...)
		if got := s.rootsLost(tc.in); (got != "") != tc.lost {
			t.Errorf("%s: %q", name, got)
		}
	}
}

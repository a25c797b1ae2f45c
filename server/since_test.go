package server

import (
	"fmt"
	"log/slog"
	"path/filepath"
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

func since(t *testing.T, revision int64, steps ...step) Since {
	t.Helper()
	s, err := readSince(logOf(t, steps...), revision)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestWhatTheAuditLogTellsOfTheTimeSinceABackup(t *testing.T) {
	const bad, back = "spiffe://example.org/assay/agent/x509pop/1", "spiffe://example.org/assay/agent/x509pop/2"
	s := since(t, 10, step{1, "root.create", "r"}, step{5, "entry.create", "old"}, step{10, "agent.ban", bad}, step{12, "agent.evict", back},
		step{13, "entry.delete", "e"}, step{14, "entry.delete", "e"}, step{20, "x509_svid.issue", "e"})
	if !s.Complete || s.Revision != 20 || len(s.Acts) != 2 || s.Acts[0].Evict || !s.Acts[1].Evict || len(s.Created.List) != 0 || fmt.Sprint(s.Deleted.List) != "[e]" {
		t.Errorf("got %+v", s)
	}
	// A log that begins after the backup does not tell all.
	if s := since(t, 10, step{11, "agent.ban", bad}); s.Complete || len(s.Acts) != 1 {
		t.Errorf("a log that was pruned: %+v", s)
	}
	// What stands before a store was begun anew is about another one.
	s = since(t, 3, step{900, "root.activate", "old"}, step{950, "agent.ban", bad}, step{1, "root.create", "r"}, step{4, "agent.ban", back})
	if !s.Complete || s.Revision != 4 || len(s.Acts) != 1 || s.Acts[0].Agent.String() != back || s.rootsLost(map[string]ca.State{"r": ca.Active}) != "" {
		t.Errorf("a store begun anew: %+v", s)
	}
	if s, err := readSince(filepath.Join(t.TempDir(), "audit.log"), 1); err != nil || s.Complete {
		t.Errorf("no log: %+v, %v", s, err)
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
	} {
		s := since(t, 5, append([]step{{1, "root.create", "a"}}, tc.steps...)...)
		if got := s.rootsLost(tc.in); (got != "") != tc.lost {
			t.Errorf("%s: %q", name, got)
		}
	}
}

package audit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// events are the actions that Events tells, each with its revision.
func events(t testing.TB, path string) (all []string) {
	t.Helper()
	err := Events(path, func(e Event) error {
		all = append(all, fmt.Sprintf("%s@%d", e.Action, e.StoreRevision))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestLinesNameTheRevisionOfTheStore(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path})
	if l.Reached() != 0 {
		t.Errorf("a new log has reached %d", l.Reached())
	}
	record(t, l, "before")
	revision := int64(7)
	l.Follow(func() int64 { return revision })
	record(t, l, "first")
	revision = 9
	record(t, l, "second")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}

	// What the next start writes before it knows the store, such as a repair,
	// hides nothing.
	write(t, path, append(read(t, path), "torn"...))
	l = open(t, Config{Path: path})
	if l.Reached() != 9 {
		t.Errorf("has reached %d", l.Reached())
	}
	record(t, l, "third")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, Config{Path: path})
	if l.Reached() != 9 {
		t.Errorf("has reached %d after the repair", l.Reached())
	}
	want := "[before@0 first@7 second@9 audit_repaired@9 third@9]"
	if got := fmt.Sprint(events(t, path)); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestEventsGoOverAllFiles(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path, MaxBytes: 1000, Keep: 50})
	for i := range 20 {
		l.Follow(func() int64 { return int64(i) + 1 })
		record(t, l, fmt.Sprint(i))
	}
	got := events(t, path)
	if len(files(t, path)) < 2 || len(got) != 20 || got[0] != "0@1" || got[19] != "19@20" {
		t.Errorf("%d files, %v", len(files(t, path)), got)
	}
}

func TestAnEventHasWhatTheLineSays(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path})
	line := Line{
		Action: "agent.ban", Result: Result{Code: "ok"},
		Target: Target{SPIFFEID: "spiffe://a/b", EntryID: "e", AgentID: "spiffe://a/agent", AuthorityID: "f0"},
	}
	refused := line
	refused.Result.Code = "denied"
	if err := l.Record(t.Context(), line, refused); err != nil {
		t.Fatal(err)
	}
	var all []Event
	if err := Events(path, func(e Event) error {
		all = append(all, e)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := Event{Seq: 1, Time: all[0].Time, Action: "agent.ban", OK: true, SPIFFEID: "spiffe://a/b", EntryID: "e", AgentID: "spiffe://a/agent", AuthorityID: "f0"}
	if len(all) != 2 || all[0] != want || all[1].OK || time.Since(all[0].Time) > time.Minute {
		t.Errorf("got %+v", all)
	}
}

func TestEventsOfABrokenChainAreRefused(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path})
	record(t, l, "one", "two")
	data := read(t, path)
	data[200] ^= 1
	write(t, path, data)
	if err := Events(path, func(Event) error { return nil }); fault.ReasonOf(err) != "audit_chain_broken" {
		t.Error(err)
	}
}

// A crash in a rotation leaves older files and none under the log's own name.
func TestEventsWithoutANewestFile(t *testing.T) {
	path := logPath(t)
	if err := Events(path, func(Event) error { return nil }); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a log: %v", err)
	}
	l := open(t, Config{Path: path})
	record(t, l, "one", "two")
	if err := errors.Join(l.Close(), os.Rename(path, path+".1")); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(events(t, path)); got != "[one@0 two@0]" {
		t.Errorf("got %s", got)
	}
}

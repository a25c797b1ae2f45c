package registry_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/store"
)

// watchedKV is a real store whose commits a test can see and refuse.
type watchedKV struct {
	store.KV
	mu     sync.Mutex
	sizes  []int
	before func(n int) error // called with the number of the commit, from 1
	after  func()            // called when a commit is done
}

func (k *watchedKV) Commit(ctx context.Context, ifs []store.Precondition, writes []store.Write) (int64, error) {
	k.mu.Lock()
	k.sizes = append(k.sizes, len(writes))
	n, before := len(k.sizes), k.before
	k.mu.Unlock()
	if before != nil {
		if err := before(n); err != nil {
			return 0, err
		}
	}
	revision, err := k.KV.Commit(ctx, ifs, writes)
	if err == nil && k.after != nil {
		k.after()
	}
	return revision, err
}

// commits forgets what was committed so far and returns it.
func (k *watchedKV) commits() []int {
	k.mu.Lock()
	defer k.mu.Unlock()
	sizes := k.sizes
	k.sizes = nil
	return sizes
}

func many(n int, parent spiffeid.ID) []registry.Entry {
	list := make([]registry.Entry, n)
	for i := range list {
		list[i] = web(fmt.Sprintf("/w/%d", i), parent)
	}
	return list
}

func TestSimilarEntryExists(t *testing.T) {
	s := start(t, t.TempDir())
	first := web("/a", node(1))
	first.Selectors = selectors("unix:uid:1", "unix:gid:2")
	made := create(t, s.Registry, first)[0]
	again := first
	again.ID, again.Hint = "another-id", "other"
	again.Selectors = selector.Set{{Type: "unix", Value: "uid:1"}, {Type: "unix", Value: "gid:2"}, {Type: "unix", Value: "uid:1"}}
	result := s.CreateEntries(t.Context(), []registry.Entry{again})[0]
	wantFault(t, result.Err, fault.Exists, "entry_exists")
	if result.Entry.ID != made.ID {
		t.Errorf("got %+v, want the entry that exists", result.Entry)
	}
	for name, change := range map[string]func(*registry.Entry){
		"SPIFFE ID": func(e *registry.Entry) { e.SPIFFEID = id("/b") },
		"parent":    func(e *registry.Entry) { e.ParentID = node(2) },
		"selectors": func(e *registry.Entry) { e.Selectors = selectors("unix:uid:1") },
	} {
		e := first
		change(&e)
		if result := s.CreateEntries(t.Context(), []registry.Entry{e})[0]; result.Err != nil {
			t.Errorf("another %s: %v", name, result.Err)
		}
	}
}

func TestTakenIDExists(t *testing.T) {
	s := start(t, t.TempDir())
	first := web("/a", node(1))
	first.ID = "one"
	create(t, s.Registry, first)
	second := web("/b", node(1))
	second.ID = "one"
	result := s.CreateEntries(t.Context(), []registry.Entry{second})[0]
	wantFault(t, result.Err, fault.Exists, "entry_id_taken")
	if result.Entry.SPIFFEID != first.SPIFFEID {
		t.Errorf("got %+v", result.Entry)
	}
}

func TestBatchResultsKeepTheOrderAndStandAlone(t *testing.T) {
	s := start(t, t.TempDir())
	there := create(t, s.Registry, web("/there", node(1)))[0]
	named := web("/named", node(1))
	named.ID = "name"
	sameName := web("/other", node(1))
	sameName.ID = "name"
	results := s.CreateEntries(t.Context(), []registry.Entry{
		web("/a", node(1)), {}, web("/there", node(1)), web("/a", node(1)), named, sameName, web("/b", node(1)),
	})
	var got []string
	for _, r := range results {
		got = append(got, fault.ReasonOf(r.Err))
		if r.Err == nil {
			got[len(got)-1] = r.Entry.SPIFFEID.Path()
		}
	}
	want := []string{"/a", "spiffe_id_invalid", "entry_exists", "entry_exists", "/named", "entry_exists", "/b"}
	if !slices.Equal(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	if results[2].Entry.ID != there.ID || results[3].Entry.ID != results[0].Entry.ID {
		t.Errorf("an existing entry is not the one returned: %+v", results)
	}
}

func TestLargeBatchIsSplitIntoFullCommits(t *testing.T) {
	var kv *watchedKV
	s := start(t, t.TempDir(), func(o *registry.Options) {
		kv = &watchedKV{KV: o.Store}
		o.Store = kv
	})
	kv.commits()
	create(t, s.Registry, many(120, node(1))...)
	if got := kv.commits(); !slices.Equal(slices.Sorted(slices.Values(got)), []int{40, 100, 100}) {
		t.Errorf("commits of %v writes", got)
	}
	large := many(30, node(2))
	for i := range large { // 60 KiB each: 1 MiB is the limit
		for j := range 57 {
			large[i].Selectors = append(large[i].Selectors, selector.Selector{Type: "t", Value: fmt.Sprint(j, strings.Repeat("x", 1020))})
		}
	}
	create(t, s.Registry, large...)
	if got := kv.commits(); len(got) < 2 {
		t.Errorf("commits of %v writes", got)
	}
	if n := s.CountEntries(registry.EntryFilter{}); n != 150 {
		t.Errorf("%d entries", n)
	}
}

// Another server, whose commits this one has not seen, has some of the batch.
func TestConflictInAChunkCostsOnlyTheEntryInTheWay(t *testing.T) {
	s := start(t, t.TempDir())
	kv := &watchedKV{KV: s.kv}
	o := options(kv)
	blind, err := registry.Open(t.Context(), o) // does not run yet: sees nothing new
	if err != nil {
		t.Fatal(err)
	}
	list := many(100, node(1))
	list[93].ID = "taken"
	there := create(t, s.Registry, list[17], list[71], func() registry.Entry { e := web("/x", node(3)); e.ID = "taken"; return e }())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	kv.mu.Lock()
	kv.before = func(n int) error {
		if n == 2 { // the first commit, of 50 entries, has failed: now it may run
			go func() { done <- blind.Run(ctx) }()
		}
		return nil
	}
	kv.mu.Unlock()
	results := blind.CreateEntries(t.Context(), list)
	for i, r := range results {
		switch i {
		case 17, 71:
			if fault.ReasonOf(r.Err) != "entry_exists" || r.Entry.ID != there[i/71].ID {
				t.Errorf("%d: %+v", i, r)
			}
		case 93:
			if fault.ReasonOf(r.Err) != "entry_id_taken" || r.Entry.SPIFFEID != id("/x") {
				t.Errorf("%d: %+v", i, r)
			}
		default:
			if got, ok := blind.Entry(r.Entry.ID); r.Err != nil || !ok || got.SPIFFEID != list[i].SPIFFEID {
				t.Errorf("%d: %v", i, r.Err)
			}
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestTwoServersNeverMakeSimilarEntries(t *testing.T) {
	s := start(t, t.TempDir())
	other, stopOther := run(t, options(s.kv))
	list := many(300, node(1))
	var wg sync.WaitGroup
	results := make([][]registry.EntryResult, 4)
	for i := range results {
		wg.Go(func() {
			mine := slices.Clone(list)
			if i%2 == 1 {
				slices.Reverse(mine)
			}
			results[i] = []*registry.Registry{s.Registry, other}[i/2].CreateEntries(t.Context(), mine)
			if i%2 == 1 {
				slices.Reverse(results[i])
			}
		})
	}
	wg.Wait()
	if err := stopOther(); err != nil {
		t.Fatal(err)
	}
	s = s.restart(t)
	if n := s.CountEntries(registry.EntryFilter{}); n != 300 {
		t.Fatalf("%d entries", n)
	}
	for i := range list {
		made := 0
		for _, r := range results {
			if r[i].Err == nil {
				made++
			} else if !errors.Is(r[i].Err, fault.Exists) {
				t.Fatalf("entry %d: %v", i, r[i].Err)
			}
			if got, ok := s.Entry(r[i].Entry.ID); !ok || got.SPIFFEID != list[i].SPIFFEID {
				t.Fatalf("entry %d: a result names an entry that is not there", i)
			}
		}
		if made != 1 {
			t.Fatalf("entry %d was made %d times", i, made)
		}
	}
}

// What was acknowledged is there after the store took no more; what was not
// tried says why.
func TestFullStoreEndsABatchAndLosesNothing(t *testing.T) {
	full := fault.New(fault.Exhausted, "store_full", "no space")
	dir := t.TempDir()
	var kv *watchedKV
	s := start(t, dir, func(o *registry.Options) {
		kv = &watchedKV{KV: o.Store, before: func(n int) error {
			if n > 3 { // the epoch and two chunks
				return full
			}
			return nil
		}}
		o.Store = kv
	})
	results := s.CreateEntries(t.Context(), many(3000, node(1)))
	// Those under way may still ask; nobody begins to.
	if got := len(kv.commits()); got > 3+16 {
		t.Errorf("%d commits: a full store was asked again and again", got)
	}
	s = s.restart(t)
	made := 0
	for i, r := range results {
		if _, ok := s.Entry(r.Entry.ID); ok != (r.Err == nil) || r.Err != nil && !errors.Is(r.Err, full) {
			t.Fatalf("%d: %v, stored %v", i, r.Err, ok)
		}
		if r.Err == nil {
			made++
		}
	}
	if made != 100 {
		t.Errorf("%d entries were made", made)
	}
}

func TestCreateAnswersWhenTheRequestEnds(t *testing.T) {
	s := start(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := s.CreateEntries(ctx, []registry.Entry{web("/a", node(1))})[0]
	wantFault(t, r.Err, fault.NotReady, "request_ended") // WL-24: never the context's own error
	if s.CountEntries(registry.EntryFilter{}) != 0 {
		t.Error("made all the same")
	}
}

// What is committed is reported as done, also to somebody who hangs up in that
// moment: the audit line is made from the answer.
func TestWhatIsCommittedIsReportedAsDone(t *testing.T) {
	var kv *watchedKV
	s := start(t, t.TempDir(), func(o *registry.Options) {
		kv = &watchedKV{KV: o.Store}
		o.Store = kv
	})
	for n := range 20 {
		during := func(act func(context.Context) error) {
			t.Helper()
			ctx, cancel := context.WithCancel(t.Context())
			kv.after = cancel
			if err := act(ctx); err != nil {
				t.Fatal(err)
			}
			if ctx.Err() == nil {
				t.Fatal("nothing was committed")
			}
		}
		var made registry.Entry
		during(func(ctx context.Context) error {
			r := s.CreateEntries(ctx, []registry.Entry{web(fmt.Sprintf("/w/%d", n), node(1))})[0]
			made = r.Entry
			return r.Err
		})
		during(func(ctx context.Context) error {
			_, err := s.UpdateEntry(ctx, made.ID, func(e *registry.Entry) { e.Hint = "new" })
			return err
		})
		if got, ok := s.Entry(made.ID); !ok || got.Hint != "new" {
			t.Fatalf("the mirror has %+v", got)
		}
		during(func(ctx context.Context) error { return s.DeleteEntries(ctx, []string{made.ID})[0] })
		var token registry.Token
		during(func(ctx context.Context) (err error) {
			token, err = s.CreateToken(ctx, "", 0)
			return err
		})
		during(func(ctx context.Context) error {
			_, err := s.RedeemToken(ctx, token.Value, key(n))
			return err
		})
		during(func(ctx context.Context) error {
			return s.RecordIssued(ctx, token.AgentID, registry.Issued{Serial: "01", KeyHash: key(n), NotAfter: time.Now().Add(time.Hour)})
		})
		during(func(ctx context.Context) error {
			_, err := s.UseSerial(ctx, token.AgentID, registry.Shown{Serial: "01"})
			return err
		})
	}
}

func TestWaitRevisionEndsWithTheRegistry(t *testing.T) {
	s := start(t, t.TempDir())
	if err := s.WaitRevision(t.Context(), s.Revision()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	wantFault(t, s.WaitRevision(ctx, s.Revision()+1), fault.NotReady, "request_ended")
	failed := make(chan error)
	go func() { failed <- s.WaitRevision(context.Background(), s.Revision()+1) }()
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	wantFault(t, <-failed, fault.NotReady, "registry_stopped")
}

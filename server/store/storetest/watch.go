package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// gather returns the next n batches of a watch.
func gather(ctx context.Context, kv store.KV, prefix string, from int64, n int) ([]store.Batch, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var out []store.Batch
	for batch, err := range kv.Watch(ctx, prefix, from) {
		if err != nil {
			return out, fmt.Errorf("watch %q from %d, after %d of %d batches: %w", prefix, from, len(out), n, err)
		}
		if out = append(out, batch); len(out) == n {
			return out, nil
		}
	}
	return out, fmt.Errorf("watch %q from %d ended in silence after %d of %d batches", prefix, from, len(out), n)
}

func collect(t *testing.T, kv store.KV, prefix string, from int64, n int) []store.Batch {
	t.Helper()
	out, err := gather(t.Context(), kv, prefix, from, n)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// summary writes a batch as one comparable line.
func summary(b store.Batch) string {
	s := fmt.Sprint(b.Revision, ":")
	for _, e := range b.Events {
		if e.Deleted {
			s += fmt.Sprintf(" -%s@%d", e.Key, e.Revision)
		} else {
			s += fmt.Sprintf(" %s=%s@%d", e.Key, e.Value, e.Revision)
		}
	}
	return s
}

func summaries(batches []store.Batch) (out []string) {
	for _, b := range batches {
		out = append(out, summary(b))
	}
	return out
}

func increments(t *testing.T, open func() store.KV) {
	kv := open()
	const workers, each = 8, 25
	var mu sync.Mutex
	seen := map[int64]int{} // revision -> value
	increment := func() error {
		for {
			rec, err := kv.Get(t.Context(), "counter")
			if err != nil && !errors.Is(err, fault.NotFound) {
				return err
			}
			n, _ := strconv.Atoi(string(rec.Value)) // absent counts as 0
			revision, err := kv.Commit(t.Context(), []store.Precondition{{Key: "counter", Revision: rec.Revision}},
				[]store.Write{put("counter", strconv.Itoa(n+1))})
			if errors.Is(err, fault.Conflict) {
				continue
			}
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			if other, twice := seen[revision]; twice {
				return fmt.Errorf("revision %d was given to %d and %d", revision, other, n+1)
			}
			seen[revision] = n + 1
			after, err := kv.Get(t.Context(), "counter") // visible on return
			if err == nil && after.Revision < revision {
				err = fmt.Errorf("read revision %d after commit %d", after.Revision, revision)
			}
			return err
		}
	}
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				if err := increment(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	rec, err := kv.Get(t.Context(), "counter")
	if err != nil || string(rec.Value) != strconv.Itoa(workers*each) {
		t.Fatalf("counted to %s of %d: %v", rec.Value, workers*each, err)
	}
	if len(seen) != workers*each || seen[rec.Revision] != workers*each {
		t.Fatalf("%d revisions for %d commits", len(seen), workers*each)
	}
}

func watchComplete(t *testing.T, open func() store.KV) {
	kv := open()
	from := commit(t, kv, put("before", "x"))
	const commits = 40
	var live []store.Batch
	var watcher sync.WaitGroup
	watcher.Go(func() {
		var err error
		if live, err = gather(t.Context(), kv, "", from, commits); err != nil {
			t.Error(err)
		}
	})
	var want []string
	start := time.Now()
	for i := range commits {
		writes := []store.Write{put("z", strconv.Itoa(i)), put("a", strconv.Itoa(i))}
		if i%3 == 2 {
			writes[0] = remove("z")
		}
		b := store.Batch{Revision: commit(t, kv, writes...)}
		for _, w := range writes {
			b.Events = append(b.Events, store.Event{
				Record:  store.Record{Key: w.Key, Value: w.Value, Revision: b.Revision},
				Deleted: w.Delete,
			})
		}
		want = append(want, summary(b))
	}
	watcher.Wait()
	later := collect(t, kv, "", from, commits)
	for _, batches := range [][]store.Batch{live, later} {
		if !slices.Equal(summaries(batches), want) {
			t.Fatalf("got\n%q\nwant\n%q", summaries(batches), want)
		}
		for _, b := range batches {
			// A wide allowance: the clock may be another server's.
			if b.Time.Before(start.Add(-time.Minute)) || b.Time.After(time.Now().Add(time.Minute)) {
				t.Fatalf("revision %d was committed at %v", b.Revision, b.Time)
			}
		}
	}
}

func watchFilters(t *testing.T, open func() store.KV) {
	kv := open()
	from := commit(t, kv, put("x", "x"))
	first := commit(t, kv, put("e/1", "a"), put("f/1", "a"), put("e/2", "a"))
	commit(t, kv, put("f/1", "b"))
	commit(t, kv, put("e", "b"), put("e0", "b"))
	last := commit(t, kv, remove("f/1"), remove("e/1"))
	want := []string{fmt.Sprintf("%d: e/1=a@%d e/2=a@%d", first, first, first), fmt.Sprintf("%d: -e/1@%d", last, last)}
	if got := summaries(collect(t, kv, "e/", from, 2)); !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	if got := collect(t, kv, "", from, 4); len(got[0].Events) != 3 {
		t.Fatalf("unfiltered: %q", summaries(got))
	}
}

func watchDeletions(t *testing.T, open func() store.KV) {
	kv := open()
	from := commit(t, kv, put("a", "1"))
	commit(t, kv, remove("absent")) // no error, no event
	gone := commit(t, kv, remove("a"), remove("absent"))
	commit(t, kv, remove("a"))
	back := commit(t, kv, put("a", "2"))
	want := []string{fmt.Sprintf("%d: -a@%d", gone, gone), fmt.Sprintf("%d: a=2@%d", back, back)}
	batches := collect(t, kv, "", from, 2)
	if got := summaries(batches); !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	if v := batches[0].Events[0].Value; len(v) != 0 {
		t.Fatalf("a removal has the value %q", v)
	}
}

func watchResumes(t *testing.T, open func() store.KV) {
	kv := open()
	revisions := []int64{commit(t, kv, put("a", "0"))}
	for i := range 20 {
		revisions = append(revisions, commit(t, kv, put("a", strconv.Itoa(i+1))))
	}
	for i, from := range revisions[:len(revisions)-1] {
		got := collect(t, kv, "a", from, len(revisions)-1-i)
		for j, b := range got {
			if b.Revision != revisions[i+1+j] {
				t.Fatalf("from %d: batch %d has revision %d, want %d", from, j, b.Revision, revisions[i+1+j])
			}
		}
	}
	// One iterator, ranged over twice, starts twice.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	seq := kv.Watch(ctx, "a", revisions[3])
	for range 2 {
		for b, err := range seq {
			if err != nil || b.Revision != revisions[4] {
				t.Fatalf("revision %d, %v", b.Revision, err)
			}
			break
		}
	}
}

// watchFollowsList is how a mirror works: list, then watch from there, while
// others write. Nothing may be lost or refused in between.
func watchFollowsList(t *testing.T, open func() store.KV) {
	kv := open()
	const commits = 60
	commit(t, kv, put("n", "0"))
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for i := range commits {
			if _, err := kv.Commit(t.Context(), nil, []store.Write{put("n", strconv.Itoa(i+1))}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for value := ""; value != strconv.Itoa(commits); {
		page := list(t, kv, "", "", 0)
		value = string(page.Records[0].Value)
		if value == strconv.Itoa(commits) {
			break
		}
		n, err := strconv.Atoi(value)
		if err != nil {
			t.Fatal(err)
		}
		if next := collect(t, kv, "n", page.Revision, 1)[0]; string(next.Events[0].Value) != strconv.Itoa(n+1) {
			t.Fatalf("after %d at revision %d comes %s", n, page.Revision, summary(next))
		}
	}
}

func watchFuture(t *testing.T, open func() store.KV) {
	kv := open()
	now := commit(t, kv, put("a", "1"))
	for _, from := range []int64{now + 1, now + 1000, -1} {
		count := 0
		for _, err := range kv.Watch(t.Context(), "", from) {
			if count++; !errors.Is(err, store.ErrCompacted) {
				t.Fatalf("from %d, store at %d: %v", from, now, err)
			}
		}
		if count != 1 {
			t.Fatalf("from %d: %d answers", from, count)
		}
	}
}

func watchEnds(t *testing.T, open func() store.KV) {
	kv := open()
	at := commit(t, kv, put("a", "1"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var last error
	count := 0
	for batch, err := range kv.Watch(ctx, "", at-1) {
		count++
		if last = err; err == nil {
			if batch.Revision != at {
				t.Fatalf("got %s", summary(batch))
			}
			time.AfterFunc(time.Millisecond, cancel) // most likely, it waits by then
		}
	}
	if !errors.Is(last, context.Canceled) || count != 2 {
		t.Fatalf("ended with %v after %d answers", last, count)
	}
	for _, err := range kv.Watch(ctx, "", at-1) {
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("started with an ended context: %v", err)
		}
	}
	expired, stop := context.WithTimeout(t.Context(), time.Millisecond)
	defer stop()
	for _, err := range kv.Watch(expired, "", at) {
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("deadline: %v", err)
		}
	}
}

func watchAfterReopening(t *testing.T, open func() store.KV) {
	kv := open()
	from := commit(t, kv, put("a", "1"))
	second := commit(t, kv, put("a", "2"))
	third := commit(t, kv, put("a", "3"))
	kv = open()
	// Old history is there whole, or it is refused: never with a gap.
	want := []int64{second, third}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for batch, err := range kv.Watch(ctx, "a", from) {
		if err != nil {
			if !errors.Is(err, store.ErrCompacted) || len(want) != 2 {
				t.Fatalf("%d batches missing: %v", len(want), err)
			}
			break
		}
		if batch.Revision != want[0] {
			t.Fatalf("got %s, want revision %d", summary(batch), want[0])
		}
		if want = want[1:]; len(want) == 0 {
			break
		}
	}
	page := list(t, kv, "", "", 0)
	next := commit(t, kv, put("a", "4"))
	if got := collect(t, kv, "a", page.Revision, 1)[0]; got.Revision != next {
		t.Fatalf("got %s, want revision %d", summary(got), next)
	}
}

func manyWatchers(t *testing.T, open func() store.KV) {
	kv := open()
	from := commit(t, kv, put("a", "0"))
	const watchers, commits = 50, 30
	results := make([][]string, watchers)
	var wg sync.WaitGroup
	for i := range watchers {
		wg.Go(func() {
			batches, err := gather(t.Context(), kv, "a", from, commits)
			if err != nil {
				t.Error(err)
			}
			results[i] = summaries(batches)
		})
	}
	var want []string
	for i := range commits {
		value := strconv.Itoa(i)
		revision := commit(t, kv, put("a", value), put("b", value))
		want = append(want, fmt.Sprintf("%d: a=%s@%d", revision, value, revision))
	}
	wg.Wait()
	for i, got := range results {
		if !slices.Equal(got, want) {
			t.Fatalf("watcher %d: got %q, want %q", i, got, want)
		}
	}
}

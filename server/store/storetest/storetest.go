// Package storetest is what a driver of store.KV has to pass.
//
// It holds drivers to the contract and to nothing else: it knows no driver, and
// what the contract leaves open, such as whether history survives reopening,
// it accepts both ways.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// patience is how long a test waits for something that has to come.
const patience = 20 * time.Second

// Run tests a driver. For each test it calls start, which prepares an empty
// store and returns a function that opens it: the first call as new, each later
// one after closing the handle that the call before returned.
func Run(t *testing.T, start func(t *testing.T) (open func() store.KV)) {
	tests := []struct {
		name string
		test func(t *testing.T, open func() store.KV)
	}{
		{"RecordsComeBackAsWritten", recordsComeBack},
		{"RevisionsGrow", revisionsGrow},
		{"ReopeningKeepsEverything", reopening},
		{"ValuesAreCopies", valuesAreCopies},
		{"Preconditions", preconditions},
		{"ConflictLeavesNothing", conflictLeavesNothing},
		{"Limits", limits},
		{"EndedContextCommitsNothing", endedContext},
		{"ListOrderAndPrefix", listOrder},
		{"ListPages", listPages},
		{"IncrementsLoseNothing", increments},
		{"WatchIsCompleteAndInOrder", watchComplete},
		{"WatchFiltersByPrefix", watchFilters},
		{"WatchShowsDeletions", watchDeletions},
		{"WatchResumes", watchResumes},
		{"WatchFollowsList", watchFollowsList},
		{"WatchRefusesTheFuture", watchFuture},
		{"WatchEndsWithItsContext", watchEnds},
		{"WatchAfterReopening", watchAfterReopening},
		{"ManyWatchersSeeTheSame", manyWatchers},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.test(t, start(t)) })
	}
}

func put(key, value string) store.Write { return store.Write{Key: key, Value: []byte(value)} }

func remove(key string) store.Write { return store.Write{Key: key, Delete: true} }

func commit(t *testing.T, kv store.KV, writes ...store.Write) int64 {
	t.Helper()
	revision, err := kv.Commit(t.Context(), nil, writes)
	if err != nil {
		t.Fatalf("commit: %v", err)
	}
	return revision
}

func wantKind(t *testing.T, err error, kind fault.Kind) {
	t.Helper()
	if !errors.Is(err, kind) || fault.KindOf(err) != kind {
		t.Fatalf("got %v, want a fault of kind %v", err, kind)
	}
}

func wantRecord(t *testing.T, kv store.KV, key, value string, revision int64) {
	t.Helper()
	got, err := kv.Get(t.Context(), key)
	if err != nil {
		t.Fatalf("get %q: %v", key, err)
	}
	if got.Key != key || string(got.Value) != value || got.Revision != revision {
		t.Fatalf("get %q: got %q %q at %d, want %q at %d", key, got.Key, got.Value, got.Revision, value, revision)
	}
}

func wantAbsent(t *testing.T, kv store.KV, key string) {
	t.Helper()
	_, err := kv.Get(t.Context(), key)
	wantKind(t, err, fault.NotFound)
}

func list(t *testing.T, kv store.KV, prefix, after string, limit int) store.Page {
	t.Helper()
	page, err := kv.List(t.Context(), prefix, after, limit)
	if err != nil {
		t.Fatalf("list %q after %q: %v", prefix, after, err)
	}
	return page
}

func keys(page store.Page) []string {
	out := []string{}
	for _, r := range page.Records {
		out = append(out, r.Key)
	}
	return out
}

func recordsComeBack(t *testing.T, open func() store.KV) {
	kv := open()
	wantAbsent(t, kv, "a")
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	values := map[string]string{
		"a": "1", "empty": "", "bytes": string(all), "large": strings.Repeat("x", 300_000),
		"key with \x00 and \xff": "2", strings.Repeat("k", store.MaxKeyBytes): "3",
	}
	revisions := map[string]int64{}
	for key, value := range values {
		revisions[key] = commit(t, kv, put(key, value))
		wantRecord(t, kv, key, value, revisions[key])
	}
	second := commit(t, kv, put("a", "new"), remove("empty"), put("b", "4"))
	wantRecord(t, kv, "a", "new", second)
	wantRecord(t, kv, "b", "4", second)
	wantAbsent(t, kv, "empty")
	for _, key := range []string{"bytes", "large"} { // untouched since
		wantRecord(t, kv, key, values[key], revisions[key])
	}
}

func revisionsGrow(t *testing.T, open func() store.KV) {
	kv := open()
	last := list(t, kv, "", "", 0).Revision
	if last < 0 {
		t.Fatalf("a new store has revision %d", last)
	}
	for i := range 10 {
		got := commit(t, kv, put(fmt.Sprint("k", i%3), "v"))
		if got <= last || got < 1 {
			t.Fatalf("revision %d after %d", got, last)
		}
		if page := list(t, kv, "none", "", 0); page.Revision != got {
			t.Fatalf("the store is at %d, a page says %d", got, page.Revision)
		}
		last = got
	}
	commit(t, kv, remove("k0"))
	last = commit(t, kv, put("k0", "again"))
	kv = open()
	if page := list(t, kv, "", "", 0); page.Revision < last {
		t.Fatalf("revision went back from %d to %d", last, page.Revision)
	}
	if got := commit(t, kv, put("k1", "v")); got <= last {
		t.Fatalf("revision %d after reopening at %d", got, last)
	}
}

func reopening(t *testing.T, open func() store.KV) {
	kv := open()
	first := commit(t, kv, put("a", "1"), put("b", "2"))
	second := commit(t, kv, put("b", "3"), put("c", "4"))
	third := commit(t, kv, remove("c"))
	for range 2 {
		kv = open()
		wantRecord(t, kv, "a", "1", first)
		wantRecord(t, kv, "b", "3", second)
		wantAbsent(t, kv, "c")
	}
	if _, err := kv.Commit(t.Context(), []store.Precondition{{Key: "b", Revision: second}, {Key: "c"}}, []store.Write{put("d", "5")}); err != nil {
		t.Fatalf("preconditions do not hold after reopening (last revision %d): %v", third, err)
	}
}

func valuesAreCopies(t *testing.T, open func() store.KV) {
	kv := open()
	at := commit(t, kv, put("a", "value"))
	spoil := func(b []byte) {
		for i := range b {
			b[i] = '!'
		}
	}
	rec, err := kv.Get(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	spoil(rec.Value)
	spoil(list(t, kv, "", "", 0).Records[0].Value)
	wantRecord(t, kv, "a", "value", at)

	next := commit(t, kv, put("a", "other"))
	for range 2 { // the second watcher must not see what the first one did
		batch := collect(t, kv, "", at, 1)[0]
		if string(batch.Events[0].Value) != "other" {
			t.Fatalf("event has %q", batch.Events[0].Value)
		}
		spoil(batch.Events[0].Value)
	}
	wantRecord(t, kv, "a", "other", next)

	// What was read stays, whatever is written later.
	kept, err := kv.Get(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		commit(t, kv, put("a", strings.Repeat("z", i)))
	}
	if string(kept.Value) != "other" {
		t.Fatalf("a value changed under its reader: %q", kept.Value)
	}
}

func preconditions(t *testing.T, open func() store.KV) {
	kv := open()
	try := func(key string, revision int64) error {
		_, err := kv.Commit(t.Context(), []store.Precondition{{Key: key, Revision: revision}}, []store.Write{put("other", "x")})
		return err
	}
	first := commit(t, kv, put("a", "1"))
	second := commit(t, kv, put("a", "2"), put("b", "1"))
	if err := errors.Join(try("a", second), try("b", second), try("absent", 0)); err != nil {
		t.Errorf("a true precondition was refused: %v", err)
	}
	for _, p := range []store.Precondition{
		{Key: "a", Revision: first},
		{Key: "a", Revision: second + 1},
		{Key: "a"},
		{Key: "b", Revision: first},
		{Key: "absent", Revision: second},
		{Key: "absent", Revision: 1},
	} {
		wantKind(t, try(p.Key, p.Revision), fault.Conflict)
	}
	// A removed record is an absent one, and its successor another one.
	commit(t, kv, remove("a"))
	wantKind(t, try("a", second), fault.Conflict)
	if err := try("a", 0); err != nil {
		t.Errorf("removed record: %v", err)
	}
	again := commit(t, kv, put("a", "2"))
	wantKind(t, try("a", second), fault.Conflict)
	if err := try("a", again); err != nil {
		t.Errorf("record made anew: %v", err)
	}
	// All have to hold.
	ifs := []store.Precondition{{Key: "a", Revision: again}, {Key: "absent"}, {Key: "b", Revision: first}}
	_, err := kv.Commit(t.Context(), ifs, []store.Write{put("c", "x")})
	wantKind(t, err, fault.Conflict)
	ifs[2].Revision = second
	if _, err := kv.Commit(t.Context(), ifs, []store.Write{put("c", "x")}); err != nil {
		t.Errorf("three true preconditions: %v", err)
	}
}

func conflictLeavesNothing(t *testing.T, open func() store.KV) {
	kv := open()
	at := commit(t, kv, put("a", "1"), put("b", "1"))
	_, err := kv.Commit(t.Context(), []store.Precondition{{Key: "a", Revision: at + 5}},
		[]store.Write{put("a", "2"), remove("b"), put("c", "2")})
	wantKind(t, err, fault.Conflict)
	if page := list(t, kv, "", "", 0); page.Revision != at {
		t.Fatalf("revision %d after a conflict at %d", page.Revision, at)
	}
	next := commit(t, kv, put("d", "1"))
	if got := collect(t, kv, "", at, 1)[0]; got.Revision != next || len(got.Events) != 1 {
		t.Fatalf("the conflict made an event: %s", summary(got))
	}
	for range 2 { // as it is in memory, as it is on the disk
		wantRecord(t, kv, "a", "1", at)
		wantRecord(t, kv, "b", "1", at)
		wantAbsent(t, kv, "c")
		kv = open()
	}
}

func limits(t *testing.T, open func() store.KV) {
	kv := open()
	writes := func(n int) (out []store.Write) {
		for i := range n {
			out = append(out, put(fmt.Sprintf("k%03d", i), "v"))
		}
		return out
	}
	ifs := func(n int) (out []store.Precondition) {
		for i := range n {
			out = append(out, store.Precondition{Key: fmt.Sprintf("absent%03d", i)})
		}
		return out
	}
	full := strings.Repeat("x", store.MaxCommitBytes-2)
	longest := strings.Repeat("k", store.MaxKeyBytes)
	refused := map[string]struct {
		ifs    []store.Precondition
		writes []store.Write
	}{
		"no write":                {},
		"only a precondition":     {ifs: ifs(1)},
		"too many writes":         {writes: writes(store.MaxWrites + 1)},
		"too many preconditions":  {ifs: ifs(store.MaxWrites + 1), writes: writes(1)},
		"too many bytes":          {writes: []store.Write{put("a", full), put("b", "x")}},
		"too many bytes in one":   {writes: []store.Write{put("aaa", full)}},
		"key twice":               {writes: []store.Write{put("a", "1"), put("b", "1"), put("a", "1")}},
		"key written and removed": {writes: []store.Write{put("a", "1"), remove("a")}},
		"empty key":               {writes: []store.Write{put("", "1")}},
		"empty key removed":       {writes: []store.Write{remove("")}},
		"key too long":            {writes: []store.Write{put(longest+"k", "1")}},
		"precondition on no key":  {ifs: []store.Precondition{{}}, writes: writes(1)},
		"precondition too long":   {ifs: []store.Precondition{{Key: longest + "k"}}, writes: writes(1)},
		"negative revision":       {ifs: []store.Precondition{{Key: "a", Revision: -1}}, writes: writes(1)},
	}
	before := list(t, kv, "", "", 0)
	for name, c := range refused {
		if _, err := kv.Commit(t.Context(), c.ifs, c.writes); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if after := list(t, kv, "", "", 0); after.Revision != before.Revision || len(after.Records) != 0 {
		t.Fatalf("a refused commit left %v at revision %d", keys(after), after.Revision)
	}
	if _, err := kv.Commit(t.Context(), ifs(store.MaxWrites), writes(store.MaxWrites)); err != nil {
		t.Errorf("full count: %v", err)
	}
	if got := list(t, kv, "k", "", 0); len(got.Records) != store.MaxWrites {
		t.Errorf("%d records", len(got.Records))
	}
	wantRecord(t, kv, "a", full, commit(t, kv, put("a", full), put("b", "")))
	wantRecord(t, kv, longest, "v", commit(t, kv, put(longest, "v")))
	var removals []store.Write
	for _, w := range writes(store.MaxWrites) {
		removals = append(removals, remove(w.Key))
	}
	commit(t, kv, removals...)
	if got := keys(list(t, kv, "k0", "", 0)); len(got) != 0 {
		t.Errorf("still there: %v", got)
	}
}

func endedContext(t *testing.T, open func() store.KV) {
	kv := open()
	at := commit(t, kv, put("a", "1"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := kv.Commit(ctx, nil, []store.Write{put("a", "2")})
	wantKind(t, err, fault.NotReady)
	if errors.Is(err, store.ErrUnknown) || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	wantRecord(t, kv, "a", "1", at)
}

func listOrder(t *testing.T, open func() store.KV) {
	kv := open()
	if page := list(t, kv, "", "", 0); len(page.Records) != 0 || page.More {
		t.Fatalf("a new store has %v", page)
	}
	all := []string{"\x00", "A", "a", "a\x00", "a/", "a/1", "a/10", "a/2", "a/\xff", "a/\xff\xff", "a0", "ab", "b", "ä", "\xff", "\xff\xff", "\xff\xff1"}
	slices.Sort(all) // by bytes
	var writes []store.Write
	for _, i := range []int{5, 2, 11, 0, 16, 9, 4, 13, 1, 7, 15, 3, 8, 12, 6, 10, 14} {
		writes = append(writes, put(all[i], "v"))
	}
	commit(t, kv, writes...)
	places := append([]string{"", "a/\x00", "a/3", "a1", "zz", "\xff\xff\xff"}, all...)
	for _, prefix := range places {
		for _, after := range places {
			want := []string{}
			for _, key := range all {
				if strings.HasPrefix(key, prefix) && key > after {
					want = append(want, key)
				}
			}
			for _, limit := range []int{-1, 0, len(all)} {
				page := list(t, kv, prefix, after, limit)
				if got := keys(page); !slices.Equal(got, want) || page.More {
					t.Errorf("prefix %q after %q: got %q, more %v; want %q", prefix, after, got, page.More, want)
				}
			}
		}
	}
}

func listPages(t *testing.T, open func() store.KV) {
	kv := open()
	var want []string
	for i := range 3 {
		var writes []store.Write
		for j := range 7 {
			key := fmt.Sprintf("p/%d%d", i, j)
			want = append(want, key)
			writes = append(writes, put(key, key))
		}
		commit(t, kv, writes...)
	}
	commit(t, kv, put("o", "before"), put("p", "before"), put("p0", "behind"), put("q", "behind"))
	for limit := 1; limit <= len(want)+1; limit++ {
		var got []string
		for after, more := "", true; more; {
			page := list(t, kv, "p/", after, limit)
			if len(page.Records) > limit || page.More && len(page.Records) != limit {
				t.Fatalf("limit %d: a page of %d, more %v", limit, len(page.Records), page.More)
			}
			for _, r := range page.Records {
				if string(r.Value) != r.Key {
					t.Fatalf("%q has %q", r.Key, r.Value)
				}
				got, after = append(got, r.Key), r.Key
			}
			more = page.More
		}
		if !slices.Equal(got, want) {
			t.Errorf("limit %d: got %v, want %v", limit, got, want)
		}
	}
}

package store

import (
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// snapshot copies what a snapshot shows.
func snapshot(t testing.TB, b *Bolt) (at Moment, all []Record) {
	t.Helper()
	err := b.Snapshot(t.Context(), func(m Moment) error {
		at = m
		return nil
	}, func(r Record) error {
		r.Value = slices.Clone(r.Value)
		all = append(all, r)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return at, all
}

func sequence(records []Record, err error) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		for _, r := range records {
			if !yield(r, nil) {
				return
			}
		}
		if err != nil {
			yield(Record{}, err)
		}
	}
}

func TestASnapshotIsOfOneMoment(t *testing.T) {
	b := openStore(t, t.TempDir())
	for i := range 50 {
		set(t, b, fmt.Sprintf("key/%02d", i), "old")
	}
	want := b.Revision()
	var got []Record
	err := b.Snapshot(t.Context(), func(m Moment) error {
		if m.Revision != want || time.Since(m.Time) > time.Minute {
			t.Errorf("moment %v, want revision %d", m, want)
		}
		return nil
	}, func(r Record) error {
		if len(got) == 10 { // a commit in between is not seen
			set(t, b, "key/40", "new")
		}
		r.Value = slices.Clone(r.Value)
		got = append(got, r)
		return nil
	})
	if err != nil || len(got) != 50 || string(got[40].Value) != "old" || got[40].Revision > want {
		t.Fatalf("%d records, %v", len(got), err)
	}
	stop := errors.New("stop")
	if err := b.Snapshot(t.Context(), func(Moment) error { return nil }, func(Record) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("got %v", err)
	}
}

// A snapshot shows nothing that a power cut could still take back.
func TestASnapshotWaitsForWhatIsNotDurable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := openStore(t, t.TempDir())
		set(t, b, "a", strings.Repeat("x", 500_000)) // room that is free: a file that has to grow waits for its readers
		set(t, b, "a", "old")
		update, synced := b.update, make(chan error)
		b.update = func(f func(*bbolt.Tx) error) error { return errors.Join(update(f), <-synced) }
		done := make(chan error, 1)
		go func() {
			_, err := b.Commit(t.Context(), nil, []Write{{Key: "a", Value: []byte("new")}})
			done <- err
		}()
		synctest.Wait()
		shown := make(chan []Record, 1)
		go func() {
			_, all := snapshot(t, b)
			shown <- all
		}()
		synctest.Wait()
		if len(shown) != 0 {
			t.Error("it did not wait")
		}
		synced <- nil
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if all := <-shown; string(all[0].Value) != "new" {
			t.Errorf("shows %q", all[0].Value)
		}

		// Having waited, it keeps nobody from committing while it is read.
		go func() {
			_, err := b.Commit(t.Context(), nil, []Write{{Key: "b", Value: []byte("1")}})
			done <- err
		}()
		synctest.Wait()
		goOn := make(chan struct{})
		read := make(chan error, 1)
		go func() {
			read <- b.Snapshot(t.Context(), func(Moment) error { <-goOn; return nil }, func(Record) error { return nil })
		}()
		synctest.Wait()
		synced <- nil
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the snapshot is under way
		go func() {
			_, err := b.Commit(t.Context(), nil, []Write{{Key: "c", Value: []byte("1")}})
			done <- err
		}()
		synctest.Wait()
		select {
		case synced <- nil:
		default:
			t.Fatal("the commit waits for the reader")
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		close(goOn)
		if err := <-read; err != nil {
			t.Fatal(err)
		}
	})
}

func TestALoadedStoreIsTheOneThatWasShown(t *testing.T) {
	b := openStore(t, t.TempDir())
	set(t, b, "b", strings.Repeat("x", 100_000))
	set(t, b, "a", "")
	at, all := snapshot(t, b)
	for range 2*loadBatch + 1 { // more than one transaction
		key := fmt.Sprintf("many/%06d", len(all))
		all = append(all, Record{Key: key, Value: []byte(key), Revision: 2})
	}
	at.Revision += 100
	dir := filepath.Join(t.TempDir(), "made")
	if err := Load(BoltConfig{Dir: dir, NoSync: true}, at, sequence(all, nil)); err != nil {
		t.Fatal(err)
	}
	loaded := openStore(t, dir) // which reads the whole file
	got, records := snapshot(t, loaded)
	equal := func(a, b Record) bool {
		return a.Key == b.Key && a.Revision == b.Revision && string(a.Value) == string(b.Value)
	}
	if !got.Time.Equal(at.Time) || got.Revision != at.Revision || !slices.EqualFunc(records, all, equal) {
		t.Errorf("loaded %v with %d records, want %v with %d", got, len(records), at, len(all))
	}
	if next := set(t, loaded, "a", "1"); next != at.Revision+1 {
		t.Errorf("goes on at %d", next)
	}
}

func TestLoadMakesAWholeStoreOrNone(t *testing.T) {
	broken := errors.New("the source is broken")
	for name, tc := range map[string]struct {
		records []Record
		err     error
		reason  string
	}{
		"error":        {[]Record{{Key: "a", Revision: 1}}, fault.Wrap(fault.Invalid, broken, "backup_damaged", "x"), "backup_damaged"},
		"out of order": {[]Record{{Key: "b", Revision: 1}, {Key: "a", Revision: 1}}, nil, "record_invalid"},
		"twice":        {[]Record{{Key: "a", Revision: 1}, {Key: "a", Revision: 1}}, nil, "record_invalid"},
		"newer":        {[]Record{{Key: "a", Revision: 6}}, nil, "record_invalid"},
		"no key":       {[]Record{{Revision: 1}}, nil, "record_invalid"},
		"long key":     {[]Record{{Key: strings.Repeat("k", MaxKeyBytes+1), Revision: 1}}, nil, "record_invalid"},
	} {
		dir := t.TempDir()
		err := Load(BoltConfig{Dir: dir, NoSync: true}, Moment{Revision: 5, Time: time.Now()}, sequence(tc.records, tc.err))
		if fault.ReasonOf(err) != tc.reason {
			t.Errorf("%s: %v", name, err)
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) != 1 { // the lock
			t.Errorf("%s left %v, %v", name, left, err)
		}
	}
}

func TestLoadOverwritesNothing(t *testing.T) {
	dir := t.TempDir()
	b := openStore(t, dir)
	set(t, b, "a", "precious")
	before := content(t, b)
	closeStore(t, b)
	err := Load(BoltConfig{Dir: dir, NoSync: true}, Moment{Revision: 9, Time: time.Now()}, sequence(nil, nil))
	wantReason(t, err, fault.Exists, "store_exists")
	if got := content(t, openStore(t, dir)); got != before {
		t.Errorf("the store is now %s", got)
	}
}

func TestInstallKeepsTheStoreThatWasThere(t *testing.T) {
	to := t.TempDir()
	from := filepath.Join(to, "new")
	old := openStore(t, to)
	set(t, old, "a", "old")
	want := content(t, old)
	closeStore(t, old)
	if err := Load(BoltConfig{Dir: from, NoSync: true}, Moment{Revision: 9, Time: time.Now()}, sequence(nil, nil)); err != nil {
		t.Fatal(err)
	}
	kept, err := Install(from, to)
	if err != nil {
		t.Fatal(err)
	}
	b := openStore(t, to)
	if b.Revision() != 9 {
		t.Errorf("revision %d", b.Revision())
	}
	closeStore(t, b)
	back := t.TempDir()
	if err := os.Rename(kept, filepath.Join(back, boltFile)); err != nil {
		t.Fatal(err)
	}
	if got := content(t, openStore(t, back)); got != want {
		t.Errorf("kept %s", got)
	}
}

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"go.etcd.io/bbolt"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func openStore(t testing.TB, dir string) *Bolt {
	t.Helper()
	b, err := OpenBolt(BoltConfig{Dir: dir, NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func closeStore(t testing.TB, b *Bolt) {
	t.Helper()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

func set(t testing.TB, b *Bolt, key, value string) int64 {
	t.Helper()
	revision, err := b.Commit(context.Background(), nil, []Write{{Key: key, Value: []byte(value)}})
	if err != nil {
		t.Fatal(err)
	}
	return revision
}

// content is everything that a store shows.
func content(t testing.TB, b *Bolt) string {
	t.Helper()
	page, err := b.List(context.Background(), "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	var s strings.Builder
	fmt.Fprintln(&s, page.Revision, page.More)
	for _, r := range page.Records {
		fmt.Fprintf(&s, "%q %x %d\n", r.Key, r.Value, r.Revision)
	}
	return s.String()
}

func wantReason(t testing.TB, err error, kind fault.Kind, reason string) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
		t.Fatalf("got %v, want %v %s", err, kind, reason)
	}
}

func TestTheFirstRevisionIsTheMakingOfTheStore(t *testing.T) {
	b := openStore(t, t.TempDir())
	if page, err := b.List(t.Context(), "", "", 0); err != nil || page.Revision != 1 {
		t.Fatalf("revision %d, %v", page.Revision, err)
	}
	if got := set(t, b, "a", "1"); got != 2 {
		t.Fatalf("first commit is revision %d", got)
	}
}

func TestHistoryStartsAnewWithTheProcess(t *testing.T) {
	dir := t.TempDir()
	b := openStore(t, dir)
	before := set(t, b, "a", "1")
	now := set(t, b, "a", "2")
	closeStore(t, b)
	b = openStore(t, dir)
	for _, err := range b.Watch(t.Context(), "", before) {
		if !errors.Is(err, ErrCompacted) {
			t.Fatalf("got %v", err)
		}
	}
	next := set(t, b, "a", "3")
	for batch, err := range b.Watch(t.Context(), "", now) {
		if err != nil || batch.Revision != next {
			t.Fatalf("revision %d, %v", batch.Revision, err)
		}
		break
	}
}

func TestOneProcessHasTheDirectory(t *testing.T) {
	dir := t.TempDir()
	b := openStore(t, dir)
	_, err := OpenBolt(BoltConfig{Dir: dir})
	wantReason(t, err, fault.Conflict, "data_dir_locked")
	set(t, b, "a", "1") // the first one is unharmed
	closeStore(t, b)

	// Somebody looks into the file with a tool of bbolt's.
	other, err := bbolt.Open(filepath.Join(dir, boltFile), 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err = OpenBolt(BoltConfig{Dir: dir})
	wantReason(t, err, fault.Conflict, "data_dir_locked")
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	openStore(t, dir)
}

// NEG-44
func TestUntrustedPlacesAreRefused(t *testing.T) {
	dir := t.TempDir()
	wide := filepath.Join(dir, "wide")
	if err := errors.Join(os.Mkdir(wide, 0o700), os.Chmod(wide, 0o777)); err != nil {
		t.Fatal(err)
	}
	_, err := OpenBolt(BoltConfig{Dir: wide})
	wantReason(t, err, fault.Precondition, "path_untrusted")

	victim, private := filepath.Join(dir, "victim"), filepath.Join(dir, "private")
	if err := errors.Join(os.WriteFile(victim, []byte("precious"), 0o600), os.Mkdir(private, 0o700),
		os.Symlink(victim, filepath.Join(private, boltFile))); err != nil {
		t.Fatal(err)
	}
	_, err = OpenBolt(BoltConfig{Dir: private})
	wantReason(t, err, fault.Precondition, "path_untrusted")
	if got, err := os.ReadFile(victim); err != nil || string(got) != "precious" {
		t.Fatalf("%q, %v", got, err)
	}
}

func TestTheFileIsPrivateWhateverTheUmask(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "here")
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	openStore(t, dir)
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, boltFile): 0o600, filepath.Join(dir, "lock"): 0o600} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
}

func TestAClosedStoreSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := openStore(t, t.TempDir())
		at := set(t, b, "a", "1")
		watchEnded := make(chan error, 1)
		go func() {
			for _, err := range b.Watch(context.Background(), "", at) {
				watchEnded <- err
			}
		}()
		synctest.Wait()
		closeStore(t, b)
		closeStore(t, b) // twice does no harm
		wantReason(t, <-watchEnded, fault.NotReady, "store_closed")
		_, err := b.Get(t.Context(), "a")
		wantReason(t, err, fault.NotReady, "store_closed")
		_, err = b.List(t.Context(), "", "", 0)
		wantReason(t, err, fault.NotReady, "store_closed")
		_, err = b.Commit(t.Context(), nil, []Write{{Key: "a"}})
		wantReason(t, err, fault.NotReady, "store_closed")
		select {
		case <-b.Failed():
			t.Error("closing is no failure")
		default:
		}
	})
}

func TestAFullHistoryForgetsTheOldest(t *testing.T) {
	b := openStore(t, t.TempDir())
	b.history.maxBatches = 5
	var revisions []int64
	for i := range 12 {
		revisions = append(revisions, set(t, b, "a", fmt.Sprint(i)))
	}
	// Five batches are known: a watch may start at the sixth from the end.
	for i, from := range revisions {
		for batch, err := range b.Watch(t.Context(), "", from) {
			switch {
			case i < 6 && !errors.Is(err, ErrCompacted):
				t.Errorf("from %d: got %v", from, err)
			case i >= 6 && (err != nil || batch.Revision != revisions[i+1]):
				t.Errorf("from %d: revision %d, %v", from, batch.Revision, err)
			}
			break
		}
		if i == len(revisions)-2 {
			break // the last one would wait
		}
	}
}

func TestHistoryIsBoundedInBytesToo(t *testing.T) {
	b := openStore(t, t.TempDir())
	b.history.maxBytes = 100_000
	from := set(t, b, "start", "")
	value := strings.Repeat("x", 10_000)
	for range 30 {
		set(t, b, "a", value)
	}
	if got := len(b.history.batches); b.history.bytes > 100_000 || got < 5 || got > 10 {
		t.Errorf("%d batches, %d bytes", got, b.history.bytes)
	}
	for _, err := range b.Watch(t.Context(), "", from) {
		if !errors.Is(err, ErrCompacted) {
			t.Fatalf("got %v", err)
		}
	}
	// The newest commit is kept however large it is.
	at := set(t, b, "b", strings.Repeat("x", 200_000))
	for batch, err := range b.Watch(t.Context(), "", at-1) {
		if err != nil || batch.Revision != at {
			t.Fatalf("revision %d, %v", batch.Revision, err)
		}
		break
	}
}

// A watcher that does not read holds nobody up, and learns that it was too slow.
func TestASlowWatcherIsToldAndSlowsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := openStore(t, t.TempDir())
		b.history.maxBatches = readAhead
		at := set(t, b, "a", "0")
		goOn := make(chan struct{})
		ended := make(chan error, 1)
		got := 0
		go func() {
			for _, err := range b.Watch(context.Background(), "", at) {
				if err != nil {
					ended <- err
					return
				}
				got++
				<-goOn
			}
		}()
		synctest.Wait()
		set(t, b, "a", "1")
		synctest.Wait() // now it has the first batch in hand
		for i := range 10 * readAhead {
			set(t, b, "a", fmt.Sprint(i))
		}
		close(goOn)
		if err := <-ended; !errors.Is(err, ErrCompacted) || got != 1 {
			t.Errorf("after %d batches: %v", got, err)
		}
	})
}

func TestAWaitingCommitCanGiveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := openStore(t, t.TempDir())
		update, slow := b.update, make(chan struct{})
		b.update = func(f func(*bbolt.Tx) error) error {
			<-slow
			return update(f)
		}
		first := make(chan error, 1)
		go func() {
			_, err := b.Commit(t.Context(), nil, []Write{{Key: "first"}})
			first <- err
		}()
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		second := make(chan error, 1)
		go func() {
			_, err := b.Commit(ctx, nil, []Write{{Key: "second"}})
			second <- err
		}()
		synctest.Wait()
		cancel()
		err := <-second
		wantReason(t, err, fault.NotReady, "store_busy")
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		close(slow)
		if err := <-first; err != nil {
			t.Fatal(err)
		}
		if _, err := b.Get(t.Context(), "second"); !errors.Is(err, fault.NotFound) {
			t.Errorf("written all the same: %v", err)
		}
	})
}

// bbolt shows a commit to readers before its last sync. What could still be
// lost in a power cut must not be shown.
func TestReadersNeverSeeWhatIsNotDurable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := openStore(t, t.TempDir())
		set(t, b, "a", "old")
		update, synced := b.update, make(chan error)
		b.update = func(f func(*bbolt.Tx) error) error {
			return errors.Join(update(f), <-synced)
		}
		type answer struct {
			got string
			err error
		}
		read := func() <-chan answer {
			c := make(chan answer, 2)
			go func() {
				rec, err := b.Get(t.Context(), "a")
				c <- answer{string(rec.Value), err}
			}()
			go func() {
				page, err := b.List(t.Context(), "", "", 0)
				if err != nil {
					c <- answer{"", err}
					return
				}
				c <- answer{string(page.Records[0].Value), nil}
			}()
			synctest.Wait()
			return c
		}
		write := func(value string) <-chan error {
			c := make(chan error, 1)
			go func() {
				_, err := b.Commit(t.Context(), nil, []Write{{Key: "a", Value: []byte(value)}})
				c <- err
			}()
			synctest.Wait()
			return c
		}
		written := write("new")
		answers := read()
		if len(answers) != 0 {
			t.Fatalf("a reader did not wait: %v", <-answers)
		}
		synced <- nil
		if err := <-written; err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if a := <-answers; a.got != "new" || a.err != nil {
				t.Errorf("got %v", a)
			}
		}

		written = write("lost?")
		answers = read()
		synced <- syscall.EIO
		wantReason(t, <-written, fault.NotReady, "store_commit_unknown")
		for range 2 {
			if a := <-answers; a.got != "" || fault.ReasonOf(a.err) != "store_commit_unknown" {
				t.Errorf("got %v", a)
			}
		}
	})
}

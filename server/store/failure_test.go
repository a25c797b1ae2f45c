package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// descriptor finds the number under which this process has a file open.
func descriptor(t *testing.T, path string) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && target == path {
			n, err := strconv.Atoi(fd.Name())
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("%s is not open", path)
	return -1
}

// swap puts another file under the descriptor that bbolt writes to, so that
// its system calls fail for real, and returns what undoes that.
func swap(t *testing.T, b *Bolt, other string, flags int) (undo func()) {
	t.Helper()
	fd := descriptor(t, b.path)
	keep, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(other, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Dup3(int(f.Fd()), fd, unix.O_CLOEXEC), f.Close()); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := errors.Join(unix.Dup3(keep, fd, unix.O_CLOEXEC), unix.Close(keep)); err != nil {
			t.Fatal(err)
		}
	}
}

// warmed has free pages, so that the next commit does not grow the file.
func warmed(t *testing.T, dir string) *Bolt {
	t.Helper()
	b := openStore(t, dir)
	for i := range 10 {
		set(t, b, "a", fmt.Sprint(i))
	}
	return b
}

// NEG-54: the kernel itself says ENOSPC, to bbolt's own writes.
func TestAFullDiskIsAnAnswerAndTheStoreGoesOn(t *testing.T) {
	dir := t.TempDir()
	b := warmed(t, dir)
	before := content(t, b)
	undo := swap(t, b, "/dev/full", os.O_RDWR)
	for range 5 {
		_, err := b.Commit(t.Context(), nil, []Write{{Key: "a", Value: []byte("new")}, {Key: "b"}})
		wantReason(t, err, fault.Exhausted, "store_full")
		if errors.Is(err, ErrUnknown) || !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("got %v", err)
		}
		// The text goes to peers; where the file lies is for the log.
		if strings.Contains(fault.SafeText(err), dir) || !strings.Contains(err.Error(), dir) {
			t.Fatalf("a peer is told %q, the log %q", fault.SafeText(err), err)
		}
		if got := content(t, b); got != before {
			t.Fatalf("reads changed: %s", got)
		}
	}
	undo()
	at := b.history.newest
	revision := set(t, b, "a", "later") // there is space again
	if revision != at+1 {
		t.Errorf("revision %d after %d", revision, at)
	}
	for batch, err := range b.Watch(t.Context(), "", at) {
		if err != nil || batch.Revision != revision || len(batch.Events) != 1 {
			t.Errorf("%+v, %v", batch, err)
		}
		break
	}
	after := content(t, b)
	closeStore(t, b)
	if got := content(t, openStore(t, dir)); got != after {
		t.Errorf("after reopening: %s, want %s", got, after)
	}
}

// NEG-53: any other error of the disk stops the store, whether the commit can
// be seen or not.
func TestAWriteErrorStopsTheStore(t *testing.T) {
	for name, other := range map[string]struct {
		path  string
		flags int
	}{
		"write fails": {"/dev/zero", os.O_RDONLY}, // EBADF
		"sync fails":  {"/dev/null", os.O_RDWR},   // EINVAL
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			b, err := OpenBolt(BoltConfig{Dir: dir})
			if err != nil {
				t.Fatal(err)
			}
			for i := range 10 {
				set(t, b, "a", fmt.Sprint(i))
			}
			before := content(t, b)
			undo := swap(t, b, other.path, other.flags)
			_, err = b.Commit(t.Context(), nil, []Write{{Key: "a", Value: []byte("new")}})
			wantReason(t, err, fault.NotReady, "store_commit_unknown")
			undo()
			wantStopped(t, b)
			closeStore(t, b)
			if got := content(t, openStore(t, dir)); got != before {
				t.Errorf("after a new start: %s, want %s", got, before)
			}
		})
	}
}

// wantStopped wants the same answer from everything, for good.
func wantStopped(t *testing.T, b *Bolt) {
	t.Helper()
	select {
	case <-b.Failed():
	default:
		t.Fatal("Failed is not closed")
	}
	_, getErr := b.Get(t.Context(), "a")
	_, listErr := b.List(t.Context(), "", "", 0)
	_, commitErr := b.Commit(t.Context(), nil, []Write{{Key: "a"}})
	errs := []error{b.Err(), getErr, listErr, commitErr}
	for _, err := range b.Watch(t.Context(), "", b.history.newest) {
		errs = append(errs, err)
	}
	for _, err := range errs {
		wantReason(t, err, fault.NotReady, "store_commit_unknown")
		if !errors.Is(err, ErrUnknown) {
			t.Fatalf("%v does not wrap ErrUnknown", err)
		}
	}
}

// The table of answers, with bbolt's state as it really is after each failure.
// Only the error is injected.
func TestThreeAnswers(t *testing.T) {
	eio := &os.PathError{Op: "fdatasync", Path: "store.db", Err: syscall.EIO}
	full := &os.PathError{Op: "write", Path: "store.db", Err: syscall.ENOSPC}
	quota := fmt.Errorf("write: %w", syscall.EDQUOT)
	cases := []struct {
		name      string
		err       error
		written   bool // the transaction can be read afterwards
		committed string
	}{
		{"no space, not written", full, false, "not done"},
		{"no quota, not written", quota, false, "not done"},
		{"no space, but written", full, true, "unknown"},
		{"disk error, not written", eio, false, "unknown"},
		{"disk error, but written", eio, true, "unknown"}, // L-1
		{"error as text", errors.New("file resize error: no space left on device"), false, "unknown"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			b := openStore(t, dir)
			set(t, b, "a", "old")
			update := b.update
			b.update = func(f func(*bbolt.Tx) error) error {
				err := update(func(tx *bbolt.Tx) error {
					if err := f(tx); err != nil || c.written {
						return err
					}
					return c.err // bbolt rolls back
				})
				return errors.Join(err, c.err)
			}
			_, err := b.Commit(t.Context(), nil, []Write{{Key: "a", Value: []byte("new")}})
			switch c.committed {
			case "not done":
				wantReason(t, err, fault.Exhausted, "store_full")
				if errors.Is(err, ErrUnknown) {
					t.Error("wraps ErrUnknown")
				}
				b.update = update
				set(t, b, "b", "1")
			case "unknown":
				wantReason(t, err, fault.NotReady, "store_commit_unknown")
				wantStopped(t, b)
			}
			closeStore(t, b)
			want := "old"
			if c.written {
				want = "new"
			}
			rec, err := openStore(t, dir).Get(t.Context(), "a")
			if err != nil || string(rec.Value) != want {
				t.Errorf("after a new start: %q, %v, want %q", rec.Value, err, want)
			}
		})
	}
}

// A refusal stays a refusal, even when undoing the transaction meets errors.
func TestAConflictIsNeverUnknown(t *testing.T) {
	b := openStore(t, t.TempDir())
	update := b.update
	b.update = func(f func(*bbolt.Tx) error) error { return errors.Join(update(f), syscall.EIO) }
	_, err := b.Commit(t.Context(), []Precondition{{Key: "a", Revision: 7}}, []Write{{Key: "a"}})
	wantReason(t, err, fault.Conflict, "store_conflict")
	if b.Err() != nil {
		t.Errorf("stopped: %v", b.Err())
	}
}

func TestACrashInsideACommitIsUnknown(t *testing.T) {
	var log strings.Builder
	dir := t.TempDir()
	b, err := OpenBolt(BoltConfig{Dir: dir, NoSync: true, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	set(t, b, "a", "1")
	b.update = func(func(*bbolt.Tx) error) error { panic("page 7 already freed") }
	_, err = b.Commit(t.Context(), nil, []Write{{Key: "a"}})
	wantReason(t, err, fault.NotReady, "store_commit_unknown")
	wantStopped(t, b)
	closeStore(t, b) // must not wait for locks that bbolt may hold
	if !strings.Contains(log.String(), "page 7 already freed") || !strings.Contains(log.String(), "store stopped") {
		t.Errorf("log: %s", log.String())
	}
}

// What waits when the store stops must not wait for ever.
func TestAStopWakesEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := openStore(t, t.TempDir())
		at := set(t, b, "a", "1")
		fail := make(chan struct{})
		b.update = func(func(*bbolt.Tx) error) error { <-fail; return syscall.EIO }
		ended := make(chan error, 20)
		for range 5 {
			go func() {
				for _, err := range b.Watch(context.Background(), "", at) {
					ended <- err
				}
			}()
			go func() {
				_, err := b.Commit(context.Background(), nil, []Write{{Key: "a"}})
				ended <- err
			}()
		}
		synctest.Wait()
		if len(ended) != 0 {
			t.Fatalf("ended early: %v", <-ended)
		}
		close(fail)
		for range 10 {
			wantReason(t, <-ended, fault.NotReady, "store_commit_unknown")
		}
	})
}

// The file shrinks under the running store: bbolt's memory map faults. That
// must end in an error, not in the end of the process.
func TestAFileThatShrinksStopsTheStore(t *testing.T) {
	b := openStore(t, t.TempDir())
	for i := range 100 {
		set(t, b, fmt.Sprint("key", i), strings.Repeat("x", 1000))
	}
	if err := os.Truncate(b.path, 2*pageSize); err != nil {
		t.Fatal(err)
	}
	_, err := b.List(t.Context(), "", "", 0)
	wantReason(t, err, fault.Precondition, "store_corrupt")
	_, err = b.Get(t.Context(), "key7")
	wantReason(t, err, fault.Precondition, "store_corrupt")
	<-b.Failed()
	wantReason(t, b.Err(), fault.Precondition, "store_corrupt")
	closeStore(t, b)
}

// A record that goes bad under the running store is reported, not handed out.
func TestABadRecordIsNotHandedOut(t *testing.T) {
	dir := t.TempDir()
	b := openStore(t, dir)
	set(t, b, "good", "1")
	set(t, b, "bad", "findme")
	path := filepath.Join(dir, boltFile)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; ; {
		i := strings.Index(string(data[at:]), "findme")
		if i < 0 {
			break
		}
		at += i
		data[at] ^= 1
	}
	if err := os.WriteFile(path, data, 0o600); err != nil { // in place: the map shows it
		t.Fatal(err)
	}
	_, err = b.Get(t.Context(), "bad")
	wantReason(t, err, fault.Precondition, "store_corrupt")
	_, err = b.Commit(t.Context(), []Precondition{{Key: "bad", Revision: 3}}, []Write{{Key: "x"}})
	wantReason(t, err, fault.Precondition, "store_corrupt")
	if rec, err := b.Get(t.Context(), "good"); err != nil || string(rec.Value) != "1" {
		t.Errorf("%q, %v", rec.Value, err)
	}
}

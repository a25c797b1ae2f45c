package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func open(t testing.TB, cfg Config) *Log {
	t.Helper()
	l, err := Open(cfg, quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func logPath(t testing.TB) string { return filepath.Join(t.TempDir(), "audit.log") }

func record(t testing.TB, l *Log, actions ...string) {
	t.Helper()
	for _, a := range actions {
		if err := l.Record(t.Context(), Line{Action: a}); err != nil {
			t.Fatal(err)
		}
	}
}

// actions returns what the log holds, oldest first, and fails on a broken chain.
func actions(t testing.TB, path string) []string {
	t.Helper()
	rep, err := Verify(path)
	if err != nil {
		t.Fatal(err)
	}
	numbers, err := rotated(path)
	if err != nil {
		t.Fatal(err)
	}
	files := []string{path}
	for _, n := range numbers {
		files = append(files, numbered(path, n))
	}
	var all []string
	for _, f := range slices.Backward(files) {
		data := read(t, f)
		for line := range bytes.Lines(data) {
			_, rest, _ := bytes.Cut(line, []byte(`"action":"`))
			action, _, _ := bytes.Cut(rest, []byte{'"'})
			all = append(all, string(action))
		}
	}
	if int64(len(all)) != rep.Lines {
		t.Fatalf("%d lines, Verify saw %d", len(all), rep.Lines)
	}
	return all
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func wantFault(t testing.TB, err error, kind fault.Kind, reason string) {
	t.Helper()
	if !errors.Is(err, kind) || fault.ReasonOf(err) != reason {
		t.Fatalf("got %v, want %v %s", err, kind, reason)
	}
}

func TestRecordedLinesAreOnDiskInOrder(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path})
	if err := l.Record(t.Context(), Line{Action: "a"}, Line{Action: "b"}); err != nil {
		t.Fatal(err)
	}
	if err := l.Record(t.Context()); err != nil {
		t.Fatal(err)
	}
	record(t, l, "c")
	if got := actions(t, path); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Fatalf("got %q", got)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
}

func TestChainGoesOnOverRestarts(t *testing.T) {
	path := logPath(t)
	for i := range 3 {
		l, err := Open(Config{Path: path}, quiet())
		if err != nil {
			t.Fatal(err)
		}
		record(t, l, fmt.Sprint(i))
		if err := errors.Join(l.Close(), l.Close()); err != nil {
			t.Fatal(err)
		}
		wantFault(t, l.Record(t.Context(), Line{}), fault.NotReady, "audit_failed")
	}
	rep, err := Verify(path)
	if err != nil || rep.First != 1 || rep.Last != 3 || rep.Lines != 3 || rep.Files != 1 || len(rep.Hash) != 64 {
		t.Fatalf("%+v, %v", rep, err)
	}
}

// P8: a line that Record has returned for is synced. Whoever comes while a sync
// is under way shares the next one.
func TestConcurrentCallersShareASync(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path})
	real := realDisk()
	var syncs int
	entered, release := make(chan struct{}, 1), make(chan struct{})
	l.disk.sync = func(f *os.File) error {
		if syncs++; syncs == 1 {
			entered <- struct{}{}
			<-release
		}
		return real.sync(f)
	}
	var wg sync.WaitGroup
	var answered atomic.Int32
	call := func(i int) {
		wg.Go(func() {
			if err := l.Record(context.Background(), Line{Action: fmt.Sprint(i)}); err != nil {
				t.Error(err)
			}
			answered.Add(1)
		})
	}
	call(0)
	<-entered
	for i := range 50 {
		call(i + 1)
	}
	for queued := 0; queued < 50; { // all of them wait behind the first
		l.mu.Lock()
		if l.gather != nil {
			queued = len(l.gather.ends)
		}
		l.mu.Unlock()
	}
	if n := answered.Load(); n != 0 {
		t.Errorf("%d callers were answered before the sync", n)
	}
	close(release)
	wg.Wait()
	if syncs != 2 {
		t.Errorf("51 lines took %d syncs, want 2", syncs)
	}
	if got := actions(t, path); len(got) != 51 || got[0] != "0" {
		t.Errorf("log holds %q", got)
	}
}

func TestManyCallersOverRotations(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path, MaxBytes: 4 << 10, Keep: 1000})
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			for i := range 10 {
				a := fmt.Sprintf("%d.%d", g, i)
				if err := l.Record(context.Background(), Line{Action: a + "a"}, Line{Action: a + "b"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got := actions(t, path)
	if len(got) != 640 {
		t.Fatalf("%d lines", len(got))
	}
	for i, a := range got { // the lines of one call stay together
		if base, ok := strings.CutSuffix(a, "a"); ok && got[i+1] != base+"b" {
			t.Fatalf("%q is followed by %q", a, got[i+1])
		}
	}
}

func TestCallerWhoseContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := logPath(t)
		l := open(t, Config{Path: path})
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		wantFault(t, l.Record(ended, Line{Action: "never"}), fault.NotReady, "audit_interrupted")

		release := make(chan struct{})
		real := realDisk()
		l.disk.sync = func(f *os.File) error { <-release; return real.sync(f) }
		for _, action := range []string{"writing", "leading"} {
			go func() {
				if err := l.Record(context.Background(), Line{Action: action}); err != nil {
					t.Error(err)
				}
			}()
			synctest.Wait()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		wantFault(t, l.Record(ctx, Line{Action: "left"}), fault.NotReady, "audit_interrupted")
		close(release)
		synctest.Wait()
		if got := actions(t, path); !slices.Equal(got, []string{"writing", "leading", "left"}) {
			t.Fatalf("got %q", got)
		}
	})
}

func TestAPanicWhileWritingHangsNobody(t *testing.T) {
	l := open(t, Config{Path: logPath(t)})
	l.disk.sync = func(*os.File) error { panic("defect") }
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic was swallowed")
			}
		}()
		_ = l.Record(t.Context(), Line{})
	}()
	wantFault(t, l.Record(t.Context(), Line{}), fault.NotReady, "audit_failed")
}

// NEG-54: no space refuses the act, keeps the chain, and heals by itself.
func TestNoSpaceIsTakenBackAndHeals(t *testing.T) {
	for name, breakDisk := range map[string]func(*disk){
		"half a write": func(d *disk) {
			d.write = func(f *os.File, p []byte, off int64) (int, error) {
				n, _ := f.WriteAt(p[:len(p)/2], off)
				return n, syscall.ENOSPC
			}
		},
		"quota": func(d *disk) {
			d.write = func(*os.File, []byte, int64) (int, error) { return 0, syscall.EDQUOT }
		},
		"told by the sync": func(d *disk) {
			times, real := 0, d.sync
			d.sync = func(f *os.File) error {
				if times++; times == 1 {
					return syscall.ENOSPC
				}
				return real(f)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := logPath(t)
			l := open(t, Config{Path: path})
			record(t, l, "before")
			size := len(read(t, path))
			breakDisk(&l.disk)
			wantFault(t, l.Record(t.Context(), Line{Action: "refused"}), fault.Exhausted, "audit_full")
			wantFault(t, l.Err(), fault.Exhausted, "audit_full")
			if got := len(read(t, path)); got != size {
				t.Fatalf("%d bytes are left behind the last line", got-size)
			}
			l.disk = realDisk()
			record(t, l, "after")
			if err := l.Err(); err != nil {
				t.Fatal(err)
			}
			if got := actions(t, path); !slices.Equal(got, []string{"before", "after"}) {
				t.Fatalf("got %q", got)
			}
		})
	}
}

func TestFullIsNotToldForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, Config{Path: logPath(t)})
		l.disk.write = func(*os.File, []byte, int64) (int, error) { return 0, syscall.ENOSPC }
		wantFault(t, l.Record(t.Context(), Line{}), fault.Exhausted, "audit_full")
		<-time.After(fullFor - time.Millisecond)
		wantFault(t, l.Err(), fault.Exhausted, "audit_full")
		<-time.After(time.Millisecond)
		if err := l.Err(); err != nil {
			t.Fatalf("nobody would try again: %v", err)
		}
	})
}

// NEG-53: an error with a known outcome passes, one with an unknown outcome
// fails the log until it is opened anew.
func TestDiskErrors(t *testing.T) {
	eio := syscall.EIO
	cases := []struct {
		name  string
		disk  func(*disk)
		stays bool
	}{
		{"write fails, nothing written", func(d *disk) {
			d.write = func(*os.File, []byte, int64) (int, error) { return 0, eio }
		}, false},
		{"sync fails", func(d *disk) { d.sync = func(*os.File) error { return eio } }, true},
		{"write and truncation fail", func(d *disk) {
			d.write = func(*os.File, []byte, int64) (int, error) { return 0, syscall.ENOSPC }
			d.truncate = func(*os.File, int64) error { return eio }
		}, true},
		{"write and the sync of the truncation fail", func(d *disk) {
			d.write = func(*os.File, []byte, int64) (int, error) { return 0, syscall.ENOSPC }
			d.sync = func(*os.File) error { return eio }
		}, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			path := logPath(t)
			l := open(t, Config{Path: path})
			record(t, l, "before")
			c.disk(&l.disk)
			err := l.Record(t.Context(), Line{Action: "unknown"})
			wantFault(t, err, fault.NotReady, "audit_failed")
			l.disk = realDisk()
			if !c.stays {
				record(t, l, "after")
				return
			}
			wantFault(t, l.Record(t.Context(), Line{}), fault.NotReady, "audit_failed")
			wantFault(t, l.Err(), fault.NotReady, "audit_failed")
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			record(t, open(t, Config{Path: path}), "reopened")
			if got := actions(t, path); got[0] != "before" || got[len(got)-1] != "reopened" {
				t.Fatalf("got %q", got)
			}
		})
	}
}

func TestLogThatOthersTouched(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path})
	record(t, l, "a", "b")

	// Moved away and not put back: a successor goes on.
	if err := os.Rename(path, numbered(path, 1)); err != nil {
		t.Fatal(err)
	}
	record(t, l, "c")
	if got := actions(t, path); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Fatalf("got %q", got)
	}
	// Another file in its place: not ours, refused while it is there.
	aside := path + ".aside"
	if err := os.Rename(path, aside); err != nil {
		t.Fatal(err)
	}
	write(t, path, nil)
	wantFault(t, l.Record(t.Context(), Line{}), fault.NotReady, "audit_failed")
	if err := os.Rename(aside, path); err != nil {
		t.Fatal(err)
	}
	record(t, l, "d")
	// Cut by a copying rotation: refused, and after a restart it goes on from
	// what is there.
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	wantFault(t, l.Record(t.Context(), Line{}), fault.NotReady, "audit_failed")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	record(t, open(t, Config{Path: path}), "e")
	if got := actions(t, path); !slices.Equal(got, []string{"a", "b", "e"}) {
		t.Fatalf("got %q", got)
	}
}

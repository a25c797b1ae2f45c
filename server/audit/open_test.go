package audit

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// A crash during a write leaves any part of it. Whatever is left, the whole
// lines stay, the torn one is replaced by a line that tells of it.
func TestTornLineIsRepairedAtEveryByte(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path})
	record(t, l, "first")
	first := len(read(t, path))
	record(t, l, "second")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	whole := read(t, path)
	for cut := 1; cut < len(whole); cut++ {
		write(t, path, whole[:cut])
		var out bytes.Buffer
		l, err := Open(Config{Path: path}, slog.New(slog.NewTextHandler(&out, nil)))
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		record(t, l, "after")
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		want := []string{"audit_repaired", "after"}
		switch {
		case cut == first:
			want = []string{"first", "after"}
		case cut > first:
			want = []string{"first", "audit_repaired", "after"}
		}
		if got := actions(t, path); !slices.Equal(got, want) {
			t.Fatalf("cut at %d: got %q, want %q", cut, got, want)
		}
		if told := strings.Contains(out.String(), "unfinished line"); told != (cut != first) {
			t.Fatalf("cut at %d: log says %q", cut, out.String())
		}
	}
}

func TestRepairTellsHowMuchWasRemoved(t *testing.T) {
	path := logPath(t)
	write(t, path, bytes.Repeat([]byte{0}, 300_000)) // zeros longer than any line, as file systems leave them
	open(t, Config{Path: path})
	p := parse(t, bytes.TrimSuffix(read(t, path), []byte("\n")))
	if p.Seq != 1 || p.Action != "audit_repaired" || p.Actor.Kind != "server" || p.Why.Rule != "torn_line: 300000 bytes removed behind line 0" {
		t.Fatalf("%+v", p)
	}
}

// A crash between overwriting and cutting must not lose the note.
func TestRepairOverwritesBeforeItCuts(t *testing.T) {
	path := logPath(t)
	write(t, path, bytes.Repeat([]byte{'x'}, 5000))
	l := &Log{path: path, maxBytes: 1 << 20, keep: 1, rotateAt: 1 << 20, log: quiet(), disk: realDisk(), turn: make(chan struct{}, 1)}
	l.disk.truncate = func(*os.File, int64) error { return errors.New("the power went") }
	wantFault(t, l.open(), fault.NotReady, "audit_failed")
	record(t, open(t, Config{Path: path}), "after")
	if got := actions(t, path); !slices.Equal(got, []string{"audit_repaired", "audit_repaired", "after"}) {
		t.Fatalf("got %q", got)
	}
}

func TestDamagedLastLineIsRefusedAndLeftAlone(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path})
	record(t, l, "first")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	good := read(t, path)
	for name, tail := range map[string]string{
		"not JSON": "garbage\n", "empty": "\n", "JSON of something else": `{"level":"info"}` + "\n",
		"no hash": `{"seq":2,"prev_hash":"","audit":true}` + "\n", "too long": strings.Repeat("x", maxLine+1) + "\n",
		"damaged, then torn": "garbage\n{\"seq\"",
		"number at its end":  `{"seq":18446744073709551615,"prev_hash":"` + strings.Repeat("0", 64) + `","audit":true}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			data := slices.Concat(good, []byte(tail))
			write(t, path, data)
			_, err := Open(Config{Path: path}, quiet())
			wantFault(t, err, fault.Precondition, "audit_corrupt")
			if !bytes.Equal(read(t, path), data) {
				t.Error("the file was changed")
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Run("a second process", func(t *testing.T) {
		path := logPath(t)
		open(t, Config{Path: path})
		_, err := Open(Config{Path: path}, quiet())
		wantFault(t, err, fault.Conflict, "audit_in_use")
	})
	t.Run("no path", func(t *testing.T) {
		_, err := Open(Config{}, quiet())
		wantFault(t, err, fault.Precondition, "config_invalid")
	})
	t.Run("negative sizes", func(t *testing.T) {
		_, err := Open(Config{Path: logPath(t), Keep: -1}, quiet())
		wantFault(t, err, fault.Precondition, "config_invalid")
	})
	t.Run("a file that others write", func(t *testing.T) { // NEG-44
		path := logPath(t)
		write(t, path, nil)
		if err := os.Chmod(path, 0o620); err != nil {
			t.Fatal(err)
		}
		_, err := Open(Config{Path: path}, quiet())
		wantFault(t, err, fault.Precondition, "path_untrusted")
	})
	t.Run("a symbolic link", func(t *testing.T) { // NEG-44
		path := logPath(t)
		write(t, path+".target", []byte("precious"))
		if err := os.Symlink(path+".target", path); err != nil {
			t.Fatal(err)
		}
		_, err := Open(Config{Path: path}, quiet())
		wantFault(t, err, fault.Precondition, "path_untrusted")
		if string(read(t, path+".target")) != "precious" {
			t.Error("the target was changed")
		}
	})
	t.Run("a directory that is not there", func(t *testing.T) {
		if _, err := Open(Config{Path: logPath(t) + "/x/audit.log"}, quiet()); err == nil {
			t.Error("opened")
		}
	})
}

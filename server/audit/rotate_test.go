package audit

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func files(t testing.TB, path string) []int {
	t.Helper()
	numbers, err := rotated(path)
	if err != nil {
		t.Fatal(err)
	}
	return numbers
}

func TestRotationKeepsTheChainAndTheNumberOfFiles(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path, MaxBytes: 1, Keep: 3}) // every write begins a file
	for i := range 10 {
		record(t, l, fmt.Sprint(i))
	}
	if got := files(t, path); !slices.Equal(got, []int{1, 2, 3}) {
		t.Fatalf("older files %v", got)
	}
	if got := actions(t, path); !slices.Equal(got, []string{"6", "7", "8", "9"}) {
		t.Fatalf("got %q", got)
	}
	rep, err := Verify(path)
	if err != nil || rep.First != 7 || rep.Last != 10 || rep.Files != 4 {
		t.Fatalf("%+v, %v", rep, err)
	}
}

func TestFewerFilesAreKeptAfterARestartWithFewer(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path, MaxBytes: 1, Keep: 5})
	record(t, l, "1", "2", "3", "4", "5", "6", "7")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	record(t, open(t, Config{Path: path, MaxBytes: 1, Keep: 2}), "8")
	if got := actions(t, path); !slices.Equal(got, []string{"6", "7", "8"}) {
		t.Fatalf("got %q", got)
	}
}

// The states that a crash between two renames of a rotation leaves.
func TestCrashWithinRotation(t *testing.T) {
	for name, crash := range map[string]func(t *testing.T, path string){
		"new file made, nothing renamed": func(t *testing.T, path string) { write(t, path+".new", nil) },
		"older files moved up": func(t *testing.T, path string) {
			rename(t, numbered(path, 2), numbered(path, 3))
			rename(t, numbered(path, 1), numbered(path, 2))
			write(t, path+".new", nil)
		},
		"current file renamed": func(t *testing.T, path string) {
			rename(t, numbered(path, 2), numbered(path, 3))
			rename(t, numbered(path, 1), numbered(path, 2))
			rename(t, path, numbered(path, 1))
			write(t, path+".new", nil)
		},
		"new file in place, nothing written": func(t *testing.T, path string) {
			rename(t, numbered(path, 2), numbered(path, 3))
			rename(t, numbered(path, 1), numbered(path, 2))
			rename(t, path, numbered(path, 1))
			write(t, path, nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := logPath(t)
			cfg := Config{Path: path, MaxBytes: 1, Keep: 5}
			l := open(t, cfg)
			record(t, l, "1", "2", "3")
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			crash(t, path)
			l = open(t, cfg)
			record(t, l, "4", "5")
			if got := actions(t, path); !slices.Equal(got, []string{"1", "2", "3", "4", "5"}) {
				t.Fatalf("got %q", got)
			}
			if got := files(t, path); !slices.Equal(got, []int{1, 2, 3, 4}) {
				t.Fatalf("older files %v", got)
			}
		})
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestRotationThatCannotBeDoneIsPostponed(t *testing.T) {
	for name, obstacle := range map[string]func(path string) string{
		"no new file can be made":         func(path string) string { return path + ".new" },
		"the old name can't be taken":     func(path string) string { return numbered(path, 1) },
		"an older name can't be taken up": func(path string) string { return numbered(path, 2) },
	} {
		t.Run(name, func(t *testing.T) {
			path := logPath(t)
			var out bytes.Buffer
			in, keep := obstacle(path), 2
			if in == numbered(path, 1) {
				keep = 1 // else the obstacle itself would be renamed out of the way
			}
			l, err := Open(Config{Path: path, MaxBytes: 1000, Keep: keep}, slog.New(slog.NewTextHandler(&out, nil)))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if in == numbered(path, 2) {
				write(t, numbered(path, 1), nil)
			}
			if err := os.MkdirAll(in+"/full", 0o700); err != nil {
				t.Fatal(err)
			}
			long := strings.Repeat("x", 300)
			for range 8 {
				record(t, l, long)
			}
			if n := strings.Count(out.String(), "can't be rotated"); n == 0 || n > 8 {
				t.Errorf("told %d times:\n%s", n, out.String())
			}
			if err := os.RemoveAll(in); err != nil {
				t.Fatal(err)
			}
			_ = os.Remove(numbered(path, 1)) // the empty stand-in
			record(t, l, long, "last")
			if got := files(t, path); !slices.Equal(got, []int{1}) {
				t.Errorf("older files %v", got)
			}
			if got := actions(t, path); got[len(got)-1] != "last" || len(got) < 10 {
				t.Errorf("%d lines", len(got))
			}
		})
	}
}

func TestOlderFileThatCannotBeContinued(t *testing.T) {
	for name, data := range map[string]string{"empty": "", "torn": `{"seq":1`, "damaged": "garbage\n"} {
		t.Run(name, func(t *testing.T) {
			path := logPath(t)
			write(t, numbered(path, 1), []byte(data))
			_, err := Open(Config{Path: path}, quiet())
			wantFault(t, err, fault.Precondition, "audit_corrupt")
		})
	}
}

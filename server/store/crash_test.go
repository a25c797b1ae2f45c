package store

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// crashDir names the variable that turns this test binary into a program that
// commits until it is killed.
const crashDir = "ASSAY_STORE_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		if err := commitForEver(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// commitForEver counts upwards in two records at once, moves a record from key
// to key, and says after each commit which one is done.
func commitForEver(dir string) error {
	ctx := context.Background()
	b, err := OpenBolt(BoltConfig{Dir: dir})
	if err != nil {
		return err
	}
	n := 0
	if rec, err := b.Get(ctx, "one"); err == nil {
		if n, err = strconv.Atoi(string(rec.Value)); err != nil {
			return err
		}
	}
	for {
		n++
		value := []byte(strconv.Itoa(n))
		_, err := b.Commit(ctx, nil, []Write{
			{Key: "one", Value: value},
			{Key: "two", Value: value},
			{Key: fmt.Sprint("at/", n), Value: bytes.Repeat(value, n%700)},
			{Key: fmt.Sprint("at/", n-1), Delete: true},
		})
		if err != nil {
			return err
		}
		fmt.Println(n)
	}
}

// SIGKILL at any moment: what was answered is there, nothing is half there.
func TestAKilledProcessLosesNothingThatItAnswered(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	random := rand.New(rand.NewPCG(5, 6))
	answered := 0
	for range 8 {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), crashDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for range 1 + random.IntN(20) {
			if !lines.Scan() {
				break
			}
		}
		time.AfterFunc(time.Duration(random.IntN(8000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
		last := lines.Text()
		for lines.Scan() {
			last = lines.Text()
		}
		_ = cmd.Wait() // it was killed, that is an error
		n, err := strconv.Atoi(last)
		if err != nil || n <= answered {
			t.Fatalf("the process said %q after %d: %s", last, answered, stderr.String())
		}
		answered = n

		b := openStore(t, dir)
		page, err := b.List(t.Context(), "", "", 0)
		if err != nil || len(page.Records) != 3 {
			t.Fatalf("%d records, %v", len(page.Records), err)
		}
		at, one, two := page.Records[0], page.Records[1], page.Records[2]
		got, err := strconv.Atoi(string(one.Value))
		if err != nil || got < answered || got > answered+1 {
			t.Fatalf("the store has %d, answered was %d (%v)", got, answered, err)
		}
		if string(two.Value) != string(one.Value) || at.Key != fmt.Sprint("at/", got) ||
			one.Revision != page.Revision || two.Revision != page.Revision || at.Revision != page.Revision {
			t.Fatalf("half a commit: %+v", page)
		}
		answered = got
		closeStore(t, b)
	}
}

// A power cut leaves any part of the pages that a commit wrote, and the old meta
// page: then the old state must be there. With the new meta page, which is
// written after a sync of the others, it is the new state.
func TestAPowerCutLeavesTheOldStateOrTheNew(t *testing.T) {
	dir := t.TempDir()
	b := openStore(t, dir)
	random := rand.New(rand.NewPCG(7, 8))
	snapshot := func() (file []byte, shown string) {
		file, err := os.ReadFile(b.path)
		if err != nil {
			t.Fatal(err)
		}
		return file, content(t, b)
	}
	var live []string
	before, shownBefore := snapshot()
	for range 25 {
		var writes []Write
		for range min(random.IntN(10), len(live)) {
			i := random.IntN(len(live))
			writes = append(writes, Write{Key: live[i], Delete: true})
			live = append(live[:i], live[i+1:]...)
		}
		for range 1 + random.IntN(15) {
			key := fmt.Sprintf("k/%d", random.Int64())
			live = append(live, key)
			writes = append(writes, Write{Key: key, Value: make([]byte, random.IntN(3000))})
		}
		if _, err := b.Commit(t.Context(), nil, writes); err != nil {
			t.Fatal(err)
		}
		after, shownAfter := snapshot()

		var changed []int // pages, without the meta pages
		for i := 2; i < len(after)/pageSize; i++ {
			if (i+1)*pageSize > len(before) || !bytes.Equal(before[i*pageSize:(i+1)*pageSize], after[i*pageSize:(i+1)*pageSize]) {
				changed = append(changed, i)
			}
		}
		for range 4 {
			mixed := make([]byte, max(len(before), len(after)*random.IntN(2)))
			copy(mixed, before)
			for _, i := range changed {
				if random.IntN(2) == 0 && (i+1)*pageSize <= len(mixed) {
					copy(mixed[i*pageSize:], after[i*pageSize:(i+1)*pageSize])
				}
			}
			wantShown(t, mixed, shownBefore)
		}
		wantShown(t, after, shownAfter)
		before, shownBefore = after, shownAfter
	}
}

func wantShown(t *testing.T, file []byte, want string) {
	t.Helper()
	b := openStore(t, laidDown(t, file))
	if got := content(t, b); got != want {
		t.Fatalf("got\n%.300s\nwant\n%.300s", got, want)
	}
	set(t, b, "works", "on")
	closeStore(t, b)
}

// A crash while the store was being made leaves its other name, in any state.
func TestAnUnfinishedStoreIsMadeAnew(t *testing.T) {
	whole := makeSpecimen(t, 0).file
	for _, left := range [][]byte{nil, whole[:1], whole[:pageSize], whole[:3*pageSize], whole} {
		dir := t.TempDir()
		temp := filepath.Join(dir, boltFile+".new")
		if err := os.WriteFile(temp, left, 0o600); err != nil {
			t.Fatal(err)
		}
		b := openStore(t, dir)
		if got := content(t, b); got != "1 false\n" {
			t.Errorf("%d bytes left: %s", len(left), got)
		}
		if _, err := os.Lstat(temp); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%d bytes left: still there", len(left))
		}
	}
	// NEG-44: a link that was planted there.
	dir, victim := t.TempDir(), filepath.Join(t.TempDir(), "victim")
	if err := errors.Join(os.WriteFile(victim, []byte("precious"), 0o600),
		os.Symlink(victim, filepath.Join(dir, boltFile+".new"))); err != nil {
		t.Fatal(err)
	}
	openStore(t, dir)
	if got, err := os.ReadFile(victim); err != nil || string(got) != "precious" {
		t.Errorf("%q, %v", got, err)
	}
}

// Making a store fails: nothing that looks like one may be left.
func TestAStoreThatCannotBeMadeLeavesNone(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, boltFile+".new", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenBolt(BoltConfig{Dir: dir}); err == nil || !strings.Contains(err.Error(), "store_unreadable") {
		t.Fatalf("got %v", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, boltFile)); !errors.Is(err, os.ErrNotExist) {
		t.Error("a store is there")
	}
}

//go:build !nopidfd

package attest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// discoverer is an attestor that looks at programs.
func discoverer(t *testing.T, cfg UnixConfig) *Attestor {
	t.Helper()
	cfg.DiscoverWorkloadPath = true
	return newAttestor(t, map[string]Source{"unix": NewUnix(cfg)})
}

// programOf starts a program as caller and returns its path and sha256
// selectors, empty where it has none.
func programOf(t *testing.T, a *Attestor, start func(socket string) *caller) (path, sum string) {
	t.Helper()
	s := listen(t, a)
	start(s.path).await("connected")
	p, _ := s.accept(t)
	set, err := p.Selectors(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range set {
		if v, ok := strings.CutPrefix(one.String(), "unix:path:"); ok {
			path = v
		}
		if v, ok := strings.CutPrefix(one.String(), "unix:sha256:"); ok {
			sum = v
		}
	}
	return path, sum
}

func running(t *testing.T, program string) func(string) *caller {
	return func(socket string) *caller {
		return startCaller(t, "stay", socket, func(cmd *exec.Cmd) { cmd.Path = program })
	}
}

func sumOf(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func TestSelectorsOfTheProgram(t *testing.T) { // NEG-37
	program := copyOfThisBinary(t)
	sum := sumOf(t, program)
	for name, tc := range map[string]struct {
		limit int64
		sum   string
	}{
		"default limit": {0, sum},
		"too large":     {100, ""},
		"never":         {-1, ""},
	} {
		t.Run(name, func(t *testing.T) {
			gotPath, gotSum := programOf(t, discoverer(t, UnixConfig{WorkloadSizeLimit: tc.limit}), running(t, program))
			if gotPath != program || gotSum != tc.sum {
				t.Fatalf("path %q, sha256 %q; want %q, %q", gotPath, gotSum, program, tc.sum)
			}
		})
	}
	t.Run("not asked for", func(t *testing.T) {
		if path, sum := programOf(t, newAttestor(t, nil), running(t, program)); path != "" || sum != "" {
			t.Fatalf("path %q, sha256 %q", path, sum)
		}
	})
}

// A program whose path names another file, or none, is known by content alone.
func TestProgramThatIsNotAtItsPath(t *testing.T) { // NEG-37
	cases := map[string]func(t *testing.T, program string){
		"deleted": func(t *testing.T, program string) {
			if err := os.Remove(program); err != nil {
				t.Fatal(err)
			}
		},
		"another in its place": func(t *testing.T, program string) {
			other := copyOfThisBinary(t)
			if err := os.Rename(other, program); err != nil {
				t.Fatal(err)
			}
		},
		"a file at the kernel's own text": func(t *testing.T, program string) {
			if err := os.Rename(program, program+".away"); err != nil {
				t.Fatal(err)
			}
			copyBinary(t, program+" (deleted)")
			if err := os.Remove(program + ".away"); err != nil {
				t.Fatal(err)
			}
		},
	}
	for name, act := range cases {
		t.Run(name, func(t *testing.T) {
			program := copyOfThisBinary(t)
			want := sumOf(t, program)
			path, sum := programOf(t, discoverer(t, UnixConfig{}), func(socket string) *caller {
				c := startCaller(t, "late", socket, func(cmd *exec.Cmd) { cmd.Path = program })
				c.await("started") // the program runs, so its file may go
				act(t, program)
				c.tell("")
				return c
			})
			if path != "" || sum != want {
				t.Fatalf("path %q, sha256 %q; want none and %q", path, sum, want)
			}
		})
	}
}

func TestProgramInMemory(t *testing.T) { // NEG-37
	fd, err := unix.MemfdCreate("program", 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "program")
	defer file.Close()
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.Write(data); err != nil {
		t.Fatal(err)
	}
	readable, err := os.Open(procPath(int32(os.Getpid()), "fd/"+strconv.Itoa(fd)))
	if err != nil {
		t.Fatal(err)
	}
	_ = file.Close() // a file that is open for writing can't be executed
	defer readable.Close()
	path, sum := programOf(t, discoverer(t, UnixConfig{}), running(t, procPath(int32(os.Getpid()), "fd/"+strconv.Itoa(int(readable.Fd())))))
	if path != "" || sum != sumOf(t, "/proc/self/exe") {
		t.Fatalf("path %q, sha256 %q", path, sum)
	}
}

// shell is a program that has not changed for long.
func shell(t *testing.T) program {
	t.Helper()
	id, err := statExe("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	return program{link: "/bin/sh", id: id}
}

func TestProgramsAreReadOnce(t *testing.T) {
	d, sh := newDigests(0), shell(t)
	first, err := d.of(t.Context(), 1, sh)
	if err != nil || first != sumOf(t, "/bin/sh") {
		t.Fatalf("%q, %v", first, err)
	}
	for state := range d.known {
		d.known[state] = "remembered"
	}
	if again, err := d.of(t.Context(), 2, sh); err != nil || again != "remembered" {
		t.Fatalf("read again: %q, %v", again, err)
	}
}

func TestFreshProgramsAreNotRemembered(t *testing.T) {
	path := copyOfThisBinary(t)
	id, err := statExe(path)
	if err != nil {
		t.Fatal(err)
	}
	d := newDigests(0)
	if _, err := d.of(t.Context(), 1, program{link: path, id: id}); err != nil {
		t.Fatal(err)
	}
	// Within two seconds of the copy, or a machine was very slow.
	if took := time.Since(bornAt(t, path)); len(d.known) != 0 && took < settled {
		t.Fatalf("a file of %v ago may change unseen", took)
	}
}

func bornAt(t *testing.T, path string) time.Time {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.ModTime()
}

func TestAnotherFileThanTheProgram(t *testing.T) {
	sh := shell(t)
	sh.id.inode++
	if sum, err := newDigests(0).of(t.Context(), 1, sh); !errors.Is(err, errChanged) || sum != "" {
		t.Fatalf("%q, %v", sum, err)
	}
}

// One user's programs don't keep the agent from another's.
func TestUsersHaveTheirOwnShare(t *testing.T) { // NEG-43
	synctest.Test(t, func(t *testing.T) {
		d, sh := newDigests(0), shell(t)
		greedy := d.join(1)
		greedy.budget.ReserveN(time.Now(), defaultSizeLimit)
		greedy.budget.ReserveN(time.Now(), defaultSizeLimit) // a second's worth of debt
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		if sum, err := d.of(ctx, 1, sh); err == nil {
			t.Fatalf("no budget was left, got %q", sum)
		}
		if sum, err := d.of(ctx, 2, sh); err != nil || sum == "" {
			t.Fatalf("another user: %q, %v", sum, err)
		}
		clear(d.known)
		start := time.Now()
		if sum, err := d.of(t.Context(), 1, sh); err != nil || sum == "" || time.Since(start) < time.Second {
			t.Fatalf("after a while: %q, %v, waited %v", sum, err, time.Since(start))
		}
	})
}

func TestUsersAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDigests(0)
		waiting := d.join(0)
		for uid := range uint32(maxPrograms) {
			d.leave(d.join(uid))
		}
		if d.users[0] != waiting || len(d.users) > 2 {
			t.Fatalf("%d users are kept", len(d.users))
		}
	})
}

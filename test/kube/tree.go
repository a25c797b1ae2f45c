//go:build kube

package kube

import (
	"bufio"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tree is how cgroups are mounted. Runtimes go by what they find mounted, so in
// a mount namespace of its own one finds what another machine would have.
type tree string

const (
	treeV1     tree = "v1"     // the hierarchies of version 1 alone
	treeHybrid tree = "hybrid" // these, and version 2 at unified
	treeV2     tree = "v2"     // version 2 alone
)

const cgroupfs = "/sys/fs/cgroup"

// mount mounts the tree in this process's mount namespace, which is its own. The
// hierarchies are those of the kernel, with whatever is in them.
func (tr tree) mount() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts here: %w", err)
	}
	if tr == treeV2 {
		return mountAt(cgroupfs, "cgroup2", "")
	}
	if err := mountAt(cgroupfs, "tmpfs", "mode=755"); err != nil {
		return err
	}
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, controllers := range all {
		name, named := strings.CutPrefix(controllers, "name=")
		options := controllers
		if named {
			options = "none," + controllers
		}
		if err := mountAt(filepath.Join(cgroupfs, name), "cgroup", options); err != nil {
			return err
		}
	}
	if tr == treeHybrid {
		return mountAt(filepath.Join(cgroupfs, "unified"), "cgroup2", "")
	}
	return nil
}

// check says whether this machine can have the tree.
func (tr tree) check() error {
	all, err := hierarchies()
	if err != nil || tr == treeV2 {
		return err
	}
	for _, needed := range []string{"memory", "pids", "devices", "name=systemd"} {
		if !strings.Contains(","+strings.Join(all, ",")+",", ","+needed+",") {
			return fmt.Errorf("cgroups of version 1 need the hierarchy %s, which this machine has not: boot it with systemd.unified_cgroup_hierarchy=0", needed)
		}
	}
	return nil
}

// hierarchies are those of version 1, by their controllers.
func hierarchies() ([]string, error) {
	content, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	var all []string
	for line := range strings.Lines(string(content)) {
		if fields := strings.Split(line, ":"); fields[1] != "" {
			all = append(all, fields[1])
		}
	}
	return all, nil
}

func mountAt(dir, kind, options string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("none", dir, kind, 0, options); err != nil {
		return fmt.Errorf("mount %s (%s) at %s: %w", kind, options, dir, err)
	}
	return nil
}

// guardArg makes the test binary the guard of a cgroup.
const guardArg = "guard-cgroup"

// playGuard makes a cgroup of version 2, says so, and waits for the end of its
// standard input: the end of the test, whatever that comes from. Then it kills
// all that runs in there, and removes the cgroup and those of the same name in
// other hierarchies.
func playGuard(root string) error {
	if err := treeHybrid.mount(); err != nil {
		return err
	}
	dir := filepath.Join(cgroupfs, "unified", root)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin) // however it ends
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil {
		return err
	}
	mounts, err := os.ReadDir(cgroupfs)
	if err != nil {
		return err
	}
	// A process that was killed is there for a moment more.
	tick, limit := time.NewTicker(20*time.Millisecond), time.After(30*time.Second)
	for {
		var errs []error
		for _, m := range mounts {
			errs = append(errs, removeCgroups(filepath.Join(cgroupfs, m.Name(), root)))
		}
		if errors.Join(errs...) == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-limit:
			return errors.Join(errs...)
		}
	}
}

// removeCgroups removes a cgroup and what is below it, if it is there.
func removeCgroups(dir string) error {
	inner, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range inner {
		if e.IsDir() {
			errs = append(errs, removeCgroups(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(append(errs, os.Remove(dir))...)
}

// guarded is a cgroup that nothing in it outlives the test.
type guarded struct {
	root string // its path in every hierarchy
	pid  int
}

// newGuarded makes one. Only what joins its cgroup of version 2 is guarded.
func newGuarded(t testing.TB) guarded {
	t.Helper()
	g := guarded{root: "/assay-test-" + rand.Text()}
	cmd := exec.Command("unshare", "--mount", os.Args[0], guardArg, g.root)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // an interrupt is for the test alone
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("what ran in %s is not all gone: %v", g.root, err)
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("no cgroup was made: %q, %v", line, err)
	}
	g.pid = cmd.Process.Pid
	return g
}

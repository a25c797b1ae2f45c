//go:build root

package cgroup

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	pod    = "7d1f9b3c-2a64-4e0f-9c55-0b8a4e6d21f0"
	id     = "3f9c1e7a5d2b48060c1d7e9fa4b3528817d60e4c9b2af35810e7c6d94b8a1f23"
	victim = "/kubepods/burstable/podc0ffee00-1111-4222-8333-444455556666/e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5"
	// The test binary plays the agent in a cgroup namespace of its own: it joins
	// these cgroups, makes the namespace, and prints the list of this process.
	joinEnv = "ASSAY_JOIN"
	pidEnv  = "ASSAY_PID"
	// With it, the agent looks from there at the host's cgroups at this directory.
	viewEnv = "ASSAY_VIEW"
)

func TestMain(m *testing.M) {
	if dirs := os.Getenv(joinEnv); dirs != "" {
		if err := printFromNamespace(strings.Split(dirs, ","), os.Getenv(pidEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func printFromNamespace(dirs []string, pid string) error {
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
	}
	runtime.LockOSThread() // the namespace is this thread's
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return err
	}
	if host := os.Getenv(viewEnv); host != "" {
		v, err := OpenView(host)
		if err != nil {
			fmt.Println("!" + fault.ReasonOf(err))
			return nil
		}
		fmt.Println("/" + strings.Join(v.own, "/"))
		return nil
	}
	content, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err == nil {
		_, err = os.Stdout.Write(content)
	}
	return err
}

// hierarchies returns where this host has mounted those that vouch.
func hierarchies(t *testing.T) []string {
	t.Helper()
	var found []string
	for _, name := range []string{"", "unified", "systemd", "pids", "memory"} {
		dir := filepath.Join("/sys/fs/cgroup", name)
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			found = append(found, dir)
		}
	}
	if len(found) == 0 {
		t.Fatal("this test needs a cgroup file system")
	}
	return found
}

// tree makes the cgroups at path in each hierarchy, below a root that is this
// test's own and is returned.
func tree(t *testing.T, mounts []string, paths ...string) string {
	t.Helper()
	first, err := os.MkdirTemp(mounts[0], "assay-test")
	if err != nil {
		t.Fatal(err)
	}
	root := "/" + filepath.Base(first)
	t.Cleanup(func() {
		for _, mount := range mounts {
			removeAll(t, mount+root)
		}
	})
	for _, mount := range mounts {
		for _, path := range paths {
			if err := os.MkdirAll(mount+root+path, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	return root
}

// removeAll removes cgroups from the bottom up: their files can't be removed, and a
// process that has ended leaves them a moment later.
func removeAll(t *testing.T, dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			removeAll(t, filepath.Join(dir, e.Name()))
		}
	}
	deadline := time.Now().Add(30 * time.Second)
	for err = os.Remove(dir); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); err = os.Remove(dir) {
		runtime.Gosched()
	}
	if err != nil {
		t.Error(err)
	}
}

// process starts one that waits for the end of the test.
func process(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = io.Discard
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	return cmd.Process.Pid
}

func move(t *testing.T, pid int, mounts []string, path string) {
	t.Helper()
	for _, mount := range mounts {
		if err := os.WriteFile(filepath.Join(mount, path, "cgroup.procs"), fmt.Append(nil, pid), 0); err != nil {
			t.Fatal(err)
		}
	}
}

func list(t *testing.T, pid int) string {
	t.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// What the kernel says of a real process, as it goes down into cgroups that bear
// the names of a victim's, out of the pods, and when the agent looks from a
// cgroup namespace (NEG-40).
func TestRealCgroups(t *testing.T) {
	const own = "/kubepods/burstable/pod" + pod + "/" + id
	agent := strings.Replace(own, "7d1f", "aaaa", 1)
	mounts := hierarchies(t)
	root := tree(t, mounts, own+victim, agent, "/user"+victim)
	pid := process(t)
	for _, c := range []struct {
		name, path string
		want       Owner
		reason     string
	}{
		{"not moved yet", "", Owner{}, ""},
		{"container", own, Owner{pod, id}, ""},
		{"victim's name below it", own + victim, Owner{pod, id}, ""},
		{"pod, and no container", filepath.Dir(own), Owner{}, "cgroup_unknown"},
		{"victim's name elsewhere", "/user" + victim, Owner{}, ""},
		{"container again", own, Owner{pod, id}, ""},
	} {
		if c.path != "" {
			move(t, pid, mounts, root+c.path)
		}
		got, err := View{}.Find(list(t, pid), root)
		if got != c.want {
			t.Errorf("%s: owner %+v, want %+v (%v)", c.name, got, c.want, err)
		}
		refused(t, err, c.reason)
	}

	var dirs []string
	for _, mount := range mounts {
		dirs = append(dirs, mount+root+agent)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), joinEnv+"="+strings.Join(dirs, ","), fmt.Sprintf("%s=%d", pidEnv, pid))
	cmd.Stderr = os.Stderr
	content, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(content), ":/../../pod"+pod+"/"+id+"\n") {
		t.Fatalf("this is not what the kernel is expected to show:\n%s", content)
	}
	for _, root := range []string{root, "/"} {
		got, err := View{}.Find(string(content), root)
		if got != (Owner{}) {
			t.Errorf("owner %+v", got)
		}
		refused(t, err, "cgroup_namespace")
	}
}

// A mount of a part of the host's cgroups leaves out names above the agent's.
func TestAViewNeedsAllOfTheHostsCgroups(t *testing.T) {
	const agent = "/kubepods/burstable/pod" + pod + "/" + id
	for _, mount := range hierarchies(t) {
		var st unix.Statfs_t
		if err := unix.Statfs(mount, &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		root := tree(t, []string{mount}, agent)
		for host, want := range map[string]string{mount: root + agent, mount + root: "!config_invalid", mount + root + "/kubepods": "!config_invalid"} {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), joinEnv+"="+mount+root+agent, viewEnv+"="+host)
			cmd.Stderr = os.Stderr
			if got, err := cmd.Output(); err != nil || string(got) != want+"\n" {
				t.Errorf("at %s: %s (%v), want %s", host, got, err, want)
			}
		}
		return
	}
	t.Fatal("this test needs cgroups of version 2")
}

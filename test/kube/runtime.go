//go:build kube

package kube

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/test/harness"
)

// Runtime is a containerd of the test's own, with runc, on one tree of cgroups.
// Its files are in a directory of its own, its mounts in a mount namespace.
type Runtime struct {
	// Root is the cgroup that holds all of it, as a kubelet's --cgroup-root.
	Root string

	t       testing.TB
	dir     string
	process *harness.Process
	count   int
}

// NewRuntime starts containerd and waits until it answers.
func NewRuntime(t testing.TB, tr tree) *Runtime {
	t.Helper()
	for _, program := range []string{"containerd", "ctr", "runc", "unshare", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%v: apt-get install -y --no-install-recommends containerd runc util-linux", err)
		}
	}
	if err := tr.check(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "assay-ctr") // its sockets need a short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	r := &Runtime{t: t, dir: dir, Root: newGuarded(t).root}
	config := r.file("containerd.toml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[debug]
  level = "error"
[grpc]
  address = %q
[ttrpc]
  address = %q
`, r.file("root"), r.file("state"), r.socket(), r.file("ttrpc")), 0o600); err != nil {
		t.Fatal(err)
	}
	r.process = harness.Start(t, r.file("containerd.log"), nil, "unshare", "--mount", os.Args[0], runtimeArg, string(tr), r.Root, config)
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(r.file("containerd.log"))
			t.Logf("--- containerd\n%s", log[max(0, len(log)-8<<10):])
		}
	})
	r.process.Eventually(time.Minute, "containerd to answer", func() error {
		out, err := r.ctr("version").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	return r
}

// runtimeArg makes the test binary containerd.
const runtimeArg = "run-containerd"

// playRuntime becomes containerd, in a mount namespace of its own.
func playRuntime(tr tree, root, config string) error {
	// Joined before anything starts, so that shims are in it too, and containers
	// unless they are moved elsewhere below root.
	if err := treeHybrid.mount(); err != nil {
		return err
	}
	own := filepath.Join(cgroupfs, "unified", root, "runtime")
	if err := os.Mkdir(own, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(own, "cgroup.procs"), []byte("0"), 0); err != nil {
		return err
	}
	if err := unix.Unmount(cgroupfs, unix.MNT_DETACH); err != nil {
		return err
	}
	if err := tr.mount(); err != nil {
		return err
	}
	// Shims have their sockets, and runc its state, in /run, wherever
	// containerd's configuration says that its own are.
	if err := mountAt("/run", "tmpfs", "mode=755"); err != nil {
		return err
	}
	path, err := exec.LookPath("containerd")
	if err != nil {
		return err
	}
	return unix.Exec(path, []string{"containerd", "--config", config}, os.Environ())
}

func (r *Runtime) file(name string) string { return filepath.Join(r.dir, name) }

func (r *Runtime) socket() string { return r.file("sock") }

// ctr is a command of containerd's client, which looks at mounts too.
func (r *Runtime) ctr(args ...string) *exec.Cmd {
	args = append(r.ctrArgs(), args...)
	return exec.Command(args[0], args[1:]...)
}

func (r *Runtime) ctrArgs() []string {
	return []string{"nsenter", fmt.Sprintf("--mount=/proc/%d/ns/mnt", r.process.PID()), "--", "ctr", "--address", r.socket(), "--namespace", "k8s.io"}
}

// Import takes an archive of an image.
func (r *Runtime) Import(archive string) {
	r.t.Helper()
	if out, err := r.ctr("images", "import", "--snapshotter", snapshotter, archive).CombinedOutput(); err != nil {
		r.t.Fatalf("import %s: %v\n%s", archive, err, out)
	}
}

// snapshotter copies files: slow, but on any file system.
const snapshotter = "native"

// Container is one to be run.
type Container struct {
	Image  string
	Cgroup string   // below the runtime's root
	Flags  []string // of ctr run
	Args   []string // instead of the image's entrypoint
}

// Running is a container that was started.
type Running struct {
	*harness.Process // the client, which ends when the container does
	ID               string
	r                *Runtime
	log, pidFile     string
}

// Run starts a container.
func (r *Runtime) Run(c Container) *Running {
	r.t.Helper()
	r.count++
	id := fmt.Sprintf("c%d", r.count)
	running := &Running{ID: id, r: r, log: r.file(id + ".log"), pidFile: r.file(id + ".pid")}
	args := append(r.ctrArgs(), "run", "--rm", "--snapshotter", snapshotter, "--pid-file", running.pidFile,
		"--cgroup", r.Root+c.Cgroup,
		// A default that not every tree has the controller for.
		"--cpu-shares", "0")
	args = append(args, c.Flags...)
	args = append(append(args, c.Image, id), c.Args...)
	running.Process = harness.Start(r.t, running.log, nil, args[0], args[1:]...)
	return running
}

// PID is the container's first process.
func (c *Running) PID() string {
	c.r.t.Helper()
	var pid string
	c.Eventually(time.Minute, "the container to start", func() error {
		data, err := os.ReadFile(c.pidFile)
		if pid = string(data); err == nil && pid == "" {
			return errors.New("it has no process yet")
		}
		return err
	})
	return pid
}

// Cgroups is what the kernel says of the container's first process.
func (c *Running) Cgroups() string {
	c.r.t.Helper()
	content, err := os.ReadFile("/proc/" + c.PID() + "/cgroup")
	if err != nil {
		c.r.t.Fatal(err)
	}
	return string(content)
}

// Await returns the first line with text in it that the container has printed.
func (c *Running) Await(text string) string {
	c.r.t.Helper()
	var found string
	c.Eventually(time.Minute, "the container to print "+text, func() error {
		output := c.Output()
		for line := range strings.Lines(output) {
			if strings.Contains(line, text) {
				found = line
				return nil
			}
		}
		return fmt.Errorf("it printed %q", output)
	})
	return found
}

// Output is what the container has printed.
func (c *Running) Output() string {
	c.r.t.Helper()
	data, err := os.ReadFile(c.log)
	if err != nil {
		c.r.t.Fatal(err)
	}
	return string(data)
}

// Wait waits until the container has ended by itself, and returns what it
// printed.
func (c *Running) Wait() (string, int) {
	c.r.t.Helper()
	select {
	case <-c.Done():
	case <-time.After(time.Minute):
		c.Stop(syscall.SIGKILL)
		c.r.t.Fatalf("the container did not end, and printed %s", c.Output())
	}
	return c.Output(), c.ExitCode()
}

//go:build kube

package kube

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
)

// workloadArg makes the test binary a workload: it waits for a line on its
// standard input, watches the Workload API, and prints what it gets.
const workloadArg = "play-workload"

func playWorkload(address string) int {
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return 1
	}
	client, err := workloadapi.New(context.Background(), workloadapi.WithAddr(address))
	if err != nil {
		fmt.Println("error", err)
		return 1
	}
	if err := client.WatchX509Context(context.Background(), printer{}); err != nil {
		return 1
	}
	return 0
}

type printer struct{}

func (printer) OnX509ContextUpdate(c *workloadapi.X509Context) {
	all := "all"
	for _, svid := range c.SVIDs {
		all += " " + svid.ID.Path()
		leaf := svid.Certificates[0]
		fmt.Println("svid", svid.ID, leaf.SerialNumber.Text(16), "ou="+strings.Join(leaf.Subject.OrganizationalUnit, ","), svid.Hint)
	}
	fmt.Println(all)
}

func (printer) OnX509ContextWatchError(err error) { fmt.Println("denied", status.Code(err)) }

// containerOf is the ID of the one container that each pod has here.
const containerOf = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// workload is a process in a pod: no container runtime put it there, but the
// cgroup that one would make.
type workload struct {
	t     testing.TB
	lines chan string
}

// cgroups is a tree of cgroups of a test's own, as kubelets make them.
type cgroups struct {
	t      testing.TB
	mounts []string
	root   string // as processes see it
}

func newCgroups(t testing.TB) *cgroups {
	t.Helper()
	c := &cgroups{t: t}
	for _, name := range []string{"", "unified", "systemd", "pids", "memory"} {
		dir := filepath.Join("/sys/fs/cgroup", name)
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			c.mounts = append(c.mounts, dir)
		}
	}
	if len(c.mounts) == 0 {
		t.Fatal("this test needs a cgroup file system")
	}
	first, err := os.MkdirTemp(c.mounts[0], "assay-test")
	if err != nil {
		t.Fatal(err)
	}
	c.root = "/" + filepath.Base(first)
	t.Cleanup(func() {
		for _, mount := range c.mounts {
			removeTree(filepath.Join(mount, c.root))
		}
	})
	return c
}

// removeTree removes cgroups, the innermost first.
func removeTree(dir string) {
	inner, _ := os.ReadDir(dir)
	for _, e := range inner {
		if e.IsDir() {
			removeTree(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir)
}

// start starts a process in a pod's cgroup, or in none if pod is nil.
func (c *cgroups) start(pod *corev1.Pod, address string) *workload {
	c.t.Helper()
	cmd := exec.Command(os.Args[0], workloadArg, address)
	in, err := cmd.StdinPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	w := &workload{t: c.t, lines: make(chan string, 100)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(w.lines)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			w.lines <- lines.Text()
		}
	}()
	c.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		for range w.lines { // so that its reader ends
		}
		<-done
		_ = cmd.Wait()
	})
	if pod != nil {
		path := filepath.Join(c.root, "kubepods", "besteffort", "pod"+string(pod.UID), containerOf)
		for _, mount := range c.mounts {
			dir := filepath.Join(mount, path)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				c.t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
				c.t.Fatal(err)
			}
		}
	}
	if _, err := io.WriteString(in, "go\n"); err != nil {
		c.t.Fatal(err)
	}
	return w
}

// await returns the first line that begins so.
func (w *workload) await(prefix string) string {
	w.t.Helper()
	limit := time.After(time.Minute)
	for {
		select {
		case line, ok := <-w.lines:
			if !ok {
				w.t.Fatalf("the workload ended, and did not say %q", prefix)
			}
			if strings.HasPrefix(line, prefix) {
				return line
			}
		case <-limit:
			w.t.Fatalf("the workload did not say %q", prefix)
		}
	}
}

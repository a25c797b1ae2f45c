package attest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// The test binary plays the callers too: ASSAY_CALLER names the part.
const (
	callerEnv = "ASSAY_CALLER"
	socketEnv = "ASSAY_SOCKET"
	runEnv    = "ASSAY_RUN" // a program to run at the path in asEnv
	asEnv     = "ASSAY_AS"
)

func TestMain(m *testing.M) {
	if part := os.Getenv(callerEnv); part != "" {
		os.Exit(play(part))
	}
	os.Exit(m.Run())
}

// play is the main function of a caller: it connects first, says so, and acts
// when told.
func play(part string) int {
	switch part {
	case "wait":
		_, _ = io.Copy(io.Discard, os.Stdin)
		return 0
	case "agent": // in namespaces of its own
		return playAgent()
	case "reuse": // in a PID namespace of its own
		return playReuse()
	case "bind": // in a mount namespace of its own
		fmt.Fprintln(os.Stderr, playBound(os.Getenv(runEnv), os.Getenv(asEnv)))
		return 1
	case "late": // connects when told
		fmt.Println("started")
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	}
	fd, err := connect(os.Getenv(socketEnv))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if part == "connect" { // and leave at once
		return 0
	}
	fmt.Println("connected")
	order, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	switch order = strings.TrimSpace(order); part {
	case "exec":
		err = unix.Exec(order, []string{order}, callerEnviron("wait", os.Getenv(socketEnv)))
	case "setuid":
		err = syscall.Setuid(1234)
	case "setgid":
		err = syscall.Setgid(1234)
	case "move": // into another cgroup
		err = os.WriteFile(filepath.Join(order, "cgroup.procs"), []byte("0"), 0)
	case "leader":
		exitLeader()
	case "pass":
		// The socket goes to whoever is at the other end of descriptor 3.
		err = unix.Sendmsg(3, []byte{0}, unix.UnixRights(fd), nil, 0)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if part == "exit" || part == "pass" {
		return 0
	}
	fmt.Println("done")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

func init() { runtime.LockOSThread() } // exitLeader wants the main thread

// exitLeader ends the main thread and leaves the process to the others.
func exitLeader() {
	go func() {
		for i := 0; ; i++ {
			if state, _, err := stat(int32(os.Getpid())); err == nil && state == "Z" {
				break
			}
			runtime.Gosched()
		}
		fmt.Println("done")
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	_, _, _ = syscall.RawSyscall(syscall.SYS_EXIT, 0, 0, 0)
}

// playBound runs a program that this mount namespace shows at another path.
func playBound(run, as string) error {
	if run != as {
		if err := unix.Mount(run, as, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return unix.Exec(as, []string{as}, callerEnviron("stay", os.Getenv(socketEnv)))
}

// playAgent attests the peer of descriptor 3 and says what came out.
func playAgent() int {
	a, err := namespacedAttestor()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	err = a.pin(3).Check()
	if err == nil {
		fmt.Println("nil")
	} else {
		fmt.Println(fault.ReasonOf(err))
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// namespacedAttestor is for a process that was started in a new PID namespace:
// it needs a /proc of that namespace.
func namespacedAttestor() (*Attestor, error) {
	if os.Getpid() == 1 {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return nil, fmt.Errorf("make mounts private: %w", err)
		}
		if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
			return nil, fmt.Errorf("mount /proc: %w", err)
		}
	}
	return NewAttestor(Options{Log: slog.New(slog.DiscardHandler)})
}

// connect makes a socket that survives an exec.
func connect(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}

// caller is a process that plays a part.
type caller struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Reader
}

func startCaller(t *testing.T, part, socket string, change ...func(*exec.Cmd)) *caller {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = callerEnviron(part, socket)
	cmd.Stderr = os.Stderr
	for _, f := range change {
		f(cmd)
	}
	c := &caller{t: t, cmd: cmd}
	var err error
	if c.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.lines = bufio.NewReader(out)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.stdin.Close()
		_ = cmd.Wait()
	})
	return c
}

// callerEnviron also keeps the race detector from its second of sleep at exit.
func callerEnviron(part, socket string) []string {
	inherited := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, callerEnv+"=") })
	return append(inherited, callerEnv+"="+part, socketEnv+"="+socket, "GORACE=atexit_sleep_ms=0")
}

// await reads the line that the caller prints when it got there.
func (c *caller) await(line string) {
	c.t.Helper()
	got, err := c.lines.ReadString('\n')
	if err != nil || strings.TrimSpace(got) != line {
		c.t.Fatalf("caller said %q (%v), want %q", got, err, line)
	}
}

func (c *caller) tell(order string) {
	c.t.Helper()
	if _, err := io.WriteString(c.stdin, order+"\n"); err != nil {
		c.t.Fatal(err)
	}
}

// endUnreaped waits until the caller has exited and leaves it a zombie.
func (c *caller) endUnreaped() {
	c.t.Helper()
	_ = c.stdin.Close()
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PID, c.cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			if err != nil {
				c.t.Fatal(err)
			}
			return
		}
	}
}

func (c *caller) endReaped() {
	c.t.Helper()
	_ = c.stdin.Close()
	if err := c.cmd.Wait(); err != nil {
		c.t.Fatal(err)
	}
}

// socket is a listener as the agent has one.
type socket struct {
	path     string
	attestor *Attestor
	lis      net.Listener
}

func newAttestor(t testing.TB, sources map[string]Source) *Attestor {
	t.Helper()
	a, err := NewAttestor(Options{Sources: sources, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func listen(t testing.TB, a *Attestor) *socket {
	t.Helper()
	dir, err := os.MkdirTemp("", "attest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // callers of other users come in
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lis.Close() })
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	return &socket{path: path, attestor: a, lis: a.Listener(lis)}
}

// accept takes one connection through the handshake.
func (s *socket) accept(t testing.TB) (*Peer, net.Conn) {
	t.Helper()
	c, err := s.lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	out, info, err := s.attestor.Credentials().ServerHandshake(c)
	if err != nil {
		t.Fatalf("the handshake must not fail for who the peer is: %v", err)
	}
	return info.(*Peer), out
}

func (s *socket) dial(t testing.TB) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func openFiles(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// until waits for a condition that another goroutine brings about.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for !ok() {
		if ctx.Err() != nil {
			t.Fatalf("never happened: %s", what)
		}
		runtime.Gosched()
	}
}

func copyBinary(t *testing.T, path string) {
	t.Helper()
	in, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

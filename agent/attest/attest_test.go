//go:build !nopidfd

package attest

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

func wantRefusal(t *testing.T, err error, kind fault.Kind, reason string) {
	t.Helper()
	if fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
		t.Fatalf("got %v, want %v %s", err, kind, reason)
	}
}

// kernels are this kernel and the ways of older ones that it can play.
func kernels(t *testing.T, run func(t *testing.T, a *Attestor)) {
	full := newAttestor(t, nil)
	for name, older := range map[string]func(*kernel){
		"this kernel":             func(*kernel) {},
		"without PIDFD_GET_INFO":  func(k *kernel) { k.info = false },
		"without PIDFS":           func(k *kernel) { k.info, k.pidfs = false, false },
		"without SO_PEERPIDFD":    func(k *kernel) { *k = kernel{} },
		"pidfds not told apart":   func(k *kernel) { k.pidfs = false },
		"PIDFS, no PIDFD by peer": func(k *kernel) { k.peerPidfd = false },
	} {
		t.Run(name, func(t *testing.T) {
			a := newAttestor(t, nil)
			a.kernel = full.kernel
			older(&a.kernel)
			run(t, a)
		})
	}
}

func TestCallerThatHasGone(t *testing.T) { // NEG-38, NEG-41
	cases := map[string]struct {
		part string
		end  func(*caller)
	}{
		"exited and reaped":       {"exit", (*caller).endReaped},
		"zombie":                  {"exit", (*caller).endUnreaped},
		"thread leader exited":    {"leader", func(c *caller) { c.tell(""); c.await("done") }},
		"exited, socket lives on": {"pass", nil},
	}
	for name, tc := range cases {
		for _, late := range []bool{false, true} {
			when := " before the handshake"
			if late {
				when = " after it"
			}
			t.Run(name+when, func(t *testing.T) {
				kernels(t, func(t *testing.T, a *Attestor) {
					s := listen(t, a)
					var other int
					c := startCaller(t, tc.part, s.path, func(cmd *exec.Cmd) {
						if tc.part == "pass" {
							other = passOver(t, cmd)
						}
					})
					c.await("connected")
					end := func() {
						if tc.end != nil {
							tc.end(c)
							return
						}
						c.tell("")
						keep := receive(t, other)
						t.Cleanup(func() { unix.Close(keep) })
						c.endReaped()
					}
					if !late {
						end()
					}
					p, _ := s.accept(t)
					if late {
						if err := p.Check(); err != nil {
							t.Fatal(err)
						}
						end()
					}
					wantRefusal(t, p.Check(), fault.Denied, "caller_gone")
					if !late {
						_, err := p.Selectors(t.Context())
						wantRefusal(t, err, fault.Denied, "caller_gone")
					}
				})
			})
		}
	}
}

// passOver gives cmd one end of a socket pair as descriptor 3.
func passOver(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "theirs")
	cmd.ExtraFiles = []*os.File{theirs}
	t.Cleanup(func() {
		unix.Close(pair[0])
		_ = theirs.Close()
	})
	return pair[0]
}

func receive(t *testing.T, sock int) int {
	t.Helper()
	data, rights := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(sock, data, rights, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	list, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&list[0])
	if err != nil {
		t.Fatal(err)
	}
	return fds[0]
}

// acceptOf is for the case that the change came between connect and handshake:
// the connection of c is dialled by a caller that changes first.
func (s *socket) acceptOf(t *testing.T, c *caller) (*Peer, net.Conn) {
	t.Helper()
	part := ""
	for _, v := range c.cmd.Env {
		if rest, ok := strings.CutPrefix(v, callerEnv+"="); ok {
			part = rest
		}
	}
	again := startCaller(t, part, s.path)
	again.await("connected")
	again.tell("")
	again.await("done")
	return s.accept(t)
}

func copyOfThisBinary(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "other")
	copyBinary(t, path)
	return path
}

// otherCgroup makes a cgroup in whichever hierarchy this host has, v2 first.
func otherCgroup(t *testing.T) string {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup", "/sys/fs/cgroup/pids"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		dir, err := os.MkdirTemp(root, "assay-test")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			until(t, "empty cgroup", func() bool {
				return os.WriteFile(filepath.Join(root, "cgroup.procs"), nil, 0) != nil || os.Remove(dir) == nil
			})
		})
		return dir
	}
	t.Fatal("this test needs root and a cgroup file system")
	return ""
}

func TestConnectionsOfOneProcessShareItsDescriptors(t *testing.T) {
	a := newAttestor(t, nil)
	s := listen(t, a)
	before := openFiles(t)
	s.dial(t)
	first, _ := s.accept(t)
	held := a.Descriptors()
	if held == 0 || first.Descriptors() != held {
		t.Fatalf("first connection: %d held, %d its own", held, first.Descriptors())
	}
	for range 20 {
		s.dial(t)
		p, _ := s.accept(t)
		if p.Descriptors() != 0 || p.facts != first.facts {
			t.Fatal("a later connection of the same process does not share it")
		}
	}
	if got, want := openFiles(t)-before, 2*21+held; got != want {
		t.Fatalf("%d descriptors for 21 connections, want %d", got, want)
	}
}

func TestClosedConnectionIsRefused(t *testing.T) {
	s := listen(t, newAttestor(t, nil))
	s.dial(t)
	p, c := s.accept(t)
	_ = c.Close()
	_ = c.Close()
	wantRefusal(t, p.Check(), fault.Denied, "caller_gone")
	if n := s.attestor.Descriptors(); n != 0 {
		t.Fatalf("%d descriptors left", n)
	}
}

func TestDescriptorsComeBackFromEveryPath(t *testing.T) { // NEG-38, SPI-01-006
	kernels(t, func(t *testing.T, a *Attestor) {
		s := listen(t, a)
		before := openFiles(t)
		for i := range 10_000 / 6 {
			client, err := net.Dial("unix", s.path)
			if err != nil {
				t.Fatal(err)
			}
			server, err := s.lis.Accept()
			if err != nil {
				t.Fatal(err)
			}
			switch i % 4 {
			case 0: // closed before the handshake
				_ = server.Close()
			case 1: // the caller has closed already
				_ = client.Close()
			case 2: // refused
				a.overflow.uid = uint32(os.Getuid())
			}
			_, _, err = a.Credentials().ServerHandshake(server)
			if (err != nil) != (i%4 == 0) {
				t.Fatalf("case %d: %v", i%4, err)
			}
			a.overflow.uid = 65534
			_ = server.Close()
			_ = client.Close()
		}
		if now := openFiles(t); now != before || a.Descriptors() != 0 {
			t.Fatalf("%d files before, %d after; attestor counts %d", before, now, a.Descriptors())
		}
	})
}

func TestDescriptorsAreNotInherited(t *testing.T) {
	a := newAttestor(t, nil)
	s := listen(t, a)
	s.dial(t)
	p, _ := s.accept(t)
	for _, fd := range []int{p.process.pidfd, p.process.cgroup} {
		if fd < 0 {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Fatalf("descriptor %d: flags %#x, %v", fd, flags, err)
		}
	}
}

func TestHandshakeNeedsTheListener(t *testing.T) {
	a := newAttestor(t, nil)
	one, two := net.Pipe()
	defer one.Close()
	defer two.Close()
	if _, _, err := a.Credentials().ServerHandshake(one); err == nil {
		t.Fatal("a connection that would leak its descriptors was taken")
	}
}

type fakeSource struct {
	calls atomic.Int32
	err   error
	set   selector.Set
}

func (f *fakeSource) Selectors(context.Context, Process) (selector.Set, error) {
	f.calls.Add(1)
	return f.set, f.err
}

func TestAllSourcesMustSucceed(t *testing.T) { // NEG-39
	broken := &fakeSource{err: errors.New("no such luck")}
	fine := &fakeSource{set: selector.NewSet(selector.Selector{Type: "x", Value: "y"})}
	s := listen(t, newAttestor(t, map[string]Source{"broken": broken, "fine": fine}))
	s.dial(t)
	p, _ := s.accept(t)
	set, err := p.Selectors(t.Context())
	wantRefusal(t, err, fault.NotReady, "attestation_failed")
	if set != nil {
		t.Fatalf("a part of the selectors got out: %v", set)
	}
	if strings.Contains(fault.SafeText(err), "luck") {
		t.Fatal("the cause is shown to the caller")
	}
	broken.err = nil
	if set, err = p.Selectors(t.Context()); err != nil || len(set) != 1 {
		t.Fatalf("a failure was kept: %v %v", set, err)
	}
}

func TestSourcesAreAskedOncePerProcess(t *testing.T) {
	src := &fakeSource{set: selector.NewSet(selector.Selector{Type: "x", Value: "y"})}
	s := listen(t, newAttestor(t, map[string]Source{"src": src}))
	for range 5 {
		s.dial(t)
		p, _ := s.accept(t)
		for range 5 {
			if _, err := p.Selectors(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := src.calls.Load(); n != 1 {
		t.Fatalf("asked %d times", n)
	}
}

func TestNeedsHostPID(t *testing.T) { // NEG-39
	ns, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	_, err = NewAttestor(Options{Config: Config{RequireHostPID: true}, Log: newAttestor(t, nil).log})
	if ns == hostPIDNamespace {
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	wantRefusal(t, err, fault.Precondition, "needs_host_pid")
}

func BenchmarkCheck(b *testing.B) {
	s := listen(b, newAttestor(b, nil))
	s.dial(b)
	p, _ := s.accept(b)
	b.ReportAllocs()
	for b.Loop() {
		if err := p.Check(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPin(b *testing.B) {
	s := listen(b, newAttestor(b, nil))
	s.dial(b)
	s.accept(b) // the process is held already
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	b.ReportAllocs()
	for b.Loop() {
		p := s.attestor.pin(pair[0])
		if p.err != nil {
			b.Fatal(p.err)
		}
		p.release()
	}
}

// Users can make attestation of themselves fail as often as they like.
func TestFailuresDoNotFloodTheLog(t *testing.T) { // NEG-43
	synctest.Test(t, func(t *testing.T) {
		var lines bytes.Buffer
		a := newAttestor(t, map[string]Source{"broken": &fakeSource{err: errors.New("no such luck")}})
		a.log = slog.New(slog.NewTextHandler(&lines, nil))
		fail := func(times int) (logged int) {
			for range times {
				if _, err := a.attest(t.Context(), Process{}); err == nil {
					t.Fatal("it succeeded")
				}
			}
			logged = strings.Count(lines.String(), "\n")
			lines.Reset()
			return logged
		}
		if n := fail(1000); n != failureLines {
			t.Errorf("%d lines", n)
		}
		time.Sleep(time.Second)
		if n := fail(1000); n != failureLines {
			t.Errorf("%d lines a second later", n)
		}
	})
}

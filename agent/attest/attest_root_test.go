//go:build root && !nopidfd

package attest

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

func TestPeerIsTheProcessThatConnected(t *testing.T) { // WL-8, WL-9
	kernels(t, func(t *testing.T, a *Attestor) {
		s := listen(t, a)
		c := startCaller(t, "stay", s.path, func(cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1, Gid: 2, Groups: []uint32{3, 54321}}}
		})
		p, _ := s.accept(t)
		if err := p.Check(); err != nil {
			t.Fatal(err)
		}
		got := p.Caller()
		if !got.Local || got.UID != 1 || got.GID != 2 || int(got.PID) != c.cmd.Process.Pid {
			t.Fatalf("caller %+v", got)
		}
		set, err := p.Selectors(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := []string{"uid:1", "gid:2", "supplementary_gid:3", "supplementary_gid:54321"}
		for _, v := range want {
			if !set.Contains(selector.NewSet(selector.Selector{Type: "unix", Value: v})) {
				t.Errorf("%s is missing from %v", v, set)
			}
		}
	})
}

func TestCallerThatHasChanged(t *testing.T) { // NEG-37, NEG-41
	cases := map[string]func(t *testing.T) (order string){
		"setuid": func(*testing.T) string { return "" },
		"setgid": func(*testing.T) string { return "" },
		"exec":   copyOfThisBinary,
		"move":   otherCgroup,
	}
	for part, prepare := range cases {
		t.Run(part, func(t *testing.T) {
			kernels(t, func(t *testing.T, a *Attestor) {
				order := prepare(t)
				s := listen(t, a)
				c := startCaller(t, part, s.path)
				c.await("connected")
				p, _ := s.accept(t)
				if err := p.Check(); err != nil {
					t.Fatal(err)
				}
				c.tell(order)
				if part == "exec" {
					until(t, "exec", func() bool { return p.Check() != nil })
				} else {
					c.await("done")
				}
				wantRefusal(t, p.Check(), fault.Denied, "caller_changed")
				if part == "setuid" || part == "setgid" {
					late, _ := s.acceptOf(t, c)
					wantRefusal(t, late.Check(), fault.Denied, "caller_changed")
				}
			})
		})
	}
}

func TestUnresolvableCallers(t *testing.T) { // NEG-39
	cases := map[string]struct {
		flags   uintptr // of the namespaces that the agent is in
		uid     uint32  // of the caller, outside
		agent   uint32  // uid of the agent
		refused string
	}{
		"agent beside the caller":               {0, 1, 0, "nil"},
		"agent may not read the caller's links": {0, 1, 2, "nil"},
		"agent in another PID namespace":        {syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, 1, 0, "caller_unresolvable"},
		"caller's uid not mapped":               {syscall.CLONE_NEWUSER, 1, 0, "caller_unresolvable"},
		"caller's uid mapped":                   {syscall.CLONE_NEWUSER, 0, 0, "nil"},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			s := listen(t, newAttestor(t, nil))
			startCaller(t, "stay", s.path, func(cmd *exec.Cmd) {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: tc.uid, Gid: tc.uid}}
			}).await("connected")
			accepted, err := s.lis.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer accepted.Close()
			file, err := accepted.(*conn).Conn.(*net.UnixConn).File()
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			agent := startCaller(t, "agent", "", func(cmd *exec.Cmd) {
				cmd.ExtraFiles = []*os.File{file}
				cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: tc.flags}
				if tc.agent != 0 {
					cmd.SysProcAttr.Credential = &syscall.Credential{Uid: tc.agent, Gid: tc.agent}
				}
				if tc.flags&syscall.CLONE_NEWUSER != 0 {
					only := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
					cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = only, only
				}
			})
			agent.await(tc.refused)
		})
	}
}

func TestUnmappedGroupsGiveNoSelector(t *testing.T) {
	a := newAttestor(t, nil)
	a.overflow.gid = 3
	s := listen(t, a)
	startCaller(t, "stay", s.path, func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1, Gid: 2, Groups: []uint32{3, 4}}}
	})
	p, _ := s.accept(t)
	if err := p.Check(); err != nil {
		t.Fatal(err)
	}
	if got := p.facts.process.Groups; !slices.Equal(got, []uint32{4}) {
		t.Fatalf("groups %v", got)
	}
}

// Each set of groups is indexed: one that a user can make as long as the kernel
// allows is refused whole.
func TestCallerWithTooManyGroups(t *testing.T) { // NEG-39, NEG-43
	for n, passes := range map[int]bool{1024: true, 1025: false} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			kernels(t, func(t *testing.T, a *Attestor) {
				groups := make([]uint32, n)
				for i := range groups {
					groups[i] = uint32(100_000 + i)
				}
				s := listen(t, a)
				startCaller(t, "stay", s.path, func(cmd *exec.Cmd) {
					cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1, Gid: 2, Groups: groups}}
				})
				p, _ := s.accept(t)
				set, err := p.Selectors(t.Context())
				if !passes {
					wantRefusal(t, p.Check(), fault.Denied, "too_many_groups")
					wantRefusal(t, err, fault.Denied, "too_many_groups")
					return
				}
				last := selector.NewSet(selector.Selector{Type: "unix", Value: "supplementary_gid:101023"})
				if err := errors.Join(err, p.Check()); err != nil || !set.Contains(last) {
					t.Fatalf("%d selectors, %v", len(set), err)
				}
			})
		})
	}
}

// An exec can change the user as well: the effective uid of a setuid program is
// not the uid that connected.
func TestExecOfASetuidProgramIsAnotherCaller(t *testing.T) { // NEG-37, NEG-41
	kernels(t, func(t *testing.T, a *Attestor) {
		program := copyOfThisBinary(t)
		for path, mode := range map[string]os.FileMode{
			program: 0o755 | os.ModeSetuid, filepath.Dir(program): 0o755, filepath.Dir(filepath.Dir(program)): 0o755,
		} {
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
		}
		s := listen(t, a)
		c := startCaller(t, "exec", s.path, func(cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1234, Gid: 1234}}
		})
		c.await("connected")
		p, _ := s.accept(t)
		if set, err := p.Selectors(t.Context()); err != nil || !set.Contains(selector.NewSet(selector.Selector{Type: "unix", Value: "uid:1234"})) {
			t.Fatalf("before: %v, %v", set, err)
		}
		c.tell(program)
		until(t, "exec", func() bool { return p.Check() != nil })
		wantRefusal(t, p.Check(), fault.Denied, "caller_changed")
	})
}

// A mount namespace shows a program at any path: the path is not believed.
func TestPathOfAProgramInAnotherMountNamespace(t *testing.T) { // NEG-37
	victim, own := copyOfThisBinary(t), copyOfThisBinary(t)
	for name, tc := range map[string]struct{ run, path string }{
		"the file itself": {victim, victim},
		"bound over it":   {own, ""},
	} {
		t.Run(name, func(t *testing.T) {
			path, sum := programOf(t, discoverer(t, UnixConfig{}), func(socket string) *caller {
				return startCaller(t, "bind", socket, func(cmd *exec.Cmd) {
					cmd.Env = append(cmd.Env, runEnv+"="+tc.run, asEnv+"="+victim)
					cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
				})
			})
			if path != tc.path || sum != sumOf(t, victim) {
				t.Fatalf("path %q, sha256 %q", path, sum)
			}
		})
	}
}

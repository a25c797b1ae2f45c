//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/test/harness"
)

const guideTTL = `ca:
  x509_svid_ttl: 20s
  max_x509_svid_ttl: 20s
attestation:
  agent_svid_ttl: 1m
`

// guide is a section of the operator's guide whose commands are run as they are
// written, at a terminal.
type guide struct {
	t    *testing.T
	site *harness.Site
	left []string // commands that were not run yet
	all  []string
}

func openGuide(t *testing.T, s *harness.Site, heading string) *guide {
	t.Helper()
	g := &guide{t: t, site: s, all: guideCommands(t, heading, "assay")}
	g.left = append(g.left, g.all...)
	return g
}

// command finds the command that begins so.
func (g *guide) command(prefix string) string {
	g.t.Helper()
	for _, c := range g.all {
		if strings.HasPrefix(c, prefix) {
			for i, l := range g.left {
				if l == c {
					g.left = append(g.left[:i:i], g.left[i+1:]...)
					break
				}
			}
			return c
		}
	}
	g.t.Fatalf("the guide has no command %q", prefix)
	return ""
}

// typed is a command at a terminal at which somebody says yes.
type typed struct {
	*exec.Cmd
	shown bytes.Buffer
	read  chan struct{}
}

func (g *guide) start(ctx context.Context, prefix string) *typed {
	g.t.Helper()
	c := &typed{Cmd: exec.CommandContext(ctx, "bash", "-c", "exec "+g.command(prefix)), read: make(chan struct{})}
	master, slave := terminal(g.t)
	c.Env = append(os.Environ(), "PATH="+g.site.Bins+":"+os.Getenv("PATH"), "ASSAY_SERVER_SOCKET="+g.site.AdminSocket())
	c.Stdin, c.Stdout, c.Stderr = slave, slave, slave
	if err := c.Start(); err != nil {
		g.t.Fatal(err)
	}
	_ = slave.Close()
	go func() {
		defer close(c.read)
		_, _ = io.Copy(&c.shown, master) // to the end of the command
		_ = master.Close()
	}()
	if _, err := master.WriteString("yes\n"); err != nil {
		g.t.Fatal(err)
	}
	return c
}

func (c *typed) wait() (string, error) {
	err := c.Wait()
	<-c.read
	return c.shown.String(), err
}

// try runs a command to its end.
func (g *guide) try(prefix string) (string, error) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 3*time.Minute)
	defer cancel()
	out, err := g.start(ctx, prefix).wait()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", prefix, err, out)
	}
	return out, err
}

func (g *guide) run(prefix string) string {
	g.t.Helper()
	out, err := g.try(prefix)
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}

// terminal opens a pseudo-terminal.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	raw, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	cerr := raw.Control(func(fd uintptr) {
		if n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN); err == nil {
			err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0)
		}
	})
	if err = errors.Join(err, cerr); err != nil {
		t.Fatal(err)
	}
	if slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	return master, slave
}

// The guide to rotations, word for word: planned, stuck, taken back, forced, in
// an emergency, by hand.
func TestRotationsAsTheGuideSays(t *testing.T) {
	s := newSite(t, guideTTL)
	f := &fleet{t: t, site: s}
	s.StartServer()
	for _, name := range []string{"a", "b"} {
		a := s.NewAgent(name)
		a.Start(a.Join())
		s.CreateEntry(a.ID, "spiffe://example.org/"+name)
		f.agents = append(f.agents, a)
	}
	g := openGuide(t, s, "Replacing the root")
	const planned = "assay root rotate --reason"

	g.run(planned)
	f.until("the end", ended("done"))
	if out := g.run("assay root rotate --watch"); !strings.Contains(out, "done") {
		t.Errorf("--watch: %s", out)
	}

	lost := f.agents[1]
	stuck := func() {
		t.Helper()
		lost.Signal(syscall.SIGSTOP)
		show := g.start(t.Context(), planned)
		f.until("the lost agent to be named", func(st rootStatus) bool {
			return st.Rotation.Phase == "publishing" && len(st.Rotation.Waits) == 1 && st.Rotation.Waits[0].AgentID == lost.ID
		})
		_ = show.Process.Signal(os.Interrupt) // it goes on without the command
		_, _ = show.wait()
		if out := g.run("assay root status"); !strings.Contains(out, lost.ID) {
			t.Errorf("root status does not name the agent: %s", out)
		}
	}
	stuck()
	g.run("assay root abort")
	f.until("the end of the second one", ended("aborted"))
	lost.Signal(syscall.SIGCONT)

	stuck()
	forced := g.start(t.Context(), "assay root rotate --force")
	f.until("the gate to be passed", ended("reissuing"))
	lost.Signal(syscall.SIGCONT)
	if out, err := forced.wait(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if st := f.until("the end of the third one", ended("done")); len(st.Rotation.Missed) != 1 || st.Rotation.Missed[0] != lost.ID {
		t.Errorf("cut off: %v", st.Rotation.Missed)
	}

	g.run("assay root rotate --emergency")
	if st := f.until("the end of the emergency", ended("done")); len(st.Rotation.Missed) != 0 {
		t.Errorf("cut off: %v", st.Rotation.Missed)
	}

	before := f.status().Rotation.To
	for _, step := range []string{"prepare", "activate", "taint", "revoke"} {
		s.Server.Eventually(2*time.Minute, step, func() error {
			_, err := g.try("assay root " + step)
			return err
		})
	}
	if st := f.status(); st.state(before) != "revoked" {
		t.Errorf("after the steps by hand: %+v", st.Roots)
	}
	for _, a := range f.agents {
		if _, err := fetch(t, a, 30*time.Second); err != nil {
			t.Errorf("%s: %v", a.ID, err)
		}
	}
	if len(g.left) > 0 {
		t.Errorf("the guide has more: %q", g.left)
	}
}

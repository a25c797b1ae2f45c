//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/seed-caa81108/assay/test/harness"
)

const minuteTTL = `ca:
  x509_svid_ttl: 60s
  max_x509_svid_ttl: 60s
attestation:
  agent_svid_ttl: 2m
`

// fleet is some agents with a workload on each, and handshakes without pause
// from each workload to the next.
type fleet struct {
	t      *testing.T
	site   *harness.Site
	agents []*harness.Agent
	pairs  []*handshakes
}

func newFleet(t *testing.T, n int) *fleet {
	t.Helper()
	return newFleetAt(t, newSite(t, minuteTTL), n)
}

func newFleetAt(t *testing.T, s *harness.Site, n int) *fleet {
	t.Helper()
	f := &fleet{t: t, site: s}
	f.site.StartServer()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	sources := make([]*workloadapi.X509Source, n)
	for i := range n {
		a := f.site.NewAgent(fmt.Sprintf("agent%d", i))
		a.Start(a.Join())
		f.site.CreateEntry(a.ID, fmt.Sprintf("spiffe://example.org/workload/%d", i))
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(a.Endpoint())))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = source.Close() })
		f.agents, sources[i] = append(f.agents, a), source
	}
	for i := range n {
		f.pairs = append(f.pairs, startHandshakesBetween(t, sources[i], sources[(i+1)%n], time.Duration(n)*3*time.Millisecond))
	}
	return f
}

// check ends the handshakes: none failed, and there were some.
func (f *fleet) check() {
	f.t.Helper()
	for i, h := range f.pairs {
		h.enough(100)
		h.stop()
		if n := h.failed.Load(); n > 0 {
			f.t.Errorf("pair %d: %d of %d handshakes failed, first: %v", i, n, h.done.Load()+n, h.first)
		}
	}
}

// rootStatus is what the test reads of `root status`.
type rootStatus struct {
	Roots []struct {
		ID    string `json:"id"`
		State string `json:"state"`
		Live  int    `json:"live_svids"`
	} `json:"roots"`
	Rotation struct {
		OperationID string `json:"operation_id"`
		Phase       string `json:"phase"`
		From        string `json:"from"`
		To          string `json:"to"`
		Gate        string `json:"gate"`
		Waits       []struct {
			AgentID string `json:"agent_id"`
			Why     string `json:"why"`
		} `json:"waits"`
		Missed []string `json:"missed"`
	} `json:"rotation"`
}

func (r rootStatus) state(id string) string {
	for _, root := range r.Roots {
		if root.ID == id {
			return root.State
		}
	}
	return ""
}

// live is how many SVIDs agents hold under a root.
func (r rootStatus) live(id string) int {
	for _, root := range r.Roots {
		if root.ID == id {
			return root.Live
		}
	}
	return -1
}

func (f *fleet) status() rootStatus {
	f.t.Helper()
	var st rootStatus
	f.site.CLIJSON(&st, "root", "status")
	return st
}

// until waits until the rotation is as is says.
func (f *fleet) until(what string, is func(rootStatus) bool) rootStatus {
	f.t.Helper()
	var st rootStatus
	f.site.Server.Eventually(3*time.Minute, what, func() error {
		if st = f.status(); is(st) {
			return nil
		}
		return fmt.Errorf("%+v", st.Rotation)
	})
	return st
}

func ended(phase string) func(rootStatus) bool {
	return func(st rootStatus) bool { return st.Rotation.Phase == phase }
}

// The root of a running fleet is replaced by one command, without one failed
// handshake: with all agents there, and with one that sleeps for a while, which
// is waited for and named. // BUN-23, CLIENT-15
func TestARootIsReplacedUnderAFleet(t *testing.T) {
	f := newFleet(t, 3)
	f.until("all SVIDs to be told under the one root", func(st rootStatus) bool { return st.Roots[0].Live >= 3 })
	f.site.CLI("root", "rotate", "--yes", "--detach", "--reason", "friday")
	st := f.until("the end of the rotation", ended("done"))
	if st.state(st.Rotation.From) != "revoked" || st.state(st.Rotation.To) != "active" || len(st.Rotation.Missed) != 0 {
		t.Errorf("after it: %+v", st)
	}
	if st.live(st.Rotation.From) != 0 || st.live(st.Rotation.To) < 3 {
		t.Errorf("SVIDs after it: %+v", st.Roots)
	}
	if out := f.site.CLI("root", "rotate", "--watch"); !strings.Contains(out, "done") {
		t.Errorf("--watch of an ended rotation: %s", out)
	}

	sleeper := f.agents[1]
	sleeper.Signal(syscall.SIGSTOP)
	f.site.CLI("root", "rotate", "--yes", "--detach")
	st = f.until("the agent that sleeps to be named", func(st rootStatus) bool {
		return st.Rotation.Phase == "publishing" && len(st.Rotation.Waits) == 1 && st.Rotation.Waits[0].AgentID == sleeper.ID
	})
	first := st.Rotation.From
	if st.state(first) != "active" {
		t.Error("the new root signs although an agent does not have it")
	}
	_, stderr, code := f.site.Try("assay", "root", "rotate", "--yes")
	if code != 75 || !strings.Contains(stderr, "rotation_in_progress") {
		t.Errorf("a second rotation: exit %d, %s", code, stderr)
	}
	_, stderr, code = f.site.Try("assay", "root", "activate")
	if code != 75 || !strings.Contains(stderr, "rotation_in_progress") {
		t.Errorf("a step by hand meanwhile: exit %d, %s", code, stderr)
	}
	sleeper.Signal(syscall.SIGCONT)
	f.until("the end of the second rotation", ended("done"))
	f.check()
}

// Taken back after the new root has signed, over a restart of the server:
// nobody notices.
func TestARotationIsTakenBackUnderAFleet(t *testing.T) {
	f := newFleet(t, 2)
	f.site.CLI("root", "rotate", "--yes", "--detach")
	st := f.until("the new root to sign", ended("reissuing"))
	sleeper := f.agents[1] // holds something under the old root: that is no end yet
	sleeper.Signal(syscall.SIGSTOP)
	f.site.Server.Stop(syscall.SIGKILL)
	f.site.StartServer()
	command := f.site.Launch("assay", "root", "abort", "--yes", "--reason", "wrong day")
	f.until("the way back", func(st rootStatus) bool { return ended("aborting")(st) || ended("aborted")(st) })
	sleeper.Signal(syscall.SIGCONT)
	after := f.until("the end", ended("aborted"))
	if code := command.ExitCode(); code != 0 {
		t.Errorf("root abort: exit %d", code)
	}
	if after.state(st.Rotation.From) != "active" || after.state(st.Rotation.To) != "revoked" {
		t.Errorf("after it: %+v", after)
	}
	_, stderr, code := f.site.Try("assay", "root", "abort", "--yes")
	if code != 75 || !strings.Contains(stderr, "no_rotation") {
		t.Errorf("a second abort: exit %d, %s", code, stderr)
	}
	f.check()
}

// By hand, step by step: the gates are those of a rotation, and each step says
// what it waits for. // NEG-60
func TestStepsByHandPassTheSameGates(t *testing.T) {
	f := newFleet(t, 2)
	f.site.CLI("root", "prepare", "--reason", "by hand")
	f.site.Server.Eventually(time.Minute, "activation", func() error {
		if _, stderr, code := f.site.Try("assay", "root", "activate"); code != 0 {
			return fmt.Errorf("exit %d: %s", code, stderr)
		}
		return nil
	})
	sleeper := f.agents[1] // holds something under the old root
	sleeper.Signal(syscall.SIGSTOP)
	_, stderr, code := f.site.Try("assay", "root", "revoke", "--yes")
	if code != 75 || !strings.Contains(stderr, "would_break_live_svids") {
		t.Errorf("revoked under everybody: exit %d, %s", code, stderr)
	}
	if _, _, code = f.site.Try("assay", "root", "revoke", "--yes", "--force"); code != 64 {
		t.Errorf("forced without a reason: exit %d", code)
	}
	sleeper.Signal(syscall.SIGCONT)
	f.site.CLI("root", "taint", "--yes")
	f.site.Server.Eventually(2*time.Minute, "revocation", func() error {
		if _, stderr, code := f.site.Try("assay", "root", "revoke", "--yes"); code != 0 {
			return fmt.Errorf("exit %d: %s", code, stderr)
		}
		return nil
	})
	f.check()
}

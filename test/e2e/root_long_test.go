//go:build e2e && long

package e2e

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/test/harness"
)

const quickTTL = `ca:
  x509_svid_ttl: 20s
  max_x509_svid_ttl: 20s
attestation:
  agent_svid_ttl: 30s
`

// planned and emergency are how a rotation is ordered. An emergency is over
// sooner, and only it taints.
var (
	planned   = []string{"root", "rotate", "--yes"}
	emergency = append(slices.Clone(planned), "--emergency", "--deadline", "3m")
)

// NEG-51: the server is killed at every step, with the command that shows it
// killed a moment later and handshakes going on all the while: a rotation comes
// to the same end by itself, and can be asked for again.
func TestARotationSurvivesKills(t *testing.T) {
	for name, c := range map[string]struct {
		order  []string
		points []string
	}{
		"planned":   {planned, []string{"key_made", "root_prepare", "root_activate", "root_revoke"}},
		"emergency": {emergency, []string{"rotation_start", "key_made", "key_sealed", "root_prepare", "bundle_published", "root_activate", "root_taint", "root_revoke", "rotation_end"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleetAt(t, harness.NewSite(t, killable.built(t), quickTTL), 2)
			r := rand.New(rand.NewPCG(51, uint64(len(c.points))))
			for _, point := range c.points {
				last := f.status().Rotation.OperationID
				f.site.Server.Stop(syscall.SIGKILL)
				f.site.StartServer(armed(point))
				command := f.site.Launch("assay", c.order...)
				awaitKill(t, f.site.Server, point)
				f.site.StartServer()
				<-time.After(time.Duration(r.IntN(1500)) * time.Millisecond)
				command.Stop(syscall.SIGKILL)
				if begun := f.status().Rotation.OperationID; begun == last || begun == "" {
					t.Fatalf("%s: the operation was acted upon and is not in the store", point)
				}
				f.orderAgain(c.order)
				f.untilReplaced(point)
			}
			f.check()
			checkHistory(t, f.site)
		})
	}
}

// NEG-51: the command that began a rotation is killed: at any moment, also
// before the order has got to the server, and while it waits at either gate.
// The rotation goes on.
func TestARotationOutlivesItsCommand(t *testing.T) {
	t.Parallel()
	f := newFleetAt(t, newSite(t, quickTTL), 2)
	r := rand.New(rand.NewPCG(51, 0))
	for i := range 12 {
		command := f.site.Launch("assay", emergency...)
		<-time.After(time.Duration(r.IntN(60*(i+1))) * time.Millisecond)
		command.Stop(syscall.SIGKILL)
		f.orderAgain(emergency)
		f.untilReplaced(fmt.Sprintf("kill %d of the command", i))
	}
	sleeper := f.agents[1]
	for _, phase := range []string{"publishing", "reissuing"} {
		last := f.status().Rotation.OperationID
		if phase == "publishing" {
			sleeper.Signal(syscall.SIGSTOP)
		}
		command := f.site.Launch("assay", planned...)
		at := func(st rootStatus) bool {
			return st.Rotation.OperationID != last && st.Rotation.Phase == phase && len(st.Rotation.Waits) > 0
		}
		f.until("the gate", at)
		sleeper.Signal(syscall.SIGSTOP) // it keeps the second gate shut too
		command.Stop(syscall.SIGKILL)
		if command.ExitCode() != -1 {
			t.Errorf("%s: the command did not wait for the end", phase)
		}
		if st := f.status(); !at(st) {
			t.Errorf("without its command: %+v", st.Rotation)
		}
		f.orderAgain(planned)
		sleeper.Signal(syscall.SIGCONT)
		f.untilReplaced("a kill while " + phase)
	}
	f.check()
	checkHistory(t, f.site)
}

// orderAgain orders a rotation when one may be under way: it is begun, or the
// order is refused because of the other.
func (f *fleet) orderAgain(order []string) {
	f.t.Helper()
	_, stderr, code := f.site.Try("assay", append(slices.Clone(order), "--detach")...)
	if code != 0 && (code != 75 || !strings.Contains(stderr, "rotation_in_progress")) {
		f.t.Fatalf("asked again: exit %d, %s", code, stderr)
	}
}

// untilReplaced waits for the end of the rotation: one root, of two at most
// meanwhile, and nobody was cut off.
func (f *fleet) untilReplaced(after string) {
	f.t.Helper()
	st := f.until("the end of the rotation after "+after, func(st rootStatus) bool {
		if n := st.published(); n > 2 {
			f.t.Errorf("%s: %d roots are published", after, n)
		}
		return st.Rotation.Phase == "done"
	})
	if st.published() != 1 || st.state(st.Rotation.To) != "active" || len(st.Rotation.Missed) > 0 {
		f.t.Fatalf("%s: %+v", after, st)
	}
}

func (r rootStatus) published() (n int) {
	for _, root := range r.Roots {
		if root.State != "revoked" {
			n++
		}
	}
	return n
}

// The size that the acceptance asks for.
func TestARootIsReplacedUnderTwentyAgents(t *testing.T) {
	f := newFleet(t, 20)
	f.site.CLI("root", "rotate", "--yes", "--detach")
	f.until("the end of the rotation", ended("done"))
	f.check()
}

// The handshakes have teeth: an agent that acknowledges a bundle which it did
// not push to its streams breaks them.
func TestAnAgentThatLiesBreaksHandshakes(t *testing.T) {
	f := newFleetAt(t, newSite(t, quickTTL), 2)
	liar := &binaries{tags: "ackunsent"}
	f.agents[0].Stop(15)
	f.site.Bins = liar.built(t)
	f.agents[0].Start(harness.Token{})
	f.site.Bins = plain.built(t)
	f.site.CLI("root", "rotate", "--yes", "--detach")
	f.until("the end of the rotation", ended("done"))
	failed := int64(0)
	for _, h := range f.pairs {
		h.stop()
		failed += h.failed.Load()
	}
	if failed == 0 {
		t.Error("no handshake failed: the tests of rotations would not see a broken one")
	}
}

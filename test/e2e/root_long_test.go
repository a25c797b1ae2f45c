//go:build e2e && long

package e2e

import (
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/test/harness"
)

// NEG-51: killed at every step, with handshakes going on all the while, a
// rotation comes to the same end by itself; it can be asked for again. Planned
// ones, and emergencies for the step that only they have.
func TestARotationSurvivesKills(t *testing.T) {
	for point, flags := range map[string][]string{
		"rotation_start": {"--detach"},
		"root_prepare":   {"--detach"},
		"root_activate":  {"--detach"},
		"root_revoke":    {"--detach"},
		"root_taint":     {"--detach", "--emergency", "--deadline", "2m"},
	} {
		t.Run(point, func(t *testing.T) {
			f := newFleetAt(t, harness.NewSite(t, killable.built(t), quickTTL), 2)
			for range 3 {
				last := f.status().Rotation.OperationID
				f.site.Server.Stop(9)
				f.site.StartServer(armed(point))
				// The answer may be lost with the server, or come before its end.
				_, _, _ = f.site.Try("assay", append([]string{"root", "rotate", "--yes"}, flags...)...)
				awaitKill(t, f.site.Server, point)
				f.site.StartServer()
				if begun := f.status().Rotation.OperationID; begun == last || begun == "" {
					t.Fatal("the operation was acted upon and is not in the store")
				}
				_, stderr, code := f.site.Try("assay", "root", "rotate", "--yes", "--detach")
				if code != 75 || !strings.Contains(stderr, "rotation_in_progress") {
					if code != 0 { // the first one was through already
						t.Fatalf("asked again: exit %d, %s", code, stderr)
					}
				}
				st := f.until("the end of the rotation", func(st rootStatus) bool {
					if n := st.published(); n > 2 {
						t.Errorf("%d roots are published", n)
					}
					return st.Rotation.Phase == "done"
				})
				if st.published() != 1 || st.state(st.Rotation.To) != "active" || len(st.Rotation.Missed) > 0 {
					t.Fatalf("after it: %+v", st)
				}
			}
			f.check()
			checkHistory(t, f.site)
		})
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

package rotation

import (
	"fmt"
	"time"

	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/registry"
)

// Gate names a point that a rotation passes only when it is safe.
type Gate string

// The gates of design section 7, G1 and G2.
const (
	BeforeActivate Gate = "activate"
	BeforeRevoke   Gate = "revoke"
)

// Wait is one thing that keeps a gate shut.
type Wait struct {
	// AgentID is who it waits for; empty if it is no agent.
	AgentID string
	// Why, in a few words.
	Why string
	// Until is when it is over by itself at the latest; zero if nobody knows.
	Until time.Time
}

// World is what the gates look at.
type World struct {
	Now time.Time
	// Ahead is how far the wall clock was set ahead of Now, if it was.
	Ahead time.Duration
	Fleet []registry.AgentStatus
	// MaxTTL is the longest life of a workload's X.509-SVID.
	MaxTTL time.Duration
	// OwnAuthority is the root of the server's own certificate.
	OwnAuthority string
}

// Activate returns what a prepared root waits for before it may sign.
func (w World) Activate(root ca.Root) []Wait {
	var waits []Wait
	if until := root.HandedBefore; until.After(w.Now) {
		waits = append(waits, Wait{Why: "certificates handed out without an agent before the new root was published have not ended", Until: until})
	}
	return w.dated(append(waits, w.agents(root, w.notServed)...))
}

// dated says beside what is waited for that the time of it is not that of the
// wall clock.
func (w World) dated(waits []Wait) []Wait {
	if w.Ahead > 0 && len(waits) > 0 {
		waits = append(waits, Wait{Why: fmt.Sprintf(
			"the server's clock was set ahead by %v: the gate goes by the time since boot; if the clock is right now, restart the server", w.Ahead.Round(time.Second))})
	}
	return waits
}

// notServed says why an agent and its workloads may not have root yet.
func (w World) notServed(a *registry.AgentStatus, root ca.Root) (why string, until time.Time) {
	gone := w.gone(a)
	switch {
	case a.AcknowledgedSequence < root.Published:
		return "has not acknowledged the new root" + w.whereabouts(a), gone
	case a.WaitsUntil.After(w.Now):
		return "workloads without a stream hold SVIDs that came with the old bundle", a.WaitsUntil
	case w.Now.Add(a.ClockOffset).Before(root.Certificate.NotBefore):
		return fmt.Sprintf("its clock is %v off, so the new root is not valid there yet", a.ClockOffset.Round(time.Second)), time.Time{}
	}
	return "", time.Time{}
}

// Revoke returns what a root waits for before it may leave the bundle.
func (w World) Revoke(root ca.Root) []Wait {
	if root.State == ca.Prepared {
		return nil // nothing ever hung on it
	}
	var waits []Wait
	if until := root.HandedUntil; until.After(w.Now) {
		waits = append(waits, Wait{Why: "certificates handed out under it without an agent have not ended", Until: until})
	}
	if w.OwnAuthority == root.ID {
		waits = append(waits, Wait{Why: "the server's own certificate is under it"})
	}
	if !root.StreamUntil.After(w.Now) {
		return w.dated(waits) // all that agents ever got under it has ended
	}
	return w.dated(append(waits, w.agents(root, w.holds)...))
}

// agents returns those of the agents that count for which why has a reason.
func (w World) agents(root ca.Root, why func(*registry.AgentStatus, ca.Root) (string, time.Time)) (waits []Wait) {
	for i := range w.Fleet {
		a := &w.Fleet[i]
		if !w.counts(a) {
			continue
		}
		if reason, until := why(a, root); reason != "" {
			waits = append(waits, Wait{AgentID: a.ID.String(), Why: reason, Until: until})
		}
	}
	return waits
}

// holds says why an agent or one of its workloads may hold something under
// root.
func (w World) holds(a *registry.AgentStatus, root ca.Root) (why string, until time.Time) {
	retired := retiredAt(root)
	switch {
	case a.Authority == root.ID && a.NotAfter.After(w.Now):
		return "its own certificate is under the root" + w.whereabouts(a), root.StreamUntil
	case a.PendingAuthority == root.ID && a.PendingNotAfter.After(w.Now):
		return "its own certificate is under the root" + w.whereabouts(a), root.StreamUntil
	case a.ReportSequence < retired:
		// Only a report that came after the agent knew that the root is retired
		// says that nothing more will come into use under it.
		return "has not reported what it holds since the root was retired" + w.whereabouts(a), root.StreamUntil
	}
	for _, live := range a.Live {
		if live.AuthorityID == root.ID && live.LatestExpiry.After(w.Now) {
			return fmt.Sprintf("%d SVIDs of its workloads are under the root", live.Count), live.LatestExpiry
		}
	}
	return "", time.Time{}
}

// counts says whether an agent has to be waited for: not if it is banned, and
// not if nothing that it handed out can be valid any more.
func (w World) counts(a *registry.AgentStatus) bool {
	return !a.Banned && w.gone(a).After(w.Now)
}

// gone is when nothing that the agent handed out can be valid any more.
func (w World) gone(a *registry.AgentStatus) time.Time {
	end := a.Ends()
	if a.Until.After(end) {
		end = a.Until
	}
	return end.Add(w.MaxTTL)
}

func (w World) whereabouts(a *registry.AgentStatus) string {
	switch {
	case a.Connected:
		return ""
	case a.LastSeen.IsZero():
		return "; not seen since this server started"
	}
	return fmt.Sprintf("; not connected, last seen %v ago", w.Now.Sub(a.LastSeen).Round(time.Second))
}

// retiredAt is the sequence of the bundle with which the root ceased to sign.
func retiredAt(root ca.Root) uint64 {
	for i := len(root.Moves) - 1; i >= 0; i-- {
		if m := root.Moves[i]; m.To == ca.Retired {
			return m.Sequence
		}
	}
	return root.Published
}

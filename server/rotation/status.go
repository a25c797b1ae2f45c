package rotation

import (
	"context"
	"time"

	"github.com/seed-caa81108/assay/server/ca"
)

// Status is a rotation as people see it.
type Status struct {
	// Operation is nil if there never was a rotation.
	Operation *ca.Operation
	Phase     Phase
	// To is the ID of the root that replaces Operation.From; empty until it is
	// made.
	To string
	// Gate and Waits say what the rotation stands at, and for what.
	Gate  Gate
	Waits []Wait
	// Agents counts those that the gates count, Ready those of them that the
	// gate does not wait for.
	Agents, Ready int
}

// Status returns the rotation under way or the last one.
func (r *Rotator) Status(ctx context.Context) (Status, error) {
	op, err := r.o.Authority.LastOperation(ctx)
	if err != nil {
		return Status{}, err
	}
	return r.status(op), nil
}

func (r *Rotator) status(op *ca.Operation) Status {
	if op == nil {
		return Status{}
	}
	s := Status{Operation: op, Phase: Phase(op.Outcome), To: r.made(op.ID).ID}
	if !op.UnderWay() {
		return s
	}
	next := r.next(op)
	s.Phase, s.Gate = next.phase, next.gate
	w := r.world()
	for i := range w.Fleet {
		if w.counts(&w.Fleet[i]) {
			s.Agents++
		}
	}
	s.Ready = s.Agents
	if next.gate == "" {
		return s
	}
	s.Waits = r.waits(next)
	for _, wait := range s.Waits {
		if wait.AgentID != "" {
			s.Ready--
		}
	}
	return s
}

// Changed returns a channel that is closed when the operation changes or makes
// a step. What the gates wait for changes in between: whoever shows that looks
// again now and then.
func (r *Rotator) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

// Gates returns what keeps a single move of a root from being safe: to the
// active root from prepared, or out of the bundle.
func (r *Rotator) Gates(gate Gate, root ca.Root) []Wait {
	return r.waits(step{gate: gate, root: root})
}

// Left is the time that an emergency has until its deadline; zero for others.
func (s Status) Left(now time.Time) time.Duration {
	if s.Operation == nil || s.Operation.Deadline.IsZero() || !s.Operation.UnderWay() {
		return 0
	}
	return max(0, s.Operation.Deadline.Sub(now))
}

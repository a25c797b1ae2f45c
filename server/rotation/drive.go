package rotation

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
)

// Phase is where a rotation is, for people.
type Phase string

// The phases, in order; aborting and aborted take the place of the last ones.
const (
	Preparing  Phase = "preparing"  // the new root is being made
	Publishing Phase = "publishing" // everybody gets it
	Reissuing  Phase = "reissuing"  // everybody gets an SVID under it
	Aborting   Phase = "aborting"   // the new one is taken back
	Done       Phase = "done"
	Aborted    Phase = "aborted"
)

// step is what a rotation does next.
type step struct {
	phase Phase
	// gate, if any, that has to be open, and what root it is about.
	gate Gate
	root ca.Root
	// back: the step takes the rotation back.
	back bool
	// do makes the step: one move of the authority. Nil at the end.
	do func(ctx context.Context, o ca.Order) error
}

// next derives the next step from the states of the two roots alone.
func (r *Rotator) next(op *ca.Operation) step {
	from, to := r.find(op.From), r.made(op.ID)
	// A taint that was under way when the abort was decided wins over it: the
	// rotation goes on to its end, or the old root would stay in the bundle.
	if op.Abort != nil && from.State != ca.Tainted {
		return r.back(from, to)
	}
	switch {
	case to.ID == "":
		return step{phase: Preparing, do: func(ctx context.Context, o ca.Order) error {
			_, err := r.o.Authority.Prepare(ctx, o)
			return err
		}}
	case to.State == ca.Prepared:
		return step{phase: Publishing, gate: BeforeActivate, root: to, do: func(ctx context.Context, o ca.Order) error {
			return r.o.Authority.Activate(ctx, to.ID, o)
		}}
	case to.State == ca.Active && from.State == ca.Retired && !op.Deadline.IsZero():
		return step{phase: Reissuing, do: func(ctx context.Context, o ca.Order) error {
			return r.o.Authority.Taint(ctx, from.ID, o)
		}}
	case to.State == ca.Active && (from.State == ca.Retired || from.State == ca.Tainted):
		return step{phase: Reissuing, gate: BeforeRevoke, root: from, do: func(ctx context.Context, o ca.Order) error {
			return r.o.Authority.Revoke(ctx, from.ID, o)
		}}
	case to.State == ca.Active:
		return step{phase: Done}
	}
	return step{phase: Aborted} // somebody moved the roots step by step meanwhile
}

// back is the next step of a rotation that is taken back.
func (r *Rotator) back(from, to ca.Root) step {
	switch {
	case to.ID == "" || to.State == ca.Revoked:
		return step{phase: Aborted}
	case to.State == ca.Active && from.State == ca.Retired:
		return step{phase: Aborting, do: func(ctx context.Context, o ca.Order) error {
			return r.o.Authority.Activate(ctx, from.ID, o)
		}}
	case to.State == ca.Active:
		return step{phase: Done} // too late after all: the old root went in the same moment
	}
	return step{phase: Aborting, gate: BeforeRevoke, root: to, back: true, do: func(ctx context.Context, o ca.Order) error {
		return r.o.Authority.Revoke(ctx, to.ID, o)
	}}
}

// made finds the root that the operation has prepared.
func (r *Rotator) made(operation string) ca.Root {
	for _, root := range r.o.Authority.Authorities() {
		if root.Operation == operation {
			return root
		}
	}
	return ca.Root{}
}

// Run drives the rotation under way, if there is one, until ctx ends.
func (r *Rotator) Run(ctx context.Context) error {
	defer close(r.stopped)
	var backoff schedule.Backoff
	waiting := time.Now() // since when at the same step
	var ahead time.Duration
	for {
		ahead = r.tellClock(ctx, ahead)
		look, err := r.drive(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			r.o.Log.LogAttrs(ctx, slog.LevelWarn, "rotation can't go on now", slog.String("reason", fault.ReasonOf(err)), slog.String("error", err.Error()))
			look = backoff.Next()
		case look == 0:
			backoff.Reset()
			waiting = time.Now()
			continue
		case look == lookEvery && time.Since(waiting) > patience:
			look = lookSeldom
		}
		timer := time.NewTimer(look)
		select {
		case <-timer.C:
		case <-r.poke:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// tellClock logs when the wall clock is found to be ahead, or right again. It
// returns how far it is, as was returned the last time.
func (r *Rotator) tellClock(ctx context.Context, was time.Duration) time.Duration {
	ahead := max(0, r.o.Clock.Step())
	switch {
	case ahead > 0 && was == 0:
		r.o.Log.LogAttrs(ctx, slog.LevelWarn, "the server's clock was set ahead: rotations go by the time since boot until it is right, or the server is started anew",
			slog.Duration("by", ahead))
	case ahead == 0 && was > 0:
		r.o.Log.LogAttrs(ctx, slog.LevelInfo, "the server's clock is right again")
	}
	return ahead
}

// drive makes one step and returns zero, or when to look again.
func (r *Rotator) drive(ctx context.Context) (look time.Duration, err error) {
	op, err := r.o.Authority.LastOperation(ctx)
	if err != nil {
		return 0, err
	}
	if !r.seen(op) {
		r.note(op)
	}
	if !op.UnderWay() {
		return lookIdle, r.begin(ctx, op)
	}
	s := r.next(op)
	if s.do == nil {
		return 0, r.end(ctx, op, s.phase)
	}
	order := r.order(op)
	if s.gate != "" {
		if waits := r.waits(s); len(waits) > 0 {
			if order.Forced = r.open(op, s, r.o.Clock.Now()); !order.Forced {
				return lookEvery, nil
			}
			if err := r.miss(ctx, op, waits); err != nil {
				return 0, err
			}
		}
	}
	if err := s.do(ctx, order); err != nil {
		return 0, err
	}
	r.note(op)
	return 0, nil
}

// holdAfterAbort is how long an aborted rotation is not begun again by itself.
const holdAfterAbort = 24 * time.Hour

// begin starts a rotation if it is time for the next one.
func (r *Rotator) begin(ctx context.Context, last *ca.Operation) error {
	now := r.o.Clock.Now()
	if !r.o.Automatic || !due(r.o.Authority.Authorities(), now) {
		return nil
	}
	if last != nil && last.Outcome == string(Aborted) && now.Before(last.EndedAt.Add(holdAfterAbort)) {
		return nil
	}
	_, err := r.Start(ctx, Request{By: server(), Who: "assay-server", Reason: "a third of the root's life remains"}, 0)
	return err
}

// due says whether the active root is the only one and has a third of its life
// left.
func due(roots []ca.Root, now time.Time) bool {
	var active ca.Root
	for _, root := range roots {
		switch root.State {
		case ca.Active:
			active = root
		case ca.Revoked:
		default:
			return false // somebody is at work
		}
	}
	life := active.Certificate.NotAfter.Sub(active.Certificate.NotBefore)
	return active.Certificate.NotAfter.Sub(now) < life/3
}

// open says whether a gate is passed although there is something to wait for.
// What was forced before an abort was about the other root.
func (r *Rotator) open(op *ca.Operation, s step, now time.Time) bool {
	if slices.ContainsFunc(op.Forced, func(d ca.Decision) bool {
		return d.Gate == string(s.gate) && (!s.back || d.At.After(op.Abort.At))
	}) {
		return true
	}
	if op.Deadline.IsZero() || s.back {
		return false
	}
	if s.gate == BeforeActivate {
		return now.After(op.StartedAt.Add(op.Deadline.Sub(op.StartedAt) / emergencyShare))
	}
	return now.After(op.Deadline)
}

// miss keeps who is not waited for, before the step that cuts them off.
func (r *Rotator) miss(ctx context.Context, op *ca.Operation, waits []Wait) error {
	added := false
	for _, w := range waits[:min(len(waits), maxMissed)] {
		who := w.AgentID
		if who == "" {
			who = w.Why
		}
		if !slices.Contains(op.Missed, who) {
			op.Missed, added = append(op.Missed, who), true
		}
	}
	if !added {
		return nil
	}
	r.o.Log.LogAttrs(ctx, slog.LevelError, "rotation goes on without those who are not ready", slog.String("operation", op.ID), slog.Any("missed", op.Missed))
	return r.o.Authority.SaveOperation(ctx, op)
}

func (r *Rotator) end(ctx context.Context, op *ca.Operation, phase Phase) error {
	op.EndedAt, op.Outcome = time.Now().UTC(), string(phase)
	if err := r.audit(ctx, server(), "rotation.end", audit.Target{AuthorityID: op.From, OperationID: op.ID}, op.Outcome, nil); err != nil {
		return err
	}
	err := r.o.Authority.SaveOperation(ctx, op)
	if errors.Is(err, fault.Conflict) {
		return nil // decided anew in the same moment: the next look sees it
	}
	if err == nil {
		failpoint.Hit("rotation_end")
		r.note(op)
		r.o.Log.LogAttrs(ctx, slog.LevelWarn, "rotation ended", slog.String("operation", op.ID), slog.String("outcome", op.Outcome))
	}
	return err
}

func (r *Rotator) order(op *ca.Operation) ca.Order {
	return ca.Order{By: server(), Who: op.Who, Operation: op.ID, Reason: op.Reason}
}

// server is the origin of what a rotation does by itself; who ordered it stands
// in the line of the order.
func server() audit.Origin { return audit.Origin{Actor: audit.Actor{Kind: "server"}} }

func (r *Rotator) waits(s step) []Wait {
	w := r.world()
	if s.gate == BeforeActivate {
		return w.Activate(s.root)
	}
	return w.Revoke(s.root)
}

// seen says whether watchers know op as it is.
func (r *Rotator) seen(op *ca.Operation) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return op == nil || op.Same(&r.last)
}

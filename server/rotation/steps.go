package rotation

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/ca"
)

// Single steps, for those who want to go one at a time. The gates are the same
// as those of a rotation, and none can be made while a rotation is under way.
// force passes a shut gate; it needs a reason.

// Prepare makes a new root and publishes it.
func (r *Rotator) Prepare(ctx context.Context, by Request) (ca.Root, error) {
	if err := r.idle(ctx); err != nil {
		return ca.Root{}, r.refused(ctx, by, "root.prepare", err)
	}
	return r.o.Authority.Prepare(ctx, by.order())
}

// Activate lets a prepared root sign. An empty id means the prepared one.
func (r *Rotator) Activate(ctx context.Context, by Request, id string, force bool) (ca.Root, error) {
	root, err := r.pick(ctx, id, ca.Prepared)
	order := by.order()
	if err == nil && root.State == ca.Prepared {
		order.Forced, err = r.passable(ctx, r.Gates(BeforeActivate, root), by, force, "not_acknowledged")
	}
	if err != nil {
		return ca.Root{}, r.refused(ctx, by, "root.activate", err)
	}
	return r.moved(root.ID, r.o.Authority.Activate(ctx, root.ID, order))
}

// Taint has everything under a retired root replaced at once. An empty id means
// the retired one.
func (r *Rotator) Taint(ctx context.Context, by Request, id string) (ca.Root, error) {
	root, err := r.pick(ctx, id, ca.Retired)
	if err != nil {
		return ca.Root{}, r.refused(ctx, by, "root.taint", err)
	}
	return r.moved(root.ID, r.o.Authority.Taint(ctx, root.ID, by.order()))
}

// Revoke takes a root that does not sign out of the bundle. An empty id means
// the retired or tainted one.
func (r *Rotator) Revoke(ctx context.Context, by Request, id string, force bool) (ca.Root, error) {
	root, err := r.pick(ctx, id, ca.Retired, ca.Tainted)
	order := by.order()
	if err == nil && (root.State == ca.Retired || root.State == ca.Tainted) {
		order.Forced, err = r.passable(ctx, r.Gates(BeforeRevoke, root), by, force, "would_break_live_svids")
	}
	if err != nil {
		return ca.Root{}, r.refused(ctx, by, "root.revoke", err)
	}
	return r.moved(root.ID, r.o.Authority.Revoke(ctx, root.ID, order))
}

func (by Request) order() ca.Order {
	return ca.Order{By: by.By, Who: by.Who, Reason: by.Reason}
}

// idle refuses a single step while a rotation is under way: the two would undo
// each other.
func (r *Rotator) idle(ctx context.Context) error {
	op, err := r.o.Authority.LastOperation(ctx)
	if err == nil && op.UnderWay() {
		err = fault.Newf(fault.Conflict, "rotation_in_progress",
			"rotation %s, begun by %s, is under way: follow it (assay root rotate --watch), or abort it first", op.ID, op.Who)
	}
	return err
}

// pick finds the root that is meant: by its id, or the only one in one of the
// states.
func (r *Rotator) pick(ctx context.Context, id string, states ...ca.State) (ca.Root, error) {
	if err := r.idle(ctx); err != nil {
		return ca.Root{}, err
	}
	for _, root := range r.o.Authority.Authorities() {
		if id != "" && root.ID == id {
			return root, nil
		}
		for _, s := range states {
			if id == "" && root.State == s {
				return root, nil
			}
		}
	}
	if id != "" {
		return ca.Root{}, fault.Newf(fault.NotFound, "authority_unknown", "there is no root %q: see assay root status", id)
	}
	return ca.Root{}, fault.Newf(fault.Precondition, "authority_state", "there is no %s root: see assay root status", states[0])
}

func (r *Rotator) moved(id string, err error) (ca.Root, error) {
	if err != nil {
		return ca.Root{}, err
	}
	return r.find(id), nil
}

// maxTold is how many of those that a gate waits for an error names.
const maxTold = 5

// passable says whether a step may be made, and whether it is only because its
// gate is forced.
func (r *Rotator) passable(ctx context.Context, waits []Wait, by Request, force bool, reason string) (forced bool, err error) {
	switch {
	case len(waits) == 0:
		return false, nil
	case !force:
		return false, notYet(waits, reason)
	case by.Reason == "":
		return false, fault.New(fault.Invalid, "reason_missing", "say why the gate is forced: it goes into the audit log")
	}
	for _, w := range waits[:min(len(waits), maxMissed)] {
		r.o.Log.LogAttrs(ctx, slog.LevelError, "not waited for, as the gate is forced", slog.String("who", by.Who), slog.String("waits_for", w.String()))
	}
	return true, nil
}

// notYet says what a gate waits for, in a line.
func notYet(waits []Wait, reason string) error {
	var last time.Time
	told := make([]string, 0, maxTold)
	for i, w := range waits {
		if w.Until.After(last) {
			last = w.Until
		}
		if i < maxTold {
			told = append(told, w.String())
		}
	}
	more := ""
	if n := len(waits) - len(told); n > 0 {
		more = fmt.Sprintf("; and %d more", n)
	}
	if !last.IsZero() {
		more += "; it is over by itself at " + last.UTC().Format(time.RFC3339)
	}
	return fault.Newf(fault.Precondition, reason, "not safe yet, waits for %d: %s%s", len(waits), strings.Join(told, "; "), more)
}

// String is the wait in a line.
func (w Wait) String() string {
	if w.AgentID == "" {
		return w.Why
	}
	return w.AgentID + " " + w.Why
}

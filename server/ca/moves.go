package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/store"
)

// This file is the life of a root after its making (design section 7):
//
//	prepared -> active -> retired -> tainted -> revoked
//
// with two ways back: a prepared root that never signed may be revoked, and a
// retired one may become active again. Each move is one commit whose
// preconditions are the records that it read, so of two operators one wins.
// Whether a move is safe for those who hold certificates is not judged here:
// that needs the fleet, and is the business of the caller.

const (
	// maxPublished is how many roots the bundle may have.
	maxPublished = 2
	// maxMoves is how many moves a record remembers, the newest ones.
	maxMoves = 16
)

// Order is who has a root moved, and why.
type Order struct {
	By audit.Origin
	// Who is By in a few words, for people.
	Who string
	// Operation names the rotation that the move is a step of. A move that the
	// same operation has made already succeeds and changes nothing.
	Operation string
	Reason    string
	// Forced: the gate before the move was shut, and somebody passed it.
	Forced bool
}

// Move is one change of state, as the root's record remembers it.
type Move struct {
	To        State     `json:"to"`
	At        time.Time `json:"at"`
	Sequence  uint64    `json:"sequence"` // of the bundle that it made
	Operation string    `json:"operation,omitempty"`
	Who       string    `json:"who,omitempty"`
	Reason    string    `json:"reason,omitempty"`
}

// plan is what a move changes: records as they shall be.
type plan struct {
	changed []*authority
	destroy []byte // key reference that nobody needs once it is done
}

// errMoved says that there is nothing to do any more.
var errMoved = errors.New("the authority is in that state already")

// Prepare makes a new root and publishes it. It signs nothing until it is
// activated. The root is returned; if the order's operation has prepared one
// already, that one is.
func (a *Authority) Prepare(ctx context.Context, o Order) (Root, error) {
	var made *authority
	err := a.move(ctx, o, "root.prepare", func(v *view) (plan, error) {
		if one := v.madeBy(o.Operation); one != nil {
			made = one
			return plan{}, errMoved
		}
		if v.published() >= maxPublished {
			return plan{}, fault.New(fault.Precondition, "rotation_in_progress",
				"two roots are in the bundle already: finish or abort that rotation first (assay root status)")
		}
		if made == nil { // else a try that lost against another commit has made it
			var err error
			if made, err = a.makeRoot(ctx, Prepared); err != nil {
				return plan{}, err
			}
		}
		made.record.HandedBefore = v.handedUntil()
		made.record.Published, made.record.Operation = v.sequence+1, o.Operation
		return plan{changed: []*authority{made}}, nil
	})
	if err != nil {
		// If it is not known whether the commit was made, the key lives on.
		if made != nil && errors.Is(err, fault.Precondition) {
			return Root{}, errors.Join(err, a.keys.Destroy(ctx, made.record.KeyRef))
		}
		return Root{}, err
	}
	failpoint.Hit("bundle_published")
	return a.current.Load().view.find(made.record.ID).root(), nil
}

// Activate lets a prepared root sign from now on, or a retired one again; the
// active one is retired. When it returns, this server signs under the new
// root.
func (a *Authority) Activate(ctx context.Context, id string, o Order) error {
	return a.move(ctx, o, "root.activate", func(v *view) (plan, error) {
		one, err := v.inState(id, Active, Prepared, Retired)
		if err != nil {
			return plan{}, err
		}
		now := time.Now()
		if !one.cert.NotAfter.After(now) || one.cert.NotBefore.After(now) {
			return plan{}, fault.Newf(fault.Precondition, "authority_not_valid", "root %s is not valid now: check the clock, or prepare another one", id)
		}
		next, last := one.in(Active), v.active.in(Retired)
		next.record.Marks.begin(a.ahead(now))
		return plan{changed: []*authority{next, last}}, nil
	})
}

// Taint has everybody who holds a certificate under a retired root replace it
// at once.
func (a *Authority) Taint(ctx context.Context, id string, o Order) error {
	return a.move(ctx, o, "root.taint", func(v *view) (plan, error) {
		one, err := v.inState(id, Tainted, Retired)
		if err != nil {
			return plan{}, err
		}
		return plan{changed: []*authority{one.in(Tainted)}}, nil
	})
}

// Revoke takes a root that does not sign out of the bundle for ever and
// destroys its key. The record stays.
func (a *Authority) Revoke(ctx context.Context, id string, o Order) error {
	return a.move(ctx, o, "root.revoke", func(v *view) (plan, error) {
		one, err := v.inState(id, Revoked, Prepared, Retired, Tainted)
		if err != nil {
			return plan{}, err
		}
		gone := one.in(Revoked)
		gone.record.KeyRef = nil
		return plan{changed: []*authority{gone}, destroy: one.record.KeyRef}, nil
	})
}

// moveTries bounds the commits of a move that lose against others, such as a
// mark that another server raises.
const moveTries = 20

// move decides on the newest view, audits, and commits what was decided with
// the sequence that follows. When it returns, this server works with the
// result.
func (a *Authority) move(ctx context.Context, o Order, action string, decide func(*view) (plan, error)) error {
	if err := a.lock(ctx); err != nil {
		return err
	}
	defer a.unlock()
	if err := a.reloadLocked(ctx); err != nil {
		return err
	}
	for range moveTries {
		v := a.current.Load().view
		p, err := decide(v)
		if errors.Is(err, errMoved) {
			return nil
		}
		if err == nil {
			err = a.commitMove(ctx, v, p, o, action)
		}
		if errors.Is(err, fault.Conflict) {
			if err := a.reloadLocked(ctx); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			if aerr := a.auditMove(ctx, o, action, p, err); aerr != nil {
				return aerr
			}
			return err
		}
		failpoint.Hit(strings.ReplaceAll(action, ".", "_"))
		if err := a.reloadLocked(ctx); err != nil {
			return err
		}
		if p.destroy != nil {
			return a.keys.Destroy(ctx, p.destroy)
		}
		return nil
	}
	return fault.New(fault.NotReady, "store_busy", "the authority records change faster than they can be moved: try again")
}

// commitMove writes the line of the audit log and then the records, together
// with the sequence record: one commit (I3).
func (a *Authority) commitMove(ctx context.Context, v *view, p plan, o Order, action string) error {
	if err := a.auditMove(ctx, o, action, p, nil); err != nil {
		return err
	}
	asked := time.Now()
	for _, one := range p.changed {
		move := Move{To: one.record.State, At: asked.UTC().Truncate(time.Second), Sequence: v.sequence + 1, Operation: o.Operation, Who: o.Who, Reason: o.Reason}
		one.record.Moves = append(slices.Clone(one.record.Moves), move)
		one.record.Moves = one.record.Moves[max(0, len(one.record.Moves)-maxMoves):]
	}
	after := v.with(p.changed)
	var ifs []store.Precondition
	var writes []store.Write
	for _, one := range p.changed {
		key := rootPrefix + one.record.ID
		value, err := a.stamp.seal(key, one.record)
		if err != nil {
			return err
		}
		ifs = append(ifs, store.Precondition{Key: key, Revision: one.revision})
		writes = append(writes, store.Write{Key: key, Value: value})
	}
	value, err := a.stamp.seal(sequenceKey, nextSequence(v.sequence, after))
	if err != nil {
		return err
	}
	ifs = append(ifs, store.Precondition{Key: sequenceKey, Revision: v.sequenceRevision})
	writes = append(writes, store.Write{Key: sequenceKey, Value: value})
	if _, err := a.store.Commit(ctx, ifs, writes); err != nil {
		return err
	}
	a.hear(asked)
	for _, one := range p.changed {
		a.log.LogAttrs(ctx, slog.LevelWarn, "root moved", slog.String("authority_id", one.record.ID),
			slog.String("state", string(one.record.State)), slog.String("who", o.Who), slog.String("operation", o.Operation))
	}
	return nil
}

// auditMove records what is about to be done, or why it was not.
func (a *Authority) auditMove(ctx context.Context, o Order, action string, p plan, failed error) error {
	line := audit.Line{
		Origin: o.By, Action: action, Target: audit.Target{OperationID: o.Operation},
		Why: audit.Why{Rule: "operator", Reason: o.Reason}, Result: audit.Result{Code: "ok"},
	}
	if o.Forced {
		line.Why.Rule = "forced"
	}
	if len(p.changed) > 0 {
		line.Target.AuthorityID = p.changed[0].record.ID
	}
	if failed != nil {
		line.Result = audit.Result{Code: fault.KindOf(failed).Error(), Reason: fault.ReasonOf(failed)}
	}
	if err := a.audit.Record(ctx, line); err != nil {
		return fmt.Errorf("audit %s: %w", action, err)
	}
	return nil
}

// in returns a copy of the authority in another state.
func (one *authority) in(s State) *authority {
	changed := &authority{record: one.record, cert: one.cert, revision: one.revision}
	changed.record.State = s
	return changed
}

// inState finds an authority that may move to the state to: from one of the
// states from. It is errMoved if it is there already.
func (v *view) inState(id string, to State, from ...State) (*authority, error) {
	one := v.find(id)
	if one == nil {
		return nil, fault.Newf(fault.NotFound, "authority_unknown", "there is no root %q: see assay root status", id)
	}
	if one.record.State == to {
		return nil, errMoved
	}
	if !slices.Contains(from, one.record.State) {
		return nil, fault.Newf(fault.Precondition, "authority_state",
			"root %s is %s and can't become %s from there", id, one.record.State, to)
	}
	return one, nil
}

// with returns the authorities, sorted, with those in changed in their place.
func (v *view) with(changed []*authority) []*authority {
	all := slices.Clone(v.authorities)
	for _, one := range changed {
		if i := slices.IndexFunc(all, func(old *authority) bool { return old.record.ID == one.record.ID }); i >= 0 {
			all[i] = one
		} else {
			all = append(all, one)
		}
	}
	sortAuthorities(all)
	return all
}

// published is how many roots are in the bundle.
func (v *view) published() (n int) {
	for _, one := range v.authorities {
		if one.record.State.published() {
			n++
		}
	}
	return n
}

// madeBy finds the root that the operation has prepared.
func (v *view) madeBy(operation string) *authority {
	for _, one := range v.authorities {
		if operation != "" && one.record.Operation == operation {
			return one
		}
	}
	return nil
}

// handedUntil is when the last certificate ends that was handed out without a
// stream by now: its holder knows today's bundle and no later one.
func (v *view) handedUntil() (until time.Time) {
	for _, one := range v.authorities {
		if one.record.State.published() {
			until = latest(until, one.record.Marks.Handed)
		}
	}
	return until
}

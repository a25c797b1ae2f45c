package rotation

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/registry"
)

const (
	// lookEvery is how often a gate is judged: at first, since most fleets
	// answer in a moment, then less often, and how often somebody else may have
	// begun a rotation.
	lookEvery  = 200 * time.Millisecond
	lookSeldom = 2 * time.Second
	lookIdle   = 15 * time.Second
	patience   = 5 * time.Minute
	// emergencyShare is the part of an emergency's time that is given to agents
	// to take the new root before it signs.
	emergencyShare = 3
	// minDeadline is the shortest emergency: agents need a moment to hear.
	minDeadline = 10 * time.Second
	// maxMissed bounds how many are kept by name for each gate.
	maxMissed = 100
)

// Authority is the part of ca.Authority that a rotation moves.
type Authority interface {
	Authorities() []ca.Root
	Bundle() *ca.Bundle
	Prepare(ctx context.Context, o ca.Order) (ca.Root, error)
	Activate(ctx context.Context, id string, o ca.Order) error
	Taint(ctx context.Context, id string, o ca.Order) error
	Revoke(ctx context.Context, id string, o ca.Order) error
	LastOperation(ctx context.Context) (*ca.Operation, error)
	SaveOperation(ctx context.Context, o *ca.Operation) error
	Replacing(last *ca.Operation) *ca.Operation
}

// Auditor writes lines that are durable when Record returns.
type Auditor interface {
	Record(ctx context.Context, lines ...audit.Line) error
}

// Options are what a Rotator needs.
type Options struct {
	Authority Authority
	Fleet     func() []registry.AgentStatus
	// MaxTTL is the longest life of a workload's X.509-SVID.
	MaxTTL time.Duration
	// OwnAuthority is the root of the server's own certificate.
	OwnAuthority func() string
	// Automatic: a rotation begins by itself when a third of the active root's
	// life remains.
	Automatic bool
	// Clock is what the gates go by: a clock that is set ahead opens none. Nil:
	// the wall clock, whatever it shows.
	Clock *schedule.Clock
	Audit Auditor
	Log   *slog.Logger
	// Registerer, if there is one, gets the metrics.
	Registerer prometheus.Registerer
}

// Rotator drives the rotation under way and answers for its gates.
type Rotator struct {
	o Options

	mu      sync.Mutex
	last    ca.Operation  // as watchers know it
	changed chan struct{} // closed when last changes
	poke    chan struct{}
	stopped chan struct{} // closed when Run ends
}

// New returns a Rotator that drives nothing until Run.
func New(o Options) *Rotator {
	r := &Rotator{o: o, changed: make(chan struct{}), poke: make(chan struct{}, 1), stopped: make(chan struct{})}
	if o.Registerer != nil {
		o.Registerer.MustRegister(newMetrics(r))
	}
	return r
}

// Request is what an operator wants, and who it is.
type Request struct {
	By     audit.Origin
	Who    string
	Reason string
}

// Start begins a rotation of the active root. With a positive deadline it is
// an emergency: it ends by then, whoever is cut off. A rotation under way is
// not joined: that is rotation_in_progress.
func (r *Rotator) Start(ctx context.Context, by Request, deadline time.Duration) (Status, error) {
	if deadline != 0 && deadline < minDeadline {
		return Status{}, fault.Newf(fault.Invalid, "deadline_too_short", "an emergency rotation needs at least %v", minDeadline)
	}
	last, err := r.o.Authority.LastOperation(ctx)
	if err != nil {
		return Status{}, err
	}
	if err := r.mayStart(last); err != nil {
		return Status{}, r.refused(ctx, by, "rotation.start", err)
	}
	now := r.o.Clock.Now().UTC()
	op := r.o.Authority.Replacing(last)
	op.ID, op.StartedAt, op.Who, op.Reason = strings.ToLower(rand.Text()), now, by.Who, by.Reason
	if deadline > 0 {
		op.Deadline = now.Add(deadline)
	}
	return r.decided(ctx, by, "rotation.start", op)
}

func (r *Rotator) mayStart(last *ca.Operation) error {
	published := 0
	for _, root := range r.o.Authority.Authorities() {
		if root.State != ca.Revoked {
			published++
		}
	}
	switch {
	case last.UnderWay():
		return fault.Newf(fault.Conflict, "rotation_in_progress",
			"rotation %s, begun by %s at %s, is under way: follow it (assay root rotate --watch), or abort it", last.ID, last.Who, last.StartedAt.Format(time.RFC3339))
	case published > 1:
		return fault.New(fault.Precondition, "rotation_in_progress",
			"two roots are in the bundle already: activate and revoke them step by step, or revoke the prepared one (assay root status)")
	}
	return nil
}

// Abort takes the rotation under way back to the root that it began with, as
// long as that can still sign.
func (r *Rotator) Abort(ctx context.Context, by Request) (Status, error) {
	op, err := r.underWay(ctx)
	if err == nil && op.Abort == nil {
		if from := r.find(op.From); from.State != ca.Active && from.State != ca.Retired {
			err = fault.Newf(fault.Precondition, "abort_too_late", "the old root is %s already: the rotation can only go on", from.State)
		}
	}
	if err != nil {
		return Status{}, r.refused(ctx, by, "rotation.abort", err)
	}
	if op.Abort == nil {
		op.Abort = &ca.Decision{At: time.Now().UTC(), Who: by.Who, Reason: by.Reason}
	}
	return r.decided(ctx, by, "rotation.abort", op)
}

// Force opens the gate that the rotation under way waits at.
func (r *Rotator) Force(ctx context.Context, by Request) (Status, error) {
	op, err := r.underWay(ctx)
	if err == nil && by.Reason == "" {
		err = fault.New(fault.Invalid, "reason_missing", "say why the gate is forced: it goes into the audit log")
	}
	var at step
	if err == nil {
		if at = r.next(op); at.gate == "" {
			err = fault.New(fault.Precondition, "no_gate", "the rotation does not wait at a gate now")
		}
	}
	if err == nil && r.open(op, at, r.o.Clock.Now()) {
		return r.status(op), nil // that gate is open already
	}
	if err != nil {
		return Status{}, r.refused(ctx, by, "rotation.force", err)
	}
	op.Forced = append(op.Forced, ca.Decision{Gate: string(at.gate), At: time.Now().UTC(), Who: by.Who, Reason: by.Reason})
	return r.decided(ctx, by, "rotation.force", op)
}

func (r *Rotator) underWay(ctx context.Context) (*ca.Operation, error) {
	op, err := r.o.Authority.LastOperation(ctx)
	if err == nil && !op.UnderWay() {
		err = fault.New(fault.Precondition, "no_rotation", "no rotation is under way: see assay root status")
	}
	return op, err
}

// decided audits and stores what an operator decided, and has it acted upon.
func (r *Rotator) decided(ctx context.Context, by Request, action string, op *ca.Operation) (Status, error) {
	if err := r.audit(ctx, by.By, action, audit.Target{AuthorityID: op.From, OperationID: op.ID}, by.Reason, nil); err != nil {
		return Status{}, err
	}
	err := r.o.Authority.SaveOperation(ctx, op)
	if errors.Is(err, fault.Conflict) {
		err = fault.New(fault.Conflict, "rotation_in_progress", "somebody else was faster: look (assay root status), then decide anew")
	}
	if err != nil {
		return Status{}, r.refused(ctx, by, action, err)
	}
	failpoint.Hit(strings.ReplaceAll(action, ".", "_"))
	r.note(op)
	select {
	case r.poke <- struct{}{}:
	default:
	}
	return r.status(op), nil
}

// refused audits a refusal and returns it.
func (r *Rotator) refused(ctx context.Context, by Request, action string, err error) error {
	if aerr := r.audit(ctx, by.By, action, audit.Target{}, by.Reason, err); aerr != nil {
		return aerr
	}
	return err
}

func (r *Rotator) audit(ctx context.Context, by audit.Origin, action string, target audit.Target, reason string, err error) error {
	line := audit.Line{
		Origin: by, Action: action, Target: target,
		Why: audit.Why{Rule: "operator", Reason: reason}, Result: audit.Result{Code: "ok"},
	}
	if err != nil {
		line.Result = audit.Result{Code: fault.KindOf(err).Error(), Reason: fault.ReasonOf(err)}
	}
	return r.o.Audit.Record(context.WithoutCancel(ctx), line)
}

// note makes op what watchers see.
func (r *Rotator) note(op *ca.Operation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if op != nil {
		r.last = *op
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// Stopped is closed when nobody drives rotations any more: the server stops.
func (r *Rotator) Stopped() <-chan struct{} { return r.stopped }

func (r *Rotator) find(id string) ca.Root {
	for _, root := range r.o.Authority.Authorities() {
		if root.ID == id {
			return root
		}
	}
	return ca.Root{}
}

// world is what the gates look at now.
func (r *Rotator) world() World {
	return World{Now: r.o.Clock.Now(), Ahead: r.o.Clock.Step(), Fleet: r.o.Fleet(), MaxTTL: r.o.MaxTTL, OwnAuthority: r.o.OwnAuthority()}
}

package ca

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// operationKey names the record of the rotation under way, or of the last one.
const operationKey = "rotation/last"

// Operation is a rotation that goes on by itself until its end, over restarts
// and on any server. Which step is next follows from the states of its two
// roots; what is kept here is what was ordered, and what was decided on the
// way.
type Operation struct {
	ID        string    `json:"id"`
	StartedAt time.Time `json:"started_at"`
	Who       string    `json:"who"`
	Reason    string    `json:"reason"`
	// From is the root that is replaced; the one that replaces it is that whose
	// record names the operation.
	From string `json:"from"`
	// Deadline is set in an emergency: by then From is revoked, whoever still
	// needs it.
	Deadline time.Time `json:"deadline"`
	// Abort is set once the rotation is being taken back.
	Abort *Decision `json:"abort"`
	// Forced are the gates that an operator opened.
	Forced []Decision `json:"forced"`
	// Missed are those for whom a gate should have waited and did not, in an
	// emergency or because it was forced; at most maxMissed of each gate.
	Missed []string `json:"missed"`
	// EndedAt is zero while the rotation is under way.
	EndedAt time.Time `json:"ended_at"`
	Outcome string    `json:"outcome"` // "done" or "aborted"

	revision int64
}

// Decision is what an operator decided about a rotation under way.
type Decision struct {
	Gate   string    `json:"gate"` // "activate" or "revoke"; empty for an abort
	At     time.Time `json:"at"`
	Who    string    `json:"who"`
	Reason string    `json:"reason"`
}

// UnderWay says whether the operation has not come to its end.
func (o *Operation) UnderWay() bool { return o != nil && o.EndedAt.IsZero() }

// Same says whether two readings are of the same state of the same operation.
func (o *Operation) Same(other *Operation) bool {
	return o != nil && other != nil && o.ID == other.ID && o.revision == other.revision
}

// LastOperation returns the rotation that is under way or, if none is, the
// last one; nil if there never was one.
func (a *Authority) LastOperation(ctx context.Context) (*Operation, error) {
	record, err := a.store.Get(ctx, operationKey)
	if errors.Is(err, fault.NotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the rotation: %w", err)
	}
	var o Operation
	if err := a.stamp.open(operationKey, record.Value, &o); err != nil {
		return nil, err
	}
	o.revision = record.Revision
	return &o, nil
}

// SaveOperation writes an operation that LastOperation returned, or a new one
// if none is under way. If another server or operator was faster it is
// fault.Conflict: read again, decide anew.
func (a *Authority) SaveOperation(ctx context.Context, o *Operation) error {
	value, err := a.stamp.seal(operationKey, o)
	if err != nil {
		return err
	}
	revision, err := a.store.Commit(ctx,
		[]store.Precondition{{Key: operationKey, Revision: o.revision}},
		[]store.Write{{Key: operationKey, Value: value}})
	if err != nil {
		return fmt.Errorf("write the rotation: %w", err)
	}
	o.revision = revision
	return nil
}

// Replacing returns the operation that follows last and replaces the active
// root. It is not stored yet.
func (a *Authority) Replacing(last *Operation) *Operation {
	next := &Operation{From: a.current.Load().view.active.record.ID}
	if last != nil {
		next.revision = last.revision
	}
	return next
}

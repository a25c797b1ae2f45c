package api

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/server/audit"
)

const (
	// repeatAfter is how long the same refusal of the same caller is not
	// written again: a banned agent that keeps knocking makes one line of it.
	repeatAfter = time.Minute
	// maxRefused bounds both what waits to be written and what is remembered.
	maxRefused = 1024
)

// Refusals puts the refusals of the method tables into the audit log. The
// tables decide in the transport's reader, where nothing may block, so the
// lines are written a moment later; the refusal itself never waits for them.
type Refusals struct {
	audit Auditor
	log   *slog.Logger
	queue chan refused

	mu     sync.Mutex
	recent map[refusal]time.Time
}

// refusal is what makes two refusals the same.
type refusal struct {
	uid    uint32
	id     string
	reason string
}

// refused is one refusal that is to be written.
type refused struct {
	caller rpc.Caller
	err    error
}

// NewRefusals returns refusals that are written by Run.
func NewRefusals(log Auditor, logger *slog.Logger) *Refusals {
	return &Refusals{audit: log, log: logger, queue: make(chan refused, maxRefused), recent: map[refusal]time.Time{}}
}

// Report takes note of a refusal. It never blocks; it is a Refused.
func (r *Refusals) Report(c rpc.Caller, err error) {
	key := refusal{uid: c.UID, reason: fault.ReasonOf(err)}
	if !c.Local {
		key.id = c.ID.String()
	}
	if !r.first(key, time.Now()) {
		return
	}
	select {
	case r.queue <- refused{c, err}:
	default: // the log of the process has every refusal; the audit log has as many as it can take
	}
}

// ReportUnlisted is Report for calls of methods that are in no table: those of
// callers that are known, as strangers would fill the audit log.
func (r *Refusals) ReportUnlisted(c rpc.Caller, err error) {
	if c.Local || c.State == rpc.CertValid {
		r.Report(c, err)
	}
}

func (r *Refusals) first(key refusal, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if last, ok := r.recent[key]; ok && now.Sub(last) < repeatAfter {
		return false
	}
	if len(r.recent) >= maxRefused {
		clear(r.recent)
	}
	r.recent[key] = now
	return true
}

// Run writes what is reported until ctx ends, and then what is left.
func (r *Refusals) Run(ctx context.Context) error {
	for {
		select {
		case one := <-r.queue:
			r.write(ctx, one)
		case <-ctx.Done():
			for {
				select {
				case one := <-r.queue:
					r.write(ctx, one)
				default:
					return nil
				}
			}
		}
	}
}

func (r *Refusals) write(ctx context.Context, one refused) {
	line := audit.Line{
		Origin: audit.Origin{RequestID: one.caller.RequestID, Actor: actor(one.caller), From: one.caller.Addr},
		Action: "call.refuse",
		Why:    audit.Why{Rule: "method_table"},
		Result: result(one.err),
	}
	if err := r.audit.Record(context.WithoutCancel(ctx), line); err != nil {
		r.log.LogAttrs(ctx, slog.LevelError, "refusal is not in the audit log", slog.String("error", err.Error()))
	}
}

package api

import (
	"context"
	"fmt"
	"os"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/server/audit"
)

// Auditor is the audit log. Record returns when the lines are on disk.
type Auditor interface {
	Record(ctx context.Context, lines ...audit.Line) error
}

// origin says who called and from where, for the audit log.
func origin(ctx context.Context) audit.Origin {
	return audit.Origin{RequestID: rpc.RequestID(ctx), Actor: actor(rpc.CallerFrom(ctx)), From: rpc.CallerFrom(ctx).Addr}
}

func actor(c rpc.Caller) audit.Actor {
	switch {
	case c.Local:
		return audit.Actor{Kind: "operator", UID: &c.UID, GID: &c.GID, PID: c.PID, Exe: exeHint(c.PID)}
	case c.State == rpc.CertNone:
		return audit.Actor{Kind: "none"}
	case c.Operator:
		return audit.Actor{Kind: "operator", SPIFFEID: c.ID.String(), Serial: c.Serial}
	}
	return audit.Actor{Kind: "agent", SPIFFEID: c.ID.String(), Serial: c.Serial}
}

// exeHint is the path of the program that pid runs, if it can be read. A pid
// may be of another namespace or used again, so nothing is decided by it.
func exeHint(pid int32) string {
	if pid <= 0 {
		return ""
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return ""
	}
	return exe
}

// result is how err appears in the audit log.
func result(err error) audit.Result {
	if err == nil {
		return audit.Result{Code: "ok"}
	}
	out := audit.Result{Code: fault.KindOf(err).Error(), Reason: fault.ReasonOf(err)}
	if cause := fault.CauseOf(err); cause != out.Reason {
		out.Cause = cause
	}
	return out
}

// record writes lines about acts that are done, whether or not the caller
// still waits. If it fails, the handler must not answer: the caller learns that
// the act may have taken effect.
func record(ctx context.Context, log Auditor, lines ...audit.Line) error {
	err := log.Record(context.WithoutCancel(ctx), lines...)
	if err == nil {
		return nil
	}
	return fault.Wrap(fault.NotReady, err, fault.ReasonOf(err),
		"the audit log can't be written, so there is no answer: the action may have taken effect; mend the log, then look before you retry")
}

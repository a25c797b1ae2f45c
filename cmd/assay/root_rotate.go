package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

// rotationShape is a rotation in JSON. Phase is "preparing", "publishing",
// "reissuing", "aborting", "done" or "aborted"; Gate is "activate", "revoke" or
// empty.
type rotationShape struct {
	OperationID string      `json:"operation_id"`
	Phase       string      `json:"phase"`
	From        string      `json:"from"`
	To          string      `json:"to"`
	StartedAt   *time.Time  `json:"started_at"`
	EndedAt     *time.Time  `json:"ended_at"`
	Deadline    *time.Time  `json:"deadline"`
	Who         string      `json:"who"`
	Reason      string      `json:"reason"`
	Gate        string      `json:"gate"`
	Agents      uint32      `json:"agents"`
	Ready       uint32      `json:"ready"`
	Waits       []waitShape `json:"waits"`
	Missed      []string    `json:"missed"`
}

// waitShape is one thing that a gate waits for. AgentID is empty if it is no
// agent; Until is null if nobody knows when it is over.
type waitShape struct {
	AgentID string     `json:"agent_id"`
	Why     string     `json:"why"`
	Until   *time.Time `json:"until"`
}

func rotationFromProto(r *adminv1.RotationStatus) rotationShape {
	out := rotationShape{
		OperationID: r.GetOperationId(), Phase: r.GetPhase(), From: r.GetFrom(), To: r.GetTo(),
		StartedAt: momentOf(r.GetStartedAt()), EndedAt: momentOf(r.GetEndedAt()), Deadline: momentOf(r.GetDeadline()),
		Who: r.GetWho(), Reason: r.GetReason(), Gate: r.GetGate(), Agents: r.GetAgents(), Ready: r.GetReady(),
		Waits: []waitShape{}, Missed: list(r.GetMissed()),
	}
	for _, w := range r.GetWaits() {
		out.Waits = append(out.Waits, waitShape{AgentID: w.GetAgentId(), Why: w.GetWhy(), Until: momentOf(w.GetUntil())})
	}
	return out
}

func (r rotationShape) over() bool { return r.EndedAt != nil }

// rotateFlags are those of `root rotate`.
type rotateFlags struct {
	yes, detach, watch, emergency, force bool
	deadline                             time.Duration
	reason                               string
}

func newRootRotateCommand(t *tool) *cobra.Command {
	var f rotateFlags
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Replace the root of the running fleet without cutting anybody off",
		Long: `Replace the active root: a new one is made and published; when every agent serves
it, it signs; everything under the old one is replaced within minutes; when
nothing under it is in use any more, it goes. The server does all that by
itself, also over a restart: this command shows how it goes, and can be ended
and called again with --watch.

An agent that does not answer is waited for, and named. To go on without it ban
it, or pass the gate with --force and a reason. assay root abort takes the
rotation back as long as that is safe.

--emergency is for a root whose key may be in other hands: everything is
replaced at once, and at the deadline the old root goes, whoever still needs it.

  $ assay root rotate --reason "yearly rotation"
  $ assay root rotate --emergency --deadline 10m --reason "key exposed" --yes
  $ assay root rotate --watch`,
		Args: noArgs,
	}
	cmd.RunE = t.localVerb(func(ctx context.Context, s *serverConn, _ []string) error {
		if err := f.check(); err != nil {
			return err
		}
		return t.rotateRoot(ctx, s, f)
	})
	fl := cmd.Flags()
	fl.BoolVar(&f.yes, "yes", false, "don't ask")
	fl.BoolVar(&f.detach, "detach", false, "return once it has begun")
	fl.BoolVar(&f.watch, "watch", false, "begin nothing: show the rotation that is under way, or the last one")
	fl.BoolVar(&f.emergency, "emergency", false, "replace everything at once, and end by --deadline")
	fl.DurationVar(&f.deadline, "deadline", 10*time.Minute, "when an emergency ends, from now")
	fl.BoolVar(&f.force, "force", false, "begin nothing: open the gate that the rotation waits at; needs --reason")
	fl.StringVar(&f.reason, "reason", "", "why: kept with the root, and in the audit log")
	return t.localFlags(cmd)
}

func (f rotateFlags) check() error {
	switch {
	case f.watch && (f.emergency || f.force || f.detach):
		return usageError("--watch only looks: it goes with no other flag")
	case f.force && f.emergency:
		return usageError("--force is about the rotation under way, --emergency begins one")
	case f.force && f.reason == "":
		return usageError("--force needs --reason: it goes into the audit log")
	case f.emergency && f.deadline <= 0:
		return usageError("--deadline is a time from now, as in 10m")
	}
	return nil
}

func (t *tool) rotateRoot(ctx context.Context, s *serverConn, f rotateFlags) error {
	if !f.watch {
		begun, err := t.orderRotation(ctx, s, f)
		if err != nil {
			return err
		}
		if f.detach {
			return t.print(begun, begun.write)
		}
	}
	return t.watchRotation(ctx, s)
}

// orderRotation begins a rotation or opens the gate of the one under way.
func (t *tool) orderRotation(ctx context.Context, s *serverConn, f rotateFlags) (rotationShape, error) {
	question := "Replace the root of the trust domain?"
	switch {
	case f.force:
		question = "Pass the gate, although that cuts somebody off?"
	case f.emergency:
		question = fmt.Sprintf("Replace the root, and cut off in %v whoever still needs the old one?", f.deadline)
	}
	if err := t.confirm(f.yes, question); err != nil {
		return rotationShape{}, err
	}
	if f.force {
		resp, err := ask(ctx, s, s.rotation.ForceRotation, &adminv1.ForceRotationRequest{Reason: f.reason})
		return rotationFromProto(resp.GetRotation()), err
	}
	req := &adminv1.StartRotationRequest{Reason: f.reason}
	if f.emergency {
		req.Deadline = durationpb.New(f.deadline)
	}
	resp, err := ask(ctx, s, s.rotation.StartRotation, req)
	return rotationFromProto(resp.GetRotation()), err
}

func newRootAbortCommand(t *tool) *cobra.Command {
	var yes bool
	var reason string
	cmd := &cobra.Command{
		Use:   "abort",
		Short: "Take the rotation under way back to the old root",
		Long: `Take the rotation under way back: the old root signs (again), and the new one goes
when nothing under it is in use. It is refused once the old root is tainted or
gone.

  $ assay root abort --reason "wrong day"`,
		Args: noArgs,
	}
	cmd.RunE = t.localVerb(func(ctx context.Context, s *serverConn, _ []string) error {
		if err := t.confirm(yes, "Take the rotation back?"); err != nil {
			return err
		}
		if _, err := ask(ctx, s, s.rotation.AbortRotation, &adminv1.AbortRotationRequest{Reason: reason}); err != nil {
			return err
		}
		return t.watchRotation(ctx, s)
	})
	cmd.Flags().BoolVar(&yes, "yes", false, "don't ask")
	cmd.Flags().StringVar(&reason, "reason", "", "why: goes into the audit log")
	return t.localFlags(cmd)
}

// watchRotation shows the rotation until it ends, over restarts of the server.
func (t *tool) watchRotation(ctx context.Context, s *serverConn) error {
	view := &rotationView{t: t}
	for {
		err := view.follow(ctx, s)
		switch {
		case err == nil:
			return t.print(view.last, view.last.write)
		case ctx.Err() != nil:
			return fault.New(fault.NotReady, "interrupted", "the rotation goes on without this command: follow it with assay root rotate --watch")
		case fault.KindOf(err) != fault.NotReady || view.last.OperationID == "":
			return err
		}
		// The server restarts; it will go on where it was.
		view.note("the server is away: waiting for it")
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

// rotationView tells whoever waits how a rotation goes: on a terminal the last
// line changes in place, else there is a line for each change.
type rotationView struct {
	t    *tool
	last rotationShape
	line string
}

func (v *rotationView) follow(ctx context.Context, s *serverConn) error {
	stream, err := s.rotation.WatchRotation(ctx, &adminv1.WatchRotationRequest{})
	if err != nil {
		return callError(ctx, err, s.peer)
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			v.clear()
			return nil
		}
		if err != nil {
			return callError(ctx, err, s.peer)
		}
		v.last = rotationFromProto(resp.GetRotation())
		if !v.last.over() {
			v.note(v.last.line(time.Now()))
		}
	}
}

// note shows a line, unless it stands there already.
func (v *rotationView) note(line string) {
	if line == v.line {
		return
	}
	if v.t.isTTY {
		_, _ = fmt.Fprintf(v.t.stderr, "\r\x1b[K%s", line)
	} else {
		_, _ = fmt.Fprintln(v.t.stderr, line)
	}
	v.line = line
}

func (v *rotationView) clear() {
	if v.t.isTTY && v.line != "" {
		_, _ = fmt.Fprint(v.t.stderr, "\r\x1b[K")
	}
	v.line = ""
}

// mostWaits is how many of those that it waits for a line names.
const mostWaits = 2

// line says in one line how a rotation stands.
func (r rotationShape) line(now time.Time) string {
	out := r.Phase
	if r.Gate != "" {
		out += fmt.Sprintf(": %d of %d agents", r.Ready, r.Agents)
	}
	for i, w := range r.Waits {
		if i == mostWaits {
			out += fmt.Sprintf("; and %d more", len(r.Waits)-i)
			break
		}
		sep := "; "
		if i == 0 {
			sep = ", waits for "
		}
		out += sep + plain(strings.TrimSpace(w.AgentID+" "+w.Why))
	}
	if r.Deadline != nil {
		out += fmt.Sprintf(" (%v left)", max(0, r.Deadline.Sub(now)).Round(time.Second))
	}
	return out
}

func (r rotationShape) write(w io.Writer) error {
	rows := table{}
	rows.add("rotation", r.OperationID)
	rows.add("phase", r.Phase)
	rows.add("from root", r.From)
	rows.add("to root", r.To)
	rows.add("begun", stampOf(r.StartedAt)+", by "+r.Who)
	if r.Reason != "" {
		rows.add("reason", r.Reason)
	}
	if r.Deadline != nil {
		rows.add("deadline", stampOf(r.Deadline))
	}
	if r.EndedAt != nil {
		rows.add("ended", stampOf(r.EndedAt))
	}
	if r.Gate != "" {
		rows.add("ready", fmt.Sprintf("%d of %d agents, before it may %s", r.Ready, r.Agents, r.Gate))
	}
	for _, wait := range r.Waits {
		text := strings.TrimSpace(wait.AgentID + " " + wait.Why)
		if wait.Until != nil {
			text += "; until " + stampOf(wait.Until) + " at the latest"
		}
		rows.add("waits for", text)
	}
	for _, who := range r.Missed {
		rows.add("not waited for", who)
	}
	return rows.write(w)
}

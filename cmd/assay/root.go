package main

import (
	"context"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

// rootRecordShape is one root with what became of it. HandedUntil is null when
// nothing was handed out under it without an agent.
type rootRecordShape struct {
	authorityShape
	PublishedSequence uint64          `json:"published_sequence"`
	StreamUntil       *time.Time      `json:"stream_until"`
	HandedUntil       *time.Time      `json:"handed_until"`
	Moves             []rootMoveShape `json:"moves"`
}

// rootMoveShape is one change of a root's state.
type rootMoveShape struct {
	State          string     `json:"state"`
	At             *time.Time `json:"at"`
	BundleSequence uint64     `json:"bundle_sequence"`
	OperationID    string     `json:"operation_id"`
	Who            string     `json:"who"`
	Reason         string     `json:"reason"`
}

// rootStatusShape is what `root status -o json` prints. Rotation is null if
// there never was one.
type rootStatusShape struct {
	Roots    []rootRecordShape `json:"roots"`
	Rotation *rotationShape    `json:"rotation"`
}

func rootFromProto(r *adminv1.Root) rootRecordShape {
	out := rootRecordShape{
		authorityShape: authorityFromProto(r.GetAuthority()), PublishedSequence: r.GetPublished(),
		StreamUntil: momentOf(r.GetStreamUntil()), HandedUntil: momentOf(r.GetHandedUntil()), Moves: []rootMoveShape{},
	}
	for _, m := range r.GetMoves() {
		out.Moves = append(out.Moves, rootMoveShape{
			State: m.GetState(), At: momentOf(m.GetAt()), BundleSequence: m.GetBundleSequence(),
			OperationID: m.GetOperationId(), Who: m.GetWho(), Reason: m.GetReason(),
		})
	}
	return out
}

func newRootCommand(t *tool) *cobra.Command {
	return group("root", "Roots of the trust domain: look at them, and replace them safely",
		newRootStatusCommand(t), newRootRotateCommand(t), newRootAbortCommand(t),
		newRootPrepareCommand(t), newRootActivateCommand(t), newRootTaintCommand(t), newRootRevokeCommand(t))
}

func newRootStatusCommand(t *tool) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the roots, what became of them, and the rotation",
		Long: `Show every root with its state and history, and the rotation that is under way
or was the last one, with what it waits for.

  $ assay root status
  $ assay root status -o json | jq '.rotation.waits'`,
		Args: noArgs,
		RunE: t.serverVerb(func(ctx context.Context, s *serverConn, _ []string) error {
			resp, err := ask(ctx, s, s.rotation.ListRoots, &adminv1.ListRootsRequest{})
			if err != nil {
				return err
			}
			shape := rootStatusShape{Roots: []rootRecordShape{}}
			for _, r := range resp.GetRoots() {
				shape.Roots = append(shape.Roots, rootFromProto(r))
			}
			if r := resp.GetRotation(); r != nil {
				rotation := rotationFromProto(r)
				shape.Rotation = &rotation
			}
			return t.print(shape, shape.write)
		}),
	}
	return t.serverFlags(cmd)
}

func (s rootStatusShape) write(w io.Writer) error {
	roots := table{header: []string{"ROOT", "STATE", "LIVE SVIDS", "ENDS", "SINCE", "BY", "REASON"}}
	for _, r := range s.Roots {
		last := rootMoveShape{At: r.CreatedAt}
		if n := len(r.Moves); n > 0 {
			last = r.Moves[n-1]
		}
		roots.add(r.ID, r.State, strconv.FormatUint(r.LiveSVIDs, 10), stampOf(r.NotAfter), stampOf(last.At), last.Who, last.Reason)
	}
	if err := roots.write(w); err != nil || s.Rotation == nil {
		return err
	}
	if _, err := io.WriteString(w, "\n"); err != nil {
		return err
	}
	return s.Rotation.write(w)
}

// stepFlags are those of a single step.
type stepFlags struct {
	yes, force bool
	reason     string
}

func newRootPrepareCommand(t *tool) *cobra.Command {
	return newRootStepCommand(t, adminv1.MoveRootRequest_STEP_PREPARE, &cobra.Command{
		Use:   "prepare",
		Short: "Make a new root and publish it; it does not sign yet",
		Long: `Make a new root and put it into the bundle. It signs nothing until it is
activated. This is the first step of a rotation by hand; assay root rotate makes
all of them.

  $ assay root prepare --reason "yearly rotation"`,
		Args: noArgs,
	}, "", "")
}

func newRootActivateCommand(t *tool) *cobra.Command {
	return newRootStepCommand(t, adminv1.MoveRootRequest_STEP_ACTIVATE, &cobra.Command{
		Use:   "activate [ID]",
		Short: "Let the prepared root sign",
		Long: `Let the prepared root sign from now on; the active one is retired. It is refused
while an agent, or somebody who was handed a certificate without one, may not
have the new root yet, and says who that is. Without ID the prepared one is
meant.

  $ assay root activate
  $ assay root activate --force --reason "node-7 is gone for good"`,
		Args: cobra.MaximumNArgs(1),
	}, "", "pass although somebody does not have the root yet, and is cut off; needs --reason")
}

func newRootTaintCommand(t *tool) *cobra.Command {
	return newRootStepCommand(t, adminv1.MoveRootRequest_STEP_TAINT, &cobra.Command{
		Use:   "taint [ID]",
		Short: "Have everything under the retired root replaced at once",
		Long: `Have agents replace at once what they hold under the retired root, instead of
within minutes. A tainted root can't sign again. Without ID the retired one is
meant.

  $ assay root taint`,
		Args: cobra.MaximumNArgs(1),
	}, "Taint the retired root, so that it can never sign again?", "")
}

func newRootRevokeCommand(t *tool) *cobra.Command {
	return newRootStepCommand(t, adminv1.MoveRootRequest_STEP_REVOKE, &cobra.Command{
		Use:   "revoke [ID]",
		Short: "Take a root that does not sign out of the bundle, and destroy its key",
		Long: `Take the retired or tainted root out of the bundle for ever and destroy its key.
It is refused while somebody holds a certificate under it, and says who and until
when. With the ID of a prepared root it takes that one back.

  $ assay root revoke --yes`,
		Args: cobra.MaximumNArgs(1),
	}, "Revoke the root and destroy its key?", "pass although certificates under it are in use, and cut their holders off; needs --reason")
}

// newRootStepCommand makes a verb for a single step. question is asked before
// what can't be undone; force explains --force, where there is a gate.
func newRootStepCommand(t *tool, step adminv1.MoveRootRequest_Step, cmd *cobra.Command, question, force string) *cobra.Command {
	var f stepFlags
	cmd.RunE = t.localVerb(func(ctx context.Context, s *serverConn, args []string) error {
		if f.force && f.reason == "" {
			return usageError("--force needs --reason: it goes into the audit log")
		}
		if question != "" || f.force {
			ask := question
			if f.force {
				ask = "Pass the gate, although that cuts somebody off?"
			}
			if err := t.confirm(f.yes, ask); err != nil {
				return err
			}
		}
		req := &adminv1.MoveRootRequest{Step: step, Force: f.force, Reason: f.reason}
		if len(args) == 1 {
			req.Id = args[0]
		}
		resp, err := ask(ctx, s, s.rotation.MoveRoot, req)
		if err != nil {
			return err
		}
		root := rootFromProto(resp.GetRoot())
		return t.print(root, root.write)
	})
	fl := cmd.Flags()
	fl.StringVar(&f.reason, "reason", "", "why: kept with the root, and in the audit log")
	if question != "" || force != "" {
		fl.BoolVar(&f.yes, "yes", false, "don't ask")
	}
	if force != "" {
		fl.BoolVar(&f.force, "force", false, force)
	}
	return t.localFlags(cmd)
}

func (r rootRecordShape) write(w io.Writer) error {
	rows := table{}
	rows.add("root", r.ID)
	rows.add("state", r.State)
	rows.add("ends", stampOf(r.NotAfter))
	rows.add("pin", r.Pin)
	rows.add("in the bundle since", "sequence "+strconv.FormatUint(r.PublishedSequence, 10))
	return rows.write(w)
}

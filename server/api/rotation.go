package api

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/rotation"
)

const (
	// showEvery is how often a watcher hears of a rotation that waits.
	showEvery = time.Second
	// maxReason bounds what an operator may put into records and audit lines.
	maxReason = 512
)

// RotationService replaces roots, for operators on the server's host.
type RotationService struct {
	adminv1.UnimplementedRotationServer
	authority *ca.Authority
	rotator   *rotation.Rotator
	fleet     func() []registry.AgentStatus
}

// NewRotationService returns the service.
func NewRotationService(authority *ca.Authority, rotator *rotation.Rotator, fleet func() []registry.AgentStatus) *RotationService {
	return &RotationService{authority: authority, rotator: rotator, fleet: fleet}
}

// StartRotation implements adminv1.RotationServer.
func (s *RotationService) StartRotation(ctx context.Context, req *adminv1.StartRotationRequest) (*adminv1.StartRotationResponse, error) {
	by, err := request(ctx, req.GetReason())
	if err != nil {
		return nil, err
	}
	deadline := time.Duration(0)
	if d := req.GetDeadline(); d != nil {
		if d.CheckValid() != nil || d.AsDuration() <= 0 {
			return nil, fault.New(fault.Invalid, "deadline_invalid", "the deadline is a positive time from now, such as 10m")
		}
		deadline = d.AsDuration()
	}
	st, err := s.rotator.Start(ctx, by, deadline)
	if err != nil {
		return nil, err
	}
	return &adminv1.StartRotationResponse{Rotation: rotationToProto(st)}, nil
}

// AbortRotation implements adminv1.RotationServer.
func (s *RotationService) AbortRotation(ctx context.Context, req *adminv1.AbortRotationRequest) (*adminv1.AbortRotationResponse, error) {
	by, err := request(ctx, req.GetReason())
	if err != nil {
		return nil, err
	}
	st, err := s.rotator.Abort(ctx, by)
	if err != nil {
		return nil, err
	}
	return &adminv1.AbortRotationResponse{Rotation: rotationToProto(st)}, nil
}

// ForceRotation implements adminv1.RotationServer.
func (s *RotationService) ForceRotation(ctx context.Context, req *adminv1.ForceRotationRequest) (*adminv1.ForceRotationResponse, error) {
	by, err := request(ctx, req.GetReason())
	if err != nil {
		return nil, err
	}
	st, err := s.rotator.Force(ctx, by)
	if err != nil {
		return nil, err
	}
	return &adminv1.ForceRotationResponse{Rotation: rotationToProto(st)}, nil
}

// WatchRotation implements adminv1.RotationServer.
func (s *RotationService) WatchRotation(_ *adminv1.WatchRotationRequest, stream grpc.ServerStreamingServer[adminv1.WatchRotationResponse]) error {
	tick := time.NewTicker(showEvery)
	defer tick.Stop()
	for {
		changed := s.rotator.Changed()
		st, err := s.rotator.Status(stream.Context())
		if err != nil {
			return err
		}
		if st.Operation == nil {
			return fault.New(fault.NotFound, "no_rotation", "there was no rotation yet: begin one with assay root rotate")
		}
		if err := stream.Send(&adminv1.WatchRotationResponse{Rotation: rotationToProto(st)}); err != nil {
			return err
		}
		if !st.Operation.UnderWay() {
			return nil
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-s.rotator.Stopped():
			return errStopping()
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// ListRoots implements adminv1.RotationServer.
func (s *RotationService) ListRoots(ctx context.Context, _ *adminv1.ListRootsRequest) (*adminv1.ListRootsResponse, error) {
	st, err := s.rotator.Status(ctx)
	if err != nil {
		return nil, err
	}
	resp := &adminv1.ListRootsResponse{}
	live := registry.LiveUnder(s.fleet(), time.Now())
	for _, root := range s.authority.Authorities() {
		shown := rootToProto(root)
		shown.Authority.LiveSvids = live[root.ID]
		resp.Roots = append(resp.Roots, shown)
	}
	if st.Operation != nil {
		resp.Rotation = rotationToProto(st)
	}
	return resp, nil
}

// MoveRoot implements adminv1.RotationServer.
func (s *RotationService) MoveRoot(ctx context.Context, req *adminv1.MoveRootRequest) (*adminv1.MoveRootResponse, error) {
	by, err := request(ctx, req.GetReason())
	if err != nil {
		return nil, err
	}
	var root ca.Root
	switch req.GetStep() {
	case adminv1.MoveRootRequest_STEP_PREPARE:
		root, err = s.rotator.Prepare(ctx, by)
	case adminv1.MoveRootRequest_STEP_ACTIVATE:
		root, err = s.rotator.Activate(ctx, by, req.GetId(), req.GetForce())
	case adminv1.MoveRootRequest_STEP_TAINT:
		root, err = s.rotator.Taint(ctx, by, req.GetId())
	case adminv1.MoveRootRequest_STEP_REVOKE:
		root, err = s.rotator.Revoke(ctx, by, req.GetId(), req.GetForce())
	default:
		err = fault.New(fault.Invalid, "step_unknown", "the step is one of prepare, activate, taint and revoke")
	}
	if err != nil {
		return nil, err
	}
	return &adminv1.MoveRootResponse{Root: rootToProto(root)}, nil
}

// request says who asks, and why.
func request(ctx context.Context, reason string) (rotation.Request, error) {
	if len(reason) > maxReason {
		return rotation.Request{}, fault.Newf(fault.Invalid, "reason_too_long", "the reason may have %d bytes", maxReason)
	}
	for _, c := range reason {
		if c < ' ' || c == 0x7f {
			return rotation.Request{}, fault.New(fault.Invalid, "reason_invalid", "the reason is one line of text")
		}
	}
	who := rpc.CallerFrom(ctx)
	by := rotation.Request{By: origin(ctx), Who: who.ID.String(), Reason: reason}
	if who.Local {
		by.Who = fmt.Sprintf("uid %d", who.UID)
	}
	return by, nil
}

func rotationToProto(st rotation.Status) *adminv1.RotationStatus {
	op := st.Operation
	out := &adminv1.RotationStatus{
		OperationId: op.ID, Phase: string(st.Phase), From: op.From, To: st.To,
		StartedAt: stamp(op.StartedAt), EndedAt: stamp(op.EndedAt), Deadline: stamp(op.Deadline),
		Who: op.Who, Reason: op.Reason, Gate: string(st.Gate), Agents: uint32(st.Agents), Ready: uint32(st.Ready), Missed: op.Missed,
	}
	for _, w := range st.Waits {
		out.Waits = append(out.Waits, &adminv1.GateWait{AgentId: w.AgentID, Why: w.Why, Until: stamp(w.Until)})
	}
	return out
}

func rootToProto(root ca.Root) *adminv1.Root {
	out := &adminv1.Root{
		Authority: authorityToProto(root), StreamUntil: stamp(root.StreamUntil), HandedUntil: stamp(root.HandedUntil), Published: root.Published,
	}
	for _, m := range root.Moves {
		out.Moves = append(out.Moves, &adminv1.RootMove{
			State: string(m.To), At: stamp(m.At), BundleSequence: m.Sequence, OperationId: m.Operation, Who: m.Who, Reason: m.Reason,
		})
	}
	return out
}

package api

import (
	"context"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	"github.com/seed-caa81108/assay/server/registry"
)

const (
	// maxWaits bounds the calls of Wait at a time.
	maxWaits = 64
	// maxBehind is how many agents one message names.
	maxBehind = 32
	// waitPace is how soon after a message the next one may follow, unless it
	// is the last: a fleet reports faster than anybody reads.
	waitPace = 250 * time.Millisecond
	// waitGather is how long reports wait for each other before they are counted.
	waitGather = 10 * time.Millisecond
)

// Wait implements adminv1.AdminServer.
func (s *AdminService) Wait(req *adminv1.WaitRequest, stream grpc.ServerStreamingServer[adminv1.WaitResponse]) error {
	select {
	case s.waits <- struct{}{}:
		defer func() { <-s.waits }()
	default:
		return fault.Newf(fault.Exhausted, "limit_waits", "%d calls wait for revisions already: end one of them", maxWaits)
	}
	revision := req.GetRevision()
	switch {
	case revision < 0:
		return fault.New(fault.Invalid, "revision_invalid", "a revision is positive; leave it out for the newest")
	case revision == 0:
		revision = s.cfg.Registry.Revision()
	}
	if err := s.waitHere(stream, revision); err != nil {
		return err
	}
	if !req.GetAllAgents() {
		return stream.Send(&adminv1.WaitResponse{Revision: revision, ServerRevision: s.cfg.Registry.Revision(), Reached: true})
	}
	return s.waitForAgents(stream, revision)
}

// waitHere waits until this server has applied the revision.
func (s *AdminService) waitHere(stream grpc.ServerStreamingServer[adminv1.WaitResponse], revision int64) error {
	if have := s.cfg.Registry.Revision(); have < revision {
		if err := stream.Send(&adminv1.WaitResponse{Revision: revision, ServerRevision: have}); err != nil {
			return err
		}
	}
	reached, forget := s.cfg.Registry.Reached(revision)
	defer forget()
	select {
	case <-reached:
		return nil
	case <-s.cfg.Stopping:
		return errStopping()
	case <-stream.Context().Done():
		return errCallEnded(stream.Context())
	}
}

// waitForAgents tells who is behind until nobody is.
func (s *AdminService) waitForAgents(stream grpc.ServerStreamingServer[adminv1.WaitResponse], revision int64) error {
	reach := s.cfg.Registry.Reach(revision)
	defer reach.Close()
	recheck := time.NewTicker(recheckEvery) // for what is no news: bans, and certificates that end
	defer recheck.Stop()
	told, sent := -1, time.Time{}
	for {
		lags := reach.Lagging()
		if len(lags) == 0 || len(lags) != told && time.Since(sent) >= waitPace {
			if err := stream.Send(s.waitResponse(revision, reach.Counted(), lags)); err != nil || len(lags) == 0 {
				return err
			}
			told, sent = len(lags), time.Now()
		}
		if err := s.news(stream.Context(), reach, recheck.C); err != nil {
			return err
		}
	}
}

// news returns when it is time to look again.
func (s *AdminService) news(ctx context.Context, reach *registry.Reach, recheck <-chan time.Time) error {
	select {
	case <-reach.News():
	case <-recheck:
		return nil
	case <-s.cfg.Stopping:
		return errStopping()
	case <-ctx.Done():
		return errCallEnded(ctx)
	}
	timer := time.NewTimer(waitGather)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	return nil
}

func errCallEnded(ctx context.Context) error {
	return fault.Wrap(fault.NotReady, ctx.Err(), "request_ended", "the request ended before its answer")
}

func (s *AdminService) waitResponse(revision int64, counted int, lags []registry.Lag) *adminv1.WaitResponse {
	resp := &adminv1.WaitResponse{
		Revision: revision, ServerRevision: s.cfg.Registry.Revision(), Reached: len(lags) == 0,
		Agents: uint32(counted), Waiting: uint32(len(lags)),
	}
	for _, lag := range lags[:min(len(lags), maxBehind)] {
		resp.WaitingAgents = append(resp.WaitingAgents, &adminv1.WaitingAgent{
			Id: lag.ID.String(), Connected: lag.Connected, LastSeen: stamp(lag.LastSeen), Revision: lag.Revision,
		})
	}
	return resp
}

// tellRevision adds to the answer of a call a revision that has all that it
// speaks of.
func tellRevision(ctx context.Context, r *registry.Registry) {
	// It fails only outside of a call, where there is nobody to tell.
	_ = grpc.SetTrailer(ctx, metadata.Pairs(adminv1.RevisionMetadata, strconv.FormatInt(r.Revision(), 10)))
}

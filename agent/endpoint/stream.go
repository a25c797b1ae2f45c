package endpoint

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// workloadAPI implements the SPIFFE Workload API. The profiles that are not
// built answer Unimplemented (WL-20) before they get here.
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	server *Server
}

// FetchX509SVID implements the Workload API's X.509 profile.
func (w workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return w.server.follow(stream, x509SVIDs)
}

// FetchX509Bundles gives bundles to those who have an identity, as nobody else
// has a use for them here (WL-50).
func (w workloadAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return w.server.follow(stream, x509Bundles)
}

var (
	errShutdown = fault.New(fault.NotReady, "shutting_down", "the agent is shutting down: retry")
	errStalled  = fault.New(fault.NotReady, "stream_stalled", "the stream took no message for too long: read from it, and retry")
)

// errInterrupted ends a handler whose client has left; hardly anybody reads it.
var errInterrupted = fault.New(fault.NotReady, "interrupted", "the call was interrupted: retry")

// counted is the interceptor that serves callers within their limits. A stream
// counts from its headers on: its request may never come.
func (s *Server) counted(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx := stream.Context()
	who, err := callerFrom(ctx)
	if err != nil {
		s.metrics.denied(err)
		return err
	}
	uid := who.Caller().UID
	if !s.gate.take(uid, streams, 1) {
		s.metrics.denied(errShed)
		return errShed
	}
	defer s.gate.give(uid, streams, 1)
	switch err = handler(srv, stream); {
	case err == nil:
		return nil
	case ctx.Err() == nil:
		s.metrics.denied(err)
		return err
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return errInterrupted // may still be ahead of the client's own timer
	}
	return nil
}

// follow is the one way of every stream: caller -> subscription -> message.
func (s *Server) follow(stream grpc.ServerStream, p *profile) error {
	who, err := callerFrom(stream.Context())
	if err != nil {
		return err
	}
	open := s.metrics.streams.WithLabelValues(p.method)
	open.Inc()
	defer open.Dec()
	process, err := who.Selectors(stream.Context())
	if err != nil {
		return err
	}
	sub := s.subscribe(process)
	defer sub.Close()
	f := &follower{server: s, stream: stream, profile: p, who: who, sub: sub}
	snap, err := f.first()
	for err == nil {
		if err = f.deliver(snap); err == nil {
			snap, err = f.next()
		}
	}
	if fault.KindOf(err) == fault.Denied {
		s.explain(stream.Context(), who, sub.Selectors())
	}
	return err
}

// explain logs what a denied caller looks like, for whoever writes its entry.
// Selectors tell about other users' processes: the log has them on demand only.
func (s *Server) explain(ctx context.Context, who *caller, selectors selector.Set) {
	if !s.log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	texts := make([]string, 0, len(selectors))
	for _, one := range selectors {
		texts = append(texts, one.String())
	}
	c := who.Caller()
	s.log.LogAttrs(ctx, slog.LevelDebug, "selectors of a denied caller", slog.String("request_id", rpc.RequestID(ctx)),
		slog.Uint64("uid", uint64(c.UID)), slog.Int64("pid", int64(c.PID)), slog.Any("selectors", texts))
}

// follower is one stream at work.
type follower struct {
	server  *Server
	stream  grpc.ServerStream
	profile *profile
	who     *caller
	sub     Subscription
	// last is what the client has, nil before the first message.
	last *message
	// waiting is when the stream began to wait for the snapshot at hand; zero
	// if that was there already.
	waiting time.Time
}

// first returns what to send on a new stream: at once if it is there (WL-22),
// else the caller is held until it is or the time for that is up.
func (f *follower) first() (*cache.Snapshot, error) {
	snap, err := f.sub.Snapshot()
	if err == nil {
		return snap, nil
	}
	uid := f.who.Caller().UID
	if !f.server.gate.take(uid, held, 1) {
		return f.lastly()
	}
	defer f.server.gate.give(uid, held, 1)
	f.waiting = time.Now()
	timer := time.NewTimer(f.holdTime())
	defer timer.Stop()
	for err != nil {
		if stop := f.wait(timer.C); stop == errTimeUp {
			return f.lastly()
		} else if stop != nil {
			return nil, stop
		}
		snap, err = f.sub.Snapshot()
	}
	return snap, nil
}

// lastly returns what there is for a caller that waits no longer. That may be more
// than it was told of: another caller of the same kind gave up waiting too.
func (f *follower) lastly() (*cache.Snapshot, error) {
	f.sub.Hurry()
	return f.sub.Snapshot()
}

// holdTime leaves a caller with a deadline half of it to try again.
func (f *follower) holdTime() time.Duration {
	t := f.server.timing
	deadline, ok := f.stream.Context().Deadline()
	if !ok {
		return t.hold
	}
	return min(t.holdMost, time.Until(deadline)/2)
}

var errTimeUp = errors.New("time is up")

// wait returns nil when the subscription has changed.
func (f *follower) wait(limit <-chan time.Time) error {
	select {
	case <-f.sub.Changed():
		return nil
	case <-f.stream.Context().Done():
		return errInterrupted
	case <-f.server.stopping:
		select {
		case <-f.sub.Changed(): // a ban empties the cache first: tell of that
			return nil
		default:
			return errShutdown
		}
	case <-limit:
		return errTimeUp
	}
}

// next waits for the state after the one that was sent. The end of all rights
// ends the stream (WL-28). What is revoked and has a successor that is still to
// be signed is waited for, not for long.
func (f *follower) next() (*cache.Snapshot, error) {
	var limit <-chan time.Time
	var pending error
	for {
		if f.waiting.IsZero() {
			f.waiting = time.Now()
		}
		if stop := f.wait(limit); stop == errTimeUp {
			return nil, pending
		} else if stop != nil {
			return nil, stop
		}
		snap, err := f.sub.Snapshot()
		if err == nil || fault.ReasonOf(err) != "svid_pending" {
			return snap, err
		}
		if pending = err; limit == nil {
			timer := time.NewTimer(f.server.timing.pending)
			defer timer.Stop()
			limit = timer.C
		}
	}
}

// deliver sends a snapshot, unless the client has the same already.
func (f *follower) deliver(snap *cache.Snapshot) error {
	msg, err := f.profile.encode(snap)
	if err != nil {
		f.server.log.LogAttrs(f.stream.Context(), slog.LevelError, "answer withheld from a workload",
			slog.String("method", f.profile.method), slog.String("error", err.Error()))
		return err
	}
	if f.last == nil || !bytes.Equal(f.last.data, msg.data) { // WL-23
		if err := f.who.Check(); err != nil { // WL-26
			return err
		}
		if err := f.send(msg); err != nil {
			return err
		}
		f.observe(snap)
	}
	f.sub.Sent(snap)
	f.last, f.waiting = msg, time.Time{}
	return nil
}

// observe measures how long an entry took to get here: only if the stream was
// there to wait for it, as far as the clocks of server and agent tell.
func (f *follower) observe(snap *cache.Snapshot) {
	if f.waiting.IsZero() || snap.CommittedAt.IsZero() {
		return
	}
	now := time.Now()
	if took := now.Sub(snap.CommittedAt); took <= now.Sub(f.waiting) {
		f.server.metrics.propagated(took)
	}
}

// send hands a message to the transport. gRPC accepts up to 64 KB per stream
// ahead of what the client reads; a connection whose socket takes nothing is
// closed by its writer (conn.Write).
//
// The first message of a stream never blocks: gRPC takes what fits into the
// stream's quota, which nothing has used yet. Any later one may, if the client
// does not read, so another goroutine sends it; that one ends with the stream at
// the latest, and stop waits for it.
func (f *follower) send(msg *message) error {
	if f.last == nil {
		return f.sent(f.stream.SendMsg(msg))
	}
	done := make(chan error, 1)
	f.server.sends.Go(func() { done <- f.stream.SendMsg(msg) })
	timer := time.NewTimer(f.server.timing.send)
	defer timer.Stop()
	select {
	case err := <-done:
		return f.sent(err)
	case <-f.stream.Context().Done():
		return errInterrupted
	case <-f.server.stopping:
		return errShutdown
	case <-timer.C:
		f.who.conn.stalled()
		return errStalled
	}
}

// sent judges the result of a send: it fails only when the stream is over.
func (f *follower) sent(err error) error {
	if err != nil {
		return errInterrupted
	}
	return nil
}

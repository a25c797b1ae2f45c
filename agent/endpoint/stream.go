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

// counted lets a call of a caller that is within its limits go on, until done.
func (s *Server) counted(ctx context.Context, takes []resource) (done func(), err error) {
	who, err := callerFrom(ctx)
	if err != nil {
		s.metrics.denied(err)
		return nil, err
	}
	uid := who.Caller().UID
	for n, r := range takes {
		if s.gate.take(uid, r, 1) {
			continue
		}
		for _, taken := range takes[:n] {
			s.gate.give(uid, taken, 1)
		}
		s.metrics.denied(errShed)
		return nil, errShed
	}
	return func() {
		for _, r := range takes {
			s.gate.give(uid, r, 1)
		}
	}, nil
}

// ended is what a call's client is told at its end.
func (s *Server) ended(ctx context.Context, err error) error {
	switch {
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

// countedStream is the interceptor that serves callers within their limits. A
// stream counts from its headers on: its request may never come.
func (s *Server) countedStream(takes []resource) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		done, err := s.counted(stream.Context(), takes)
		if err != nil {
			return err
		}
		defer done()
		return s.ended(stream.Context(), handler(srv, stream))
	}
}

// countedCall is countedStream for unary calls.
func (s *Server) countedCall(takes []resource) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		done, err := s.counted(ctx, takes)
		if err != nil {
			return nil, err
		}
		defer done()
		resp, err := handler(ctx, req)
		if err != nil && ctx.Err() == nil {
			s.metrics.denied(err)
		}
		return resp, err
	}
}

// follow serves a stream of the Workload API.
func (s *Server) follow(stream grpc.ServerStream, p *profile) error {
	who, err := callerFrom(stream.Context())
	if err != nil {
		return err
	}
	t := &teller{follower: follower{server: s, stream: stream, who: who}, profile: p}
	return t.run(p.method, t.deliver)
}

// run is the one way of every stream: caller -> subscription -> message.
func (f *follower) run(method string, deliver func(*cache.Snapshot) error) error {
	open := f.server.metrics.streams.WithLabelValues(method)
	open.Inc()
	defer open.Dec()
	process, err := f.who.Selectors(f.stream.Context())
	if err != nil {
		return err
	}
	f.sub = f.server.subscribe(process)
	defer f.sub.Close()
	snap, err := f.first()
	for err == nil {
		if err = deliver(snap); err == nil {
			snap, err = f.next()
		}
	}
	if fault.KindOf(err) == fault.Denied {
		f.server.explain(f.stream.Context(), f.who, f.sub.Selectors())
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
	server *Server
	stream grpc.ServerStream
	who    *caller
	sub    Subscription
	// incoming is what the client says while it is served, if that matters, and
	// heed takes it in: it says whether there may be something to send by it.
	incoming <-chan incoming
	heed     func(incoming) (asks bool, err error)
	// began: something was sent.
	began bool
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

// wait returns nil when the subscription has changed, or the client wants
// something else.
func (f *follower) wait(limit <-chan time.Time) error {
	for {
		select {
		case <-f.sub.Changed():
			return nil
		case in := <-f.incoming:
			if asks, err := f.heed(in); asks || err != nil {
				return err
			}
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

// teller is a follower that tells of each snapshot in one profile.
type teller struct {
	follower
	profile *profile
	// last is what the client has, nil before the first message.
	last *message
}

// deliver sends a snapshot, unless the client has the same already.
func (t *teller) deliver(snap *cache.Snapshot) error {
	msg, err := t.profile.encode(snap)
	if err != nil {
		t.withheld(t.profile.method, err)
		return err
	}
	if t.last == nil || !bytes.Equal(t.last.data, msg.data) { // WL-23
		if err := t.push(snap, msg); err != nil {
			return err
		}
	}
	t.last = msg
	t.has(snap)
	return nil
}

// push sends what a snapshot became, if the caller is still who it was.
func (f *follower) push(snap *cache.Snapshot, msg any) error {
	if err := f.who.Check(); err != nil { // WL-26
		return err
	}
	if err := f.send(msg); err != nil {
		return err
	}
	f.began = true
	f.observe(snap)
	return nil
}

// has notes that the client has all that it is to have of a snapshot.
func (f *follower) has(snap *cache.Snapshot) {
	f.sub.Sent(snap)
	f.waiting = time.Time{}
}

func (f *follower) withheld(method string, err error) {
	f.server.log.LogAttrs(f.stream.Context(), slog.LevelError, "answer withheld from a workload",
		slog.String("method", method), slog.String("error", err.Error()))
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
func (f *follower) send(msg any) error {
	if !f.began {
		return f.sent(f.stream.SendMsg(msg))
	}
	done := make(chan error, 1)
	f.server.tails.Go(func() { done <- f.stream.SendMsg(msg) })
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

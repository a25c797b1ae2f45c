package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func (g *guard) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	ctx, c := callOf(ctx)
	defer func() {
		err = g.finish(ctx, c, info.FullMethod, err, recover())
		if err != nil {
			resp = nil // never an answer beside an error
		}
	}()
	return handler(ctx, req)
}

func (g *guard) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	ctx, c := callOf(ss.Context())
	defer func() { err = g.finish(ctx, c, info.FullMethod, err, recover()) }()
	return handler(srv, ss)
}

func callOf(ctx context.Context) (context.Context, *call) {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		c.handled = true
		return ctx, c
	}
	return withCall(ctx)
}

// finish turns what a handler returned, or the panic that it raised, into the
// status that the peer sees.
func (g *guard) finish(ctx context.Context, c *call, method string, err error, panicked any) error {
	if panicked != nil {
		err = fault.Wrap(fault.Internal, fmt.Errorf("panic: %v\n%s", panicked, debug.Stack()), "internal",
			"internal error; the log of this process has the cause")
	}
	err = g.settle(ctx, err)
	g.done(ctx, c, method, err)
	if err == nil {
		return nil
	}
	return fault.Status(err, c.id).Err()
}

// settle makes a fault of err. Errors of contexts and of the stream itself
// mean that the peer or this process is going away: Unavailable, never
// Canceled (WL-24).
func (g *guard) settle(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errNoMessage) {
		return errNoMessage
	}
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*fault.Fault](err); ok {
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fault.Wrap(fault.NotReady, err, "interrupted", "the call was interrupted; retry")
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	switch st.Code() {
	case codes.Internal: // gRPC's word for what it can't decode
		return fault.Wrap(fault.Invalid, err, "request_malformed", "the message is not what this method takes")
	case codes.ResourceExhausted:
		return fault.Wrap(fault.Exhausted, err, "message_too_large", "the message is larger than this socket takes")
	}
	return fault.FromStatus(err)
}

func (g *guard) done(ctx context.Context, c *call, method string, err error) {
	g.cfg.Metrics.observe(g.cfg.Name, method, err)
	if err == nil {
		return
	}
	level := slog.LevelInfo
	switch fault.KindOf(err) {
	case fault.Internal:
		level = slog.LevelError
	case fault.NotReady, fault.Unimplemented:
		level = slog.LevelDebug
	}
	if !g.cfg.Log.Enabled(ctx, level) {
		return
	}
	if level == slog.LevelInfo && !g.lines.Allow() {
		g.suppressed.Add(1)
		return
	}
	attrs := []slog.Attr{
		slog.String("server", g.cfg.Name), slog.String("method", method), slog.String("request_id", c.id),
		slog.String("reason", fault.ReasonOf(err)), slog.String("error", err.Error()), slog.String("addr", c.caller.Addr),
	}
	if c.caller.Local {
		attrs = append(attrs, slog.Uint64("uid", uint64(c.caller.UID)), slog.Int64("pid", int64(c.caller.PID)))
	}
	if !c.caller.ID.IsZero() {
		attrs = append(attrs, slog.String("caller", c.caller.ID.String()))
	}
	if n := g.suppressed.Swap(0); n > 0 {
		attrs = append(attrs, slog.Int64("suppressed", n))
	}
	g.cfg.Log.LogAttrs(ctx, level, "call refused or failed", attrs...)
}

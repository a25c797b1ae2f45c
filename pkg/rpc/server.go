package rpc

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/tap"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Rule decides whether a caller may call a method. It runs in the transport's
// reader, before any body is read, so it decides from memory and never blocks.
type Rule func(Caller) error

// Anyone is the rule of methods that need no authentication.
func Anyone(Caller) error { return nil }

// NotImplemented is the rule of methods that a registered service declares and
// that this program does not do.
func NotImplemented(Caller) error {
	return fault.New(fault.Unimplemented, "unimplemented", "this method is not implemented")
}

// Methods is a server's method table: each full method name, such as
// "/pkg.Service/Method", with the rule of who may call it. What is not in it
// is refused.
type Methods map[string]Rule

// Uncovered returns the methods of every service registered at s for which m
// has no rule, sorted. A test holds it empty (I11).
func Uncovered(s *grpc.Server, m Methods) []string {
	var missing []string
	for service, info := range s.GetServiceInfo() {
		for _, method := range info.Methods {
			if full := "/" + service + "/" + method.Name; m[full] == nil {
				missing = append(missing, full)
			}
		}
	}
	slices.Sort(missing)
	return missing
}

// ServerConfig says how to build a server.
type ServerConfig struct {
	// Name of the socket in logs and metrics: "agents", "admin", "api".
	Name    string
	Methods Methods
	// Creds establish the caller. Their AuthInfo may implement
	// interface{ Caller() Caller }.
	Creds credentials.TransportCredentials
	// HeaderKey and HeaderValue, if set, are demanded exactly once on every
	// RPC, before anything else (SPIFFE Workload Endpoint section 3).
	HeaderKey, HeaderValue string
	// MaxRecvBytes bounds a message; default 64 KiB.
	MaxRecvBytes int
	// MessageTimeout is how long a caller may take from the headers of a call to
	// its first message; default 15 s.
	MessageTimeout time.Duration
	// MaxStreams bounds concurrent RPCs of a connection; default 100.
	MaxStreams uint32
	// Unlisted, if set, is told of calls of methods that are not in the table.
	// It must not block.
	Unlisted func(Caller, error)
	Log      *slog.Logger
	Metrics  *Metrics
	// RefusalsPerSecond bounds the lines that the log has of refused calls, for
	// sockets that anybody can call; the next line says how many are missing.
	// Zero means all. The metrics count each.
	RefusalsPerSecond int
	// Options come last, so they may override the defaults.
	Options []grpc.ServerOption
}

const (
	defaultMaxRecvBytes = 64 << 10
	defaultMaxStreams   = 100
	maxHeaderBytes      = 16 << 10
	handshakeTimeout    = 10 * time.Second
	// Handlers that wait for a message by themselves do so for ten seconds.
	defaultMessageTimeout = 15 * time.Second
)

// NewServer returns a server that enforces cfg.Methods in its tap handle and
// maps, logs and counts what handlers return. The caller registers services
// and serves.
func NewServer(cfg ServerConfig) *grpc.Server {
	if cfg.MaxRecvBytes == 0 {
		cfg.MaxRecvBytes = defaultMaxRecvBytes
	}
	if cfg.MaxStreams == 0 {
		cfg.MaxStreams = defaultMaxStreams
	}
	if cfg.MessageTimeout == 0 {
		cfg.MessageTimeout = defaultMessageTimeout
	}
	g := newGuard(cfg)
	opts := []grpc.ServerOption{
		grpc.Creds(cfg.Creds),
		grpc.InTapHandle(g.tap),
		grpc.UnaryInterceptor(g.unary),
		grpc.StreamInterceptor(g.stream),
		grpc.StatsHandler(arrival{g}),
		grpc.MaxRecvMsgSize(cfg.MaxRecvBytes),
		grpc.MaxConcurrentStreams(cfg.MaxStreams),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.ConnectionTimeout(handshakeTimeout),
		// An owner that stops a server wants its handlers gone.
		grpc.WaitForHandlers(true),
	}
	return grpc.NewServer(append(opts, cfg.Options...)...)
}

// guard is the part of a server that every RPC passes.
type guard struct {
	cfg        ServerConfig
	lines      *rate.Limiter // of refusals
	suppressed atomic.Int64
}

func newGuard(cfg ServerConfig) *guard {
	g := &guard{cfg: cfg, lines: rate.NewLimiter(rate.Inf, 0)}
	if n := cfg.RefusalsPerSecond; n > 0 {
		g.lines = rate.NewLimiter(rate.Limit(n), n)
	}
	return g
}

func (g *guard) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	ctx, c := withCall(ctx)
	err := g.judge(c.caller, info)
	if err == nil {
		c.method = info.FullMethodName
		ctx, c.cancel = context.WithCancelCause(ctx)
		return ctx, nil
	}
	method := info.FullMethodName
	if g.cfg.Methods[method] == nil {
		method = "unlisted" // a label must not come from outside
	}
	g.done(ctx, c, method, err)
	return nil, fault.Status(err, c.id).Err()
}

// judge is admit, with a panic as a refusal. Here nobody else recovers: the
// transport would wait for ever for a lock that its own reader holds.
func (g *guard) judge(caller Caller, info *tap.Info) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fault.Wrap(fault.Internal, fmt.Errorf("panic: %v\n%s", p, debug.Stack()), "authz_error",
				"it could not be decided whether you may call this; the log of this process has the cause")
		}
	}()
	return g.admit(caller, info)
}

func (g *guard) admit(caller Caller, info *tap.Info) error {
	if !g.headerPresent(info.Header) {
		return fault.New(fault.Invalid, "security_header_missing",
			"security header missing from request: send metadata "+g.cfg.HeaderKey+": "+g.cfg.HeaderValue)
	}
	rule := g.cfg.Methods[info.FullMethodName]
	if rule == nil {
		err := fault.New(fault.Unimplemented, "method_unknown", "this socket has no such method")
		if g.cfg.Unlisted != nil {
			g.cfg.Unlisted(caller, err)
		}
		return err
	}
	return rule(caller)
}

func (g *guard) headerPresent(header metadata.MD) bool {
	if g.cfg.HeaderKey == "" {
		return true
	}
	values := header.Get(g.cfg.HeaderKey)
	return len(values) == 1 && values[0] == g.cfg.HeaderValue
}

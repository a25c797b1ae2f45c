package rpc

import (
	"context"
	"time"

	"google.golang.org/grpc/stats"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// errNoMessage ends a call whose first message does not come. The caller sees
// Canceled, in gRPC's own words; log and metrics have the reason.
var errNoMessage = fault.New(fault.NotReady, "request_timeout", "the request did not come in time: send it, and retry")

// arrival watches calls between their headers and their first message, where no
// handler has them yet: half a call must not last for ever, and what the
// transport refuses there by itself is counted too. It is a stats.Handler, as
// only these see both moments.
type arrival struct{ guard *guard }

// HandleRPC implements stats.Handler.
func (a arrival) HandleRPC(ctx context.Context, s stats.RPCStats) {
	c, ok := ctx.Value(callKey{}).(*call)
	if !ok || c.cancel == nil {
		return
	}
	switch s := s.(type) {
	case *stats.Begin:
		c.late.Store(time.AfterFunc(a.guard.cfg.MessageTimeout, func() { c.cancel(errNoMessage) }))
	case *stats.InPayload:
		c.arrived()
	case *stats.End:
		c.arrived()
		if s.Error != nil && !c.handled {
			a.guard.done(ctx, c, c.method, a.guard.settle(ctx, s.Error))
		}
	}
}

// arrived ends the wait for the first message. The timer goes with it: many
// streams stay for days.
func (c *call) arrived() {
	if late := c.late.Swap(nil); late != nil {
		late.Stop()
	}
}

// TagRPC implements stats.Handler.
func (arrival) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// TagConn implements stats.Handler.
func (arrival) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn implements stats.Handler.
func (arrival) HandleConn(context.Context, stats.ConnStats) {}

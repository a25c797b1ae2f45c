package cache

import (
	"context"
	"log/slog"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/pkg/schedule"
)

// heedClock looks whether the wall clock was set, by more than was known, and
// returns by how much. Nothing is taken for expired by a clock that nobody else
// agrees with: the time since boot counts until the server's time is known, for
// which the stream is opened anew. Without a server it stays like that.
func (c *Cache) heedClock(ctx context.Context, known time.Duration) time.Duration {
	step := c.clock.Step()
	switch {
	case (step - known).Abs() <= schedule.MaxStep:
		return known
	case step == 0:
		c.log.InfoContext(ctx, "the clock of this machine is believed again")
	default:
		c.log.WarnContext(ctx, "the clock of this machine was set: going by the time since boot until the server confirms it", slog.Duration("by", step))
		signal(c.doubts)
	}
	return step
}

// hearTime takes the server's time, which came with a message.
func (c *Cache) hearTime(ctx context.Context, at *timestamppb.Timestamp) {
	step := c.clock.Step()
	if step == 0 || !at.IsValid() {
		return
	}
	c.clock.Confirm(at.AsTime())
	if c.clock.Step() != 0 {
		c.log.ErrorContext(ctx, "the clock of this machine is wrong, the server's shows another time: set it right",
			slog.Duration("by", step), slog.Time("server_time", at.AsTime()))
		return
	}
	c.log.InfoContext(ctx, "the server's time confirms the clock of this machine", slog.Duration("was_set_by", step))
	c.tick(c.now())
}

// Package schedule says when to act next: renewals by wall clock, retries with
// jittered back-off.
//
// Go's timers stand still while a machine is suspended, certificates do not.
// So nothing here sleeps until an expiry: callers poll the wall clock with
// Tick and ask whether a renewal is due.
package schedule

import (
	"context"
	"math/rand/v2"
	"time"
)

// RenewAt returns when to renew a credential received at received that ends at
// notAfter: at half of its remaining life, plus or minus a tenth of that life,
// so that a fleet started together does not renew together.
//
// The answer has no monotonic part, so that comparing it with time.Now goes by
// the wall clock.
func RenewAt(received, notAfter time.Time) time.Time {
	received = received.Round(0)
	life := notAfter.Sub(received)
	if life <= 0 {
		return received
	}
	jitter := time.Duration((rand.Float64()*2 - 1) * float64(life) / 10)
	return received.Add(life/2 + jitter)
}

// Within returns a random moment between from and from plus window, without a
// monotonic part: when one of many does what all have to do soon.
func Within(from time.Time, window time.Duration) time.Time {
	return from.Round(0).Add(rand.N(max(window, 1)))
}

// Tick returns how often to compare the wall clock with a credential of the
// given lifetime: a twentieth of it, at most 15 s, at least 50 ms.
func Tick(ttl time.Duration) time.Duration {
	return min(max(ttl/20, 50*time.Millisecond), 15*time.Second)
}

// Backoff gives growing, fully jittered waits between retries. The zero value
// starts at 100 ms and stays below 30 s.
type Backoff struct {
	Min, Max time.Duration
	attempt  int
}

// Next returns the wait before the next retry: between a half of Min and
// Min doubled once per call, capped at Max.
func (b *Backoff) Next() time.Duration {
	low, high := b.Min, b.Max
	if low <= 0 {
		low = 100 * time.Millisecond
	}
	if high <= 0 {
		high = 30 * time.Second
	}
	ceiling := high
	if b.attempt < 30 {
		ceiling = min(low<<b.attempt, high)
	}
	b.attempt++
	floor := min(low/2, ceiling)
	return floor + time.Duration(rand.Int64N(int64(ceiling-floor)+1))
}

// Reset starts over after a success.
func (b *Backoff) Reset() { b.attempt = 0 }

// Sleep waits for d or for ctx to end, whichever is first, and returns ctx's
// error in the second case.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

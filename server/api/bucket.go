package api

import (
	"sync"
	"time"
)

const (
	// burstSeconds is how much of its rate a peer may save up.
	burstSeconds = 10
	// fewBuckets are kept without looking which of them have nothing to say.
	fewBuckets = 1024
)

// buckets limits how much each peer may ask for per second. A bucket that is
// full again is as good as none, so it is forgotten: there are about as many as
// peers that were busy in the last ten seconds.
type buckets struct {
	rate float64 // per second

	mu      sync.Mutex
	of      map[string]*bucket
	sweepAt int // number of buckets at which to look for full ones
}

type bucket struct {
	tokens float64
	at     time.Time
}

func newBuckets(perSecond int) *buckets {
	return &buckets{rate: float64(perSecond), of: map[string]*bucket{}, sweepAt: fewBuckets}
}

// take lets peer have n, or says how long to wait for them. Who asks for more
// than can be saved up gets it once the bucket is full, and then waits longer.
func (b *buckets) take(peer string, n int, now time.Time) (wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	one := b.of[peer]
	if one == nil {
		if len(b.of) >= b.sweepAt {
			b.sweep(now)
		}
		one = &bucket{tokens: b.burst(), at: now}
		b.of[peer] = one
	}
	b.refill(one, now)
	if lacking := min(float64(n), b.burst()) - one.tokens; lacking > 0 {
		return time.Duration(lacking / b.rate * float64(time.Second))
	}
	one.tokens -= float64(n)
	return 0
}

func (b *buckets) burst() float64 { return b.rate * burstSeconds }

func (b *buckets) refill(one *bucket, now time.Time) {
	if gone := now.Sub(one.at).Seconds(); gone > 0 {
		one.tokens = min(b.burst(), one.tokens+gone*b.rate)
		one.at = now
	}
}

// sweep forgets the full buckets. The next time is when there are twice as many
// as are left, so the work per bucket stays constant.
func (b *buckets) sweep(now time.Time) {
	for peer, one := range b.of {
		if b.refill(one, now); one.tokens >= b.burst() {
			delete(b.of, peer)
		}
	}
	b.sweepAt = max(fewBuckets, 2*len(b.of))
}

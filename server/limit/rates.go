// Package limit bounds what a peer can make the server do. It knows peers by
// whatever text its callers know them by, and decides from memory.
package limit

import (
	"net/netip"
	"sync"
	"time"
)

const (
	// BurstSeconds is how much of its rate a peer may save up.
	BurstSeconds = 10
	// fewBuckets are kept without looking which of them have nothing to say.
	fewBuckets = 1024
)

// Rates limits how much each peer may ask for per second. A bucket that is
// full again is as good as none, so it is forgotten: there are about as many as
// peers that were busy in the last ten seconds.
type Rates struct {
	rate float64 // per second

	mu      sync.Mutex
	of      map[string]*bucket
	sweepAt int // number of buckets at which to look for full ones
}

type bucket struct {
	tokens float64
	at     time.Time
}

// NewRates returns limits of so much per second for each peer, who may save up
// ten seconds' worth.
func NewRates(perSecond int) *Rates {
	return &Rates{rate: float64(perSecond), of: map[string]*bucket{}, sweepAt: fewBuckets}
}

// Take lets peer have n, or says how long to wait for them. Who asks for more
// than can be saved up gets it once the bucket is full, and then waits longer.
func (b *Rates) Take(peer string, n int, now time.Time) (wait time.Duration) {
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

// Wait says how long peer would have to wait for one, and takes nothing.
func (b *Rates) Wait(peer string, now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	one := b.of[peer]
	if one == nil {
		return 0
	}
	b.refill(one, now)
	return time.Duration(max(0, 1-one.tokens) / b.rate * float64(time.Second))
}

func (b *Rates) burst() float64 { return b.rate * BurstSeconds }

func (b *Rates) refill(one *bucket, now time.Time) {
	if gone := now.Sub(one.at).Seconds(); gone > 0 {
		one.tokens = min(b.burst(), one.tokens+gone*b.rate)
		one.at = now
	}
}

// sweep forgets the full buckets. The next time is when there are twice as many
// as are left, so the work per bucket stays constant.
func (b *Rates) sweep(now time.Time) {
	for peer, one := range b.of {
		if b.refill(one, now); one.tokens >= b.burst() {
			delete(b.of, peer)
		}
	}
	b.sweepAt = max(fewBuckets, 2*len(b.of))
}

// AddressOf is a remote address without its port.
func AddressOf(addr string) string {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return addr
	}
	return ap.Addr().Unmap().WithZone("").String()
}

// HostOf is the part of a remote address that an attacker can't vary at will:
// the IPv4 address, or the IPv6 network of 64 bits.
func HostOf(addr string) string {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return addr
	}
	ip := ap.Addr().Unmap()
	if ip.Is4() {
		return ip.String()
	}
	network, err := ip.WithZone("").Prefix(64)
	if err != nil {
		return ip.String()
	}
	return network.Masked().String()
}

package api

import (
	"net/netip"
	"sync"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	// burstSeconds is how much of its rate an address may save up.
	burstSeconds = 10
	// maxAttesting is how many attestations one address may have under way.
	maxAttesting = 128
	// maxAddresses is when buckets that have nothing to say are forgotten.
	maxAddresses = 10_000
)

// addresses limits what callers without an identity make the server do, by
// their address: how often an attestation is begun and how many are under way.
// Agents with an SVID don't pass here, so a flood of strangers does not delay
// a renewal.
type addresses struct {
	rate float64 // per second

	mu      sync.Mutex
	buckets map[string]*bucket
}

type bucket struct {
	tokens float64
	at     time.Time
	busy   int
}

func newAddresses(perSecond int) *addresses {
	return &addresses{rate: float64(perSecond), buckets: map[string]*bucket{}}
}

// begin admits one attestation from addr; done must be called when it is over.
func (a *addresses) begin(addr string, now time.Time) (done func(), err error) {
	host := HostOf(addr)
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.buckets) >= maxAddresses {
		a.forget(now)
	}
	b := a.buckets[host]
	if b == nil {
		b = &bucket{tokens: a.burst(), at: now}
		a.buckets[host] = b
	}
	a.refill(b, now)
	switch {
	case b.tokens < 1:
		return nil, fault.New(fault.Exhausted, "attest_rate", "too many attestations from this address: retry later")
	case b.busy >= maxAttesting:
		return nil, fault.New(fault.Exhausted, "limit_attestations", "too many attestations under way from this address: retry later")
	}
	b.tokens--
	b.busy++
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		b.busy--
	}, nil
}

func (a *addresses) burst() float64 { return a.rate * burstSeconds }

func (a *addresses) refill(b *bucket, now time.Time) {
	if gone := now.Sub(b.at).Seconds(); gone > 0 {
		b.tokens = min(a.burst(), b.tokens+gone*a.rate)
		b.at = now
	}
}

// forget drops the buckets that a new one would equal.
func (a *addresses) forget(now time.Time) {
	for host, b := range a.buckets {
		if a.refill(b, now); b.busy == 0 && b.tokens >= a.burst() {
			delete(a.buckets, host)
		}
	}
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

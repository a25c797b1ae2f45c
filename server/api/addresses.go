package api

import (
	"sync"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/limit"
)

// maxAttesting is how many attestations one address may have under way.
const maxAttesting = 128

// addresses limits what callers without an identity make the server do, by
// their address: how often an attestation is begun and how many are under way.
// Agents with an SVID don't pass here, so a flood of strangers does not delay
// a renewal.
type addresses struct {
	begun *limit.Rates

	mu   sync.Mutex
	busy map[string]int
}

func newAddresses(perSecond int) *addresses {
	return &addresses{begun: limit.NewRates(perSecond), busy: map[string]int{}}
}

// begin admits one attestation from addr; done must be called when it is over.
func (a *addresses) begin(addr string, now time.Time) (done func(), err error) {
	host := limit.HostOf(addr)
	if !a.enter(host) {
		return nil, fault.Later(fault.Exhausted, "limit_attestations", "too many attestations under way from this address: retry later", time.Second)
	}
	done = func() { a.leave(host) }
	if wait := a.begun.Take(host, 1, now); wait > 0 {
		done()
		return nil, fault.Later(fault.Exhausted, "attest_rate", "too many attestations from this address: retry later", wait)
	}
	return done, nil
}

func (a *addresses) enter(host string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.busy[host] >= maxAttesting {
		return false
	}
	a.busy[host]++
	return true
}

func (a *addresses) leave(host string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.busy[host]--; a.busy[host] == 0 {
		delete(a.busy, host)
	}
}

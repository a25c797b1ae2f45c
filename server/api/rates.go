package api

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/server/limit"
)

// rates limits how much each agent asks for. Agents are known by their
// certificate: whoever shares an address with a busy one is not slowed down.
type rates struct {
	signatures, renewals, streams *limit.Rates
}

// AgentRates are what one agent may do per second; it may save up ten seconds'
// worth of each.
type AgentRates struct {
	// Signatures counts certificates for workloads, not calls.
	Signatures int
	// Renewals of the agent's own certificate.
	Renewals int
	// SyncStreams that are opened.
	SyncStreams int
}

func newRates(r AgentRates) *rates {
	return &rates{signatures: limit.NewRates(r.Signatures), renewals: limit.NewRates(r.Renewals), streams: limit.NewRates(r.SyncStreams)}
}

// sign admits a call with n items. An empty one is free: refusing it would cost
// as much as answering.
func (r *rates) sign(agent spiffeid.ID, n int, now time.Time) error {
	if n == 0 {
		return nil
	}
	if wait := r.signatures.Take(agent.String(), n, now); wait > 0 {
		return fault.Later(fault.Exhausted, "limit_signatures", "this agent has asked for too many certificates per second: retry later", wait)
	}
	return nil
}

func (r *rates) renew(agent spiffeid.ID, now time.Time) error {
	if wait := r.renewals.Take(agent.String(), 1, now); wait > 0 {
		return fault.Later(fault.Exhausted, "limit_renewals", "this agent renews its own certificate too often: retry later", wait)
	}
	return nil
}

func (r *rates) sync(agent spiffeid.ID, now time.Time) error {
	if wait := r.streams.Take(agent.String(), 1, now); wait > 0 {
		return fault.Later(fault.Exhausted, "limit_sync_opens", "this agent opens sync streams too often: retry later", wait)
	}
	return nil
}

// RateLimited is a method table whose callers, known by their SPIFFE ID, may
// make so many calls per second.
func RateLimited(methods rpc.Methods, perSecond int) rpc.Methods {
	calls := limit.NewRates(perSecond)
	limited := make(rpc.Methods, len(methods))
	for method, rule := range methods {
		limited[method] = func(c rpc.Caller) error {
			if err := rule(c); err != nil {
				return err
			}
			if wait := calls.Take(c.ID.String(), 1, time.Now()); wait > 0 {
				return fault.Later(fault.Exhausted, "limit_calls", "this operator makes too many calls: retry later", wait)
			}
			return nil
		}
	}
	return limited
}

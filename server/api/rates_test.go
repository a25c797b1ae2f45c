package api

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/limit"
)

// P7: the limits are of one agent, and each thing has its own.
func TestRatesOfAgentsAreTheirOwn(t *testing.T) {
	r, now := newRates(AgentRates{Signatures: 100, Renewals: 1, SyncStreams: 2}), time.Now()
	a, b := spiffeid.RequireFromString("spiffe://example.org/assay/agent/a"), spiffeid.RequireFromString("spiffe://example.org/assay/agent/b")
	for range 4 {
		if err := r.sign(a, 250, now); err != nil {
			t.Fatal(err)
		}
	}
	err := r.sign(a, 50, now)
	if fault.KindOf(err) != fault.Exhausted || fault.ReasonOf(err) != "limit_signatures" || fault.RetryAfterOf(err) != 500*time.Millisecond {
		t.Errorf("%v, retry after %v", err, fault.RetryAfterOf(err))
	}
	for what, err := range map[string]error{
		"nothing": r.sign(a, 0, now), "another agent": r.sign(b, 50, now), "renewal": r.renew(a, now), "sync": r.sync(a, now),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for range limit.BurstSeconds - 1 {
		if err := r.renew(a, now); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.renew(a, now); fault.ReasonOf(err) != "limit_renewals" || fault.RetryAfterOf(err) != time.Second {
		t.Errorf("%v", err)
	}
	for range 2*limit.BurstSeconds - 1 {
		if err := r.sync(a, now); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.sync(a, now); fault.ReasonOf(err) != "limit_sync_opens" || fault.RetryAfterOf(err) != 500*time.Millisecond {
		t.Errorf("%v", err)
	}
}

package api

import (
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func TestRateIsSavedUpAndPaidBack(t *testing.T) {
	b, now := newBuckets(5), time.Now()
	for i := range 5 * burstSeconds {
		if wait := b.take("a", 1, now); wait != 0 {
			t.Fatalf("%d: wait %v", i, wait)
		}
	}
	if wait := b.take("a", 1, now); wait != 200*time.Millisecond {
		t.Errorf("empty: wait %v", wait)
	}
	if wait := b.take("b", 50, now); wait != 0 {
		t.Errorf("another peer waits %v", wait)
	}
	now = now.Add(200 * time.Millisecond)
	if wait := b.take("a", 1, now); wait != 0 {
		t.Errorf("after the wait that was named: wait %v", wait)
	}
	// More than can be saved up is possible, and costs what it costs.
	now = now.Add(time.Hour)
	if wait := b.take("a", 100, now); wait != 0 {
		t.Errorf("100 of a full bucket: wait %v", wait)
	}
	if wait := b.take("a", 1, now); wait != 51*time.Second/5 {
		t.Errorf("in debt: wait %v", wait)
	}
	// A clock that is set back takes nothing and gives nothing.
	if wait := b.take("a", 1, now.Add(-time.Hour)); wait != 51*time.Second/5 {
		t.Errorf("an hour ago: wait %v", wait)
	}
}

func TestIdlePeersAreForgotten(t *testing.T) {
	b, now := newBuckets(1), time.Now()
	most := 0
	for i := range 100_000 {
		b.take(fmt.Sprint(i), 1, now)
		now = now.Add(10 * time.Millisecond) // each is full again after a second
		most = max(most, len(b.of))
	}
	if most > 2*fewBuckets {
		t.Errorf("%d buckets at a time for about 100 busy peers", most)
	}
	// Those that have something to say are kept, however many.
	b, now = newBuckets(1), time.Now()
	for i := range 3 * fewBuckets {
		b.take(fmt.Sprint(i), burstSeconds, now)
	}
	for i := range 3 * fewBuckets {
		if b.take(fmt.Sprint(i), 1, now) == 0 {
			t.Fatalf("peer %d got a new bucket", i)
		}
	}
}

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
	for range burstSeconds - 1 {
		if err := r.renew(a, now); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.renew(a, now); fault.ReasonOf(err) != "limit_renewals" || fault.RetryAfterOf(err) != time.Second {
		t.Errorf("%v", err)
	}
	for range 2*burstSeconds - 1 {
		if err := r.sync(a, now); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.sync(a, now); fault.ReasonOf(err) != "limit_sync_opens" || fault.RetryAfterOf(err) != 500*time.Millisecond {
		t.Errorf("%v", err)
	}
}

package limit

import (
	"fmt"
	"testing"
	"time"
)

func TestRateIsSavedUpAndPaidBack(t *testing.T) {
	b, now := NewRates(5), time.Now()
	for i := range 5 * BurstSeconds {
		if wait := b.Take("a", 1, now); wait != 0 {
			t.Fatalf("%d: wait %v", i, wait)
		}
	}
	if wait := b.Take("a", 1, now); wait != 200*time.Millisecond {
		t.Errorf("empty: wait %v", wait)
	}
	if wait := b.Take("b", 50, now); wait != 0 {
		t.Errorf("another peer waits %v", wait)
	}
	now = now.Add(200 * time.Millisecond)
	if wait := b.Take("a", 1, now); wait != 0 {
		t.Errorf("after the wait that was named: wait %v", wait)
	}
	// More than can be saved up is possible, and costs what it costs.
	now = now.Add(time.Hour)
	if wait := b.Take("a", 100, now); wait != 0 {
		t.Errorf("100 of a full bucket: wait %v", wait)
	}
	if wait := b.Take("a", 1, now); wait != 51*time.Second/5 {
		t.Errorf("in debt: wait %v", wait)
	}
	// A clock that is set back takes nothing and gives nothing.
	if wait := b.Take("a", 1, now.Add(-time.Hour)); wait != 51*time.Second/5 {
		t.Errorf("an hour ago: wait %v", wait)
	}
}

func TestIdlePeersAreForgotten(t *testing.T) {
	b, now := NewRates(1), time.Now()
	most := 0
	for i := range 100_000 {
		b.Take(fmt.Sprint(i), 1, now)
		now = now.Add(10 * time.Millisecond) // each is full again after a second
		most = max(most, len(b.of))
	}
	if most > 2*fewBuckets {
		t.Errorf("%d buckets at a time for about 100 busy peers", most)
	}
	// Those that have something to say are kept, however many.
	b, now = NewRates(1), time.Now()
	for i := range 3 * fewBuckets {
		b.Take(fmt.Sprint(i), BurstSeconds, now)
	}
	for i := range 3 * fewBuckets {
		if b.Take(fmt.Sprint(i), 1, now) == 0 {
			t.Fatalf("peer %d got a new bucket", i)
		}
	}
}

func TestHostOf(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.1:80": "192.0.2.1", "[::ffff:192.0.2.1]:80": "192.0.2.1", "[2001:db8:1:2:3::4]:80": "2001:db8:1:2::/64",
		"[fe80::1%eth0]:80": "fe80::/64", "unix": "unix",
	} {
		if got := HostOf(addr); got != want {
			t.Errorf("HostOf(%q) = %q, want %q", addr, got, want)
		}
	}
}

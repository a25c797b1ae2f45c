package schedule_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/schedule"
)

func TestRenewAtIsHalfLifeWithinATenth(t *testing.T) {
	now := time.Now()
	spread := map[time.Time]bool{}
	for range 1000 {
		at := schedule.RenewAt(now, now.Add(time.Hour))
		if d := at.Sub(now); d < 24*time.Minute || d > 36*time.Minute {
			t.Fatalf("renewal after %v", d)
		}
		spread[at] = true
	}
	if len(spread) < 100 {
		t.Error("no jitter")
	}
	if at := schedule.RenewAt(now, now.Add(-time.Second)); !at.Equal(now) {
		t.Error("an expired credential is due at once")
	}
}

func TestRenewAtHasNoMonotonicPart(t *testing.T) {
	now := time.Now()
	for _, end := range []time.Time{now.Add(time.Hour), now.Add(-time.Hour)} {
		if at := schedule.RenewAt(now, end); at != at.Round(0) {
			t.Errorf("%v: a suspend of the machine would delay it", at)
		}
	}
}

func TestTick(t *testing.T) {
	for ttl, want := range map[time.Duration]time.Duration{
		time.Hour: 15 * time.Second, 10 * time.Second: 500 * time.Millisecond, 0: 50 * time.Millisecond,
	} {
		if got := schedule.Tick(ttl); got != want {
			t.Errorf("Tick(%v) = %v, want %v", ttl, got, want)
		}
	}
}

func TestBackoffGrowsAndStaysCapped(t *testing.T) {
	b := schedule.Backoff{Min: 100 * time.Millisecond, Max: 5 * time.Second}
	for i := range 100 {
		d := b.Next()
		ceiling := 5 * time.Second
		if i < 5 {
			ceiling = 100 * time.Millisecond << i
		}
		if d < 50*time.Millisecond || d > ceiling {
			t.Fatalf("attempt %d: %v", i, d)
		}
	}
	b.Reset()
	if d := b.Next(); d > 100*time.Millisecond {
		t.Errorf("after Reset: %v", d)
	}
}

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if err := schedule.Sleep(t.Context(), time.Hour); err != nil || time.Since(start) != time.Hour {
			t.Fatalf("%v after %v", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := schedule.Sleep(ctx, time.Hour); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	})
}

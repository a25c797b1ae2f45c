package istioca

import (
	"sync"
	"time"

	"github.com/seed-caa81108/assay/pkg/schedule"
)

const (
	// breakAfter failures in a row nobody is asked for a while, and then one
	// question at a time until there is an answer.
	breakAfter         = 5
	minBreak, maxBreak = time.Second, 30 * time.Second
)

// breaker keeps callers from waiting for somebody who gives no answers.
type breaker struct {
	mu       sync.Mutex
	failures int
	until    time.Time // open before; zero: closed
	probing  bool
	pause    schedule.Backoff
}

func newBreaker() *breaker {
	return &breaker{pause: schedule.Backoff{Min: minBreak, Max: maxBreak}}
}

// enter says whether to ask. Then done must be called with what came of it: nil if
// nobody is to be asked.
func (b *breaker) enter(now time.Time) (done func(now time.Time, answered bool)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.until.IsZero() {
		return func(now time.Time, answered bool) { b.done(now, answered, false) }
	}
	if b.probing || now.Before(b.until) {
		return nil
	}
	b.probing = true
	return func(now time.Time, answered bool) { b.done(now, answered, true) }
}

// done counts a failure. While it is open only the probe's counts: questions that
// were under way fail together, and are one outage.
func (b *breaker) done(now time.Time, answered, probe bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if probe {
		b.probing = false
	}
	switch {
	case answered:
		b.failures, b.until = 0, time.Time{}
		b.pause.Reset()
	case probe:
		b.until = now.Add(b.pause.Next())
	case b.until.IsZero():
		if b.failures++; b.failures >= breakAfter {
			b.until = now.Add(b.pause.Next())
		}
	}
}

func (b *breaker) open() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.until.IsZero()
}

package schedule

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// MaxStep is how far the wall clock may be set without a second opinion.
const MaxStep = 5 * time.Minute

// Clock is the wall clock, as far as it is to be believed. It compares it with
// the time since boot, which nobody can set and which runs on while the machine
// sleeps. When the wall clock is set by more than MaxStep, Now goes on from
// where it was: a wrong clock would take every certificate of a machine for
// expired, or keep those that are. Somebody whose clock counts, a server, then
// decides by Confirm; until it does, the time since boot is what counts.
//
// A virtual machine that was stopped by its host looks like one whose clock was
// set. A nil Clock believes the wall clock.
type Clock struct {
	wall func() time.Time
	boot func() time.Duration

	mu     sync.Mutex
	anchor time.Time // what the time was
	at     time.Duration
	looked time.Time // the last look, with the monotonic clock
	step   time.Duration
}

// SystemClock returns the clock of this machine.
func SystemClock() *Clock { return NewClock(time.Now, sinceBoot) }

// NewClock returns a clock out of a wall clock, which it believes at first, and
// a clock that nobody can set.
func NewClock(wall func() time.Time, boot func() time.Duration) *Clock {
	c := &Clock{wall: wall, boot: boot}
	c.looked = wall()
	c.anchor, c.at = c.looked.Round(0), boot()
	return c
}

// sinceBoot is the kernel's CLOCK_BOOTTIME.
func sinceBoot() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic("read CLOCK_BOOTTIME: " + err.Error()) // Linux has it since 2.6.39
	}
	return time.Duration(t.Nano())
}

// Now is the time to go by, without a monotonic part.
func (c *Clock) Now() time.Time {
	if c == nil {
		return time.Now().Round(0)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now()
}

func (c *Clock) now() time.Time {
	seen := c.wall()
	wall := seen.Round(0)
	// Mostly both clocks have moved on by the same little bit since the last
	// look: that costs no system call.
	if gone := seen.Sub(c.looked); c.step == 0 && gone >= 0 && gone < time.Second && (wall.Sub(c.looked.Round(0))-gone).Abs() < time.Second {
		return wall
	}
	c.looked = seen
	boot := c.boot()
	expected := c.anchor.Add(boot - c.at)
	if drift := wall.Sub(expected); drift.Abs() > MaxStep {
		c.step = drift
		return expected
	}
	c.step, c.anchor, c.at = 0, wall, boot
	return wall
}

// Step is how far the wall clock is from Now; zero while they agree.
func (c *Clock) Step() time.Duration {
	if c == nil {
		return 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now()
	return c.step
}

// Confirm takes the word of somebody whose clock counts. If it agrees with the
// wall clock, that is believed again, wherever it was set to.
func (c *Clock) Confirm(at time.Time) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now()
	if wall := c.wall().Round(0); c.step != 0 && wall.Sub(at).Abs() <= MaxStep {
		c.step, c.anchor, c.at = 0, wall, c.boot()
	}
}

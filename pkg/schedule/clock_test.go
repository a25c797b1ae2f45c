package schedule_test

import (
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/schedule"
)

// machine has clocks that a test can move.
type machine struct {
	wall time.Time
	boot time.Duration
}

func (m *machine) clock() *schedule.Clock {
	return schedule.NewClock(func() time.Time { return m.wall }, func() time.Duration { return m.boot })
}

func (m *machine) passes(d time.Duration) { m.wall, m.boot = m.wall.Add(d), m.boot+d }

// NEG-58 c
func TestClockThatIsSetIsNotBelieved(t *testing.T) {
	for _, set := range []time.Duration{25 * time.Hour, -25 * time.Hour, 6 * time.Minute, -6 * time.Minute} {
		start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		m := &machine{wall: start, boot: time.Hour}
		c := m.clock()
		m.passes(time.Minute)
		m.wall = m.wall.Add(set)
		for range 3 {
			m.passes(time.Hour)
			c.Now()
		}
		want := start.Add(3*time.Hour + time.Minute)
		if got := c.Now(); !got.Equal(want) || c.Step() != set {
			t.Errorf("set by %v: %v, step %v; want %v", set, got, c.Step(), want)
		}
		// The server says that it is wrong: it stays so.
		c.Confirm(want)
		if got := c.Now(); !got.Equal(want) || c.Step() != set {
			t.Errorf("set by %v, and refuted: %v, step %v", set, got, c.Step())
		}
		// It is set right again.
		m.wall = m.wall.Add(-set)
		if got := c.Now(); !got.Equal(want) || c.Step() != 0 {
			t.Errorf("set by %v and back: %v, step %v", set, got, c.Step())
		}
		// It is set, and the server's clock shows the same.
		m.wall = m.wall.Add(set)
		c.Now()
		c.Confirm(m.wall.Add(time.Minute))
		if got := c.Now(); !got.Equal(m.wall) || c.Step() != 0 {
			t.Errorf("set by %v, and confirmed: %v, step %v; want %v", set, got, c.Step(), m.wall)
		}
	}
}

func TestClockFollowsWhatIsNoStep(t *testing.T) {
	m := &machine{wall: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	c := m.clock()
	for name, passes := range map[string]func(){
		"time passes":        func() { m.passes(time.Minute) },
		"the machine sleeps": func() { m.passes(100 * time.Hour) },
		"a slow clock":       func() { m.passes(time.Hour); m.wall = m.wall.Add(-time.Second) },
		"a leap":             func() { m.wall = m.wall.Add(4 * time.Minute) },
		"a leap back":        func() { m.wall = m.wall.Add(-4 * time.Minute) },
	} {
		for range 100 {
			passes()
			if got := c.Now(); !got.Equal(m.wall) || c.Step() != 0 {
				t.Fatalf("%s: %v, step %v; want %v", name, got, c.Step(), m.wall)
			}
		}
	}
}

func TestClockOfThisMachine(t *testing.T) {
	c := schedule.SystemClock()
	for range 1000 {
		if d := time.Until(c.Now()).Abs(); d > schedule.MaxStep || c.Step() != 0 {
			t.Fatalf("%v off, step %v", d, c.Step())
		}
	}
	var none *schedule.Clock
	none.Confirm(time.Time{})
	if none.Now().IsZero() || none.Step() != 0 {
		t.Error("no clock is the wall clock")
	}
}

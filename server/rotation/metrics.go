package rotation

import (
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/server/ca"
)

// phases are all of them, for a series each.
var phases = []Phase{Preparing, Publishing, Reissuing, Aborting, Done, Aborted}

// metrics tells of the rotation and of the fleet as the gates see it. It is
// read when it is collected. No label names an agent: a fleet has thousands.
type metrics struct {
	rotator *Rotator

	phase, since, waits                        *prometheus.Desc
	counted, connected, unacknowledged, offset *prometheus.Desc
}

func newMetrics(r *Rotator) *metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("assay_"+name, help, labels, nil)
	}
	return &metrics{
		rotator: r,
		phase: desc("rotation_phase",
			"1 for the phase that the rotation of the root is in, or for how the last one ended, else 0; all 0 before there was one.", "phase"),
		since: desc("rotation_phase_since_timestamp_seconds",
			"Since when the rotation is in its phase, in Unix time; 0 before there was one."),
		waits: desc("rotation_gate_waits",
			"Agents, and other things, that the rotation waits for before the new root signs (activate) or the old one goes (revoke).", "gate"),
		counted: desc("fleet_agents",
			"Agents that a rotation waits for: not banned, and what they handed out may still be valid."),
		connected: desc("fleet_agents_connected",
			"Agents that a rotation waits for that have a stream open to this server."),
		unacknowledged: desc("fleet_agents_unacknowledged",
			"Agents that a rotation waits for that have not acknowledged the current trust bundle to this server."),
		offset: desc("fleet_clock_offset_max_seconds",
			"How far off the clock is, either way, of that agent that a rotation waits for whose clock is off most, by its last report; absent without a report."),
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.phase, m.since, m.waits, m.counted, m.connected, m.unacknowledged, m.offset} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	s := m.rotator.known()
	for _, phase := range phases {
		gauge(m.phase, oneIf(phase == s.Phase), string(phase))
	}
	since := 0.0
	if at := m.rotator.since(s); !at.IsZero() {
		since = float64(at.Unix())
	}
	gauge(m.since, since)
	for _, gate := range []Gate{BeforeActivate, BeforeRevoke} {
		gauge(m.waits, oneIf(gate == s.Gate)*float64(len(s.Waits)), string(gate))
	}
	f := m.rotator.world().summary(m.rotator.o.Authority.Bundle().Sequence)
	gauge(m.counted, float64(f.agents))
	gauge(m.connected, float64(f.connected))
	gauge(m.unacknowledged, float64(f.unacknowledged))
	if f.reported {
		gauge(m.offset, f.offset.Seconds())
	}
}

func oneIf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// known is the status of the rotation that Run saw last. Unlike Status it does
// not read the store, which a scrape must not wait for.
func (r *Rotator) known() Status {
	r.mu.Lock()
	op := r.last
	r.mu.Unlock()
	if op.ID == "" {
		return Status{}
	}
	return r.status(&op)
}

// since is when the phase of s began.
func (r *Rotator) since(s Status) time.Time {
	switch op := s.Operation; {
	case op == nil:
		return time.Time{}
	case s.Phase == Preparing:
		return op.StartedAt
	case s.Phase == Publishing:
		return movedAt(r.find(s.To), ca.Prepared)
	case s.Phase == Reissuing:
		return movedAt(r.find(s.To), ca.Active)
	case s.Phase == Aborting && op.Abort != nil:
		return op.Abort.At
	case op.UnderWay(): // it has come to its end and that is about to be written
		return time.Now()
	default:
		return op.EndedAt
	}
}

// movedAt is when the root came into the state, the last time.
func movedAt(root ca.Root, to ca.State) time.Time {
	for _, m := range slices.Backward(root.Moves) {
		if m.To == to {
			return m.At
		}
	}
	return root.CreatedAt
}

// fleetSummary is the fleet in numbers.
type fleetSummary struct {
	agents, connected, unacknowledged int
	// offset is the largest distance of a clock, of those that reported one.
	offset   time.Duration
	reported bool
}

func (w World) summary(sequence uint64) (s fleetSummary) {
	for i := range w.Fleet {
		a := &w.Fleet[i]
		if !w.counts(a) {
			continue
		}
		s.agents++
		if a.Connected {
			s.connected++
		}
		if a.AcknowledgedSequence < sequence {
			s.unacknowledged++
		}
		if !a.AgentTime.IsZero() {
			s.offset, s.reported = max(s.offset, a.ClockOffset.Abs()), true
		}
	}
	return s
}

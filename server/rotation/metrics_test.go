package rotation_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/server/rotation"
)

// series compares all series of one metric.
func (s *site) series(name, want string) {
	s.t.Helper()
	families, err := s.registry.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			label := ""
			for _, l := range m.GetLabel() {
				label += l.GetValue() + "="
			}
			got = append(got, fmt.Sprintf("%s%.0f", label, m.GetGauge().GetValue()))
		}
	}
	if text := strings.Join(got, " "); text != want {
		s.t.Errorf("%s: got %q, want %q", name, text, want)
	}
}

// A rotation that stands still is seen from its phase and since when it is in
// that, also after a restart of the server.
func TestMetricsTellTheRotation(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a", "b", "c")
		s.after(time.Second)
		phase := func(want string, since time.Time) {
			t.Helper()
			values := "aborted=0 aborting=0 done=0 preparing=0 publishing=0 reissuing=0"
			s.series("assay_rotation_phase", strings.Replace(values, want+"=0", want+"=1", 1))
			at := int64(0)
			if !since.IsZero() {
				at = since.Unix()
			}
			s.series("assay_rotation_phase_since_timestamp_seconds", fmt.Sprint(at))
		}
		phase("none", time.Time{})
		s.series("assay_rotation_gate_waits", "activate=0 revoke=0")

		s.agent("b", func(a *agent) { a.asleep = true })
		begun := time.Now()
		s.begin(0)
		s.after(3 * time.Hour)
		phase("publishing", begun)
		s.series("assay_rotation_gate_waits", "activate=1 revoke=0")
		s.series("assay_fleet_agents_unacknowledged", "1")

		s.kill()
		s.start()
		s.after(time.Minute)
		phase("publishing", begun)

		s.agent("b", func(a *agent) { a.status.AcknowledgedSequence = s.authority.Bundle().Sequence })
		s.after(5 * time.Second)
		s.agent("c", func(a *agent) { a.asleep = true })
		st := s.after(0)
		if st.Phase != rotation.Reissuing {
			t.Fatalf("%+v", st)
		}
		activated := time.Now()
		s.after(time.Hour)
		s.series("assay_rotation_phase", "aborted=0 aborting=0 done=0 preparing=0 publishing=0 reissuing=1")
		s.series("assay_rotation_gate_waits", "activate=0 revoke=1")
		if at := s.gauge("assay_rotation_phase_since_timestamp_seconds"); at.After(activated) || at.Before(activated.Add(-6*time.Second)) {
			t.Errorf("re-issuing since %v, and the root was activated at about %v", at, activated)
		}

		if _, err := s.rotator.Abort(t.Context(), s.request()); err != nil {
			t.Fatal(err)
		}
		aborted := time.Now()
		s.after(time.Minute)
		phase("aborting", aborted)
		s.agent("b", func(a *agent) { a.asleep = false })
		s.agent("c", func(a *agent) { a.asleep = false })
		st = s.after(5 * time.Second)
		phase("aborted", st.Operation.EndedAt)
		s.series("assay_rotation_gate_waits", "activate=0 revoke=0")

		s.begin(0)
		st = s.after(5 * time.Second)
		phase("done", st.Operation.EndedAt)
	})
}

// Who counts is who a gate waits for, and nobody is named.
func TestMetricsTellTheFleet(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.series("assay_fleet_agents", "0")
		s.series("assay_fleet_clock_offset_max_seconds", "")
		s.join("a", "behind", "banned", "gone", "silent")
		s.after(time.Second)
		s.fleet()
		said := func(name string, offset time.Duration, change func(*agent)) {
			s.agent(name, func(a *agent) {
				a.asleep, a.status.AgentTime, a.status.ClockOffset = true, time.Now().Add(offset), offset
				change(a)
			})
		}
		said("a", 2*time.Second, func(*agent) {})
		said("behind", -40*time.Second, func(a *agent) { a.status.AcknowledgedSequence, a.status.Connected = 0, false })
		said("banned", time.Hour, func(a *agent) { a.status.Banned, a.status.AcknowledgedSequence = true, 0 })
		said("gone", time.Hour, func(a *agent) { a.status.NotAfter, a.status.AcknowledgedSequence = time.Now().Add(-61*time.Minute), 0 })
		s.series("assay_fleet_agents", "3")
		s.series("assay_fleet_agents_connected", "2")
		s.series("assay_fleet_agents_unacknowledged", "1")
		s.series("assay_fleet_clock_offset_max_seconds", "40")

		families, err := s.registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if strings.Contains(f.String(), "join_token") {
				t.Errorf("an agent is named: %v", f)
			}
		}
	})
}

func (s *site) gauge(name string) time.Time {
	s.t.Helper()
	families, err := s.registry.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return time.Unix(int64(f.GetMetric()[0].GetGauge().GetValue()), 0)
		}
	}
	return time.Time{}
}

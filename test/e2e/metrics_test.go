//go:build e2e

package e2e

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/test/harness"
)

// What the alerts on a rotation go by, from the real server: an agent that is
// stopped keeps a rotation in its phase and is counted, until it goes on.
func TestMetricsShowARotationThatWaits(t *testing.T) {
	s := newSite(t, minuteTTL)
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	shows := func(series string, want float64) {
		t.Helper()
		s.Server.Eventually(time.Minute, series, func() error {
			if got := harness.Metric(t, s.Ops, series); got != want {
				return fmt.Errorf("it is %v, want %v", got, want)
			}
			return nil
		})
	}
	shows("assay_server_ready", 1)
	shows("assay_fleet_agents", 1)
	shows("assay_fleet_agents_connected", 1)
	shows("assay_fleet_agents_unacknowledged", 0)
	s.Server.Eventually(time.Minute, "a report", func() error {
		if offset := harness.Metric(t, s.Ops, "assay_fleet_clock_offset_max_seconds"); offset <= 0 || offset > 60 {
			return fmt.Errorf("the agent on the same machine has a clock that is %v s off", offset)
		}
		return nil
	})

	a.Signal(syscall.SIGSTOP)
	s.CLI("root", "rotate", "--yes", "--detach")
	shows(`assay_rotation_phase{phase="publishing"}`, 1)
	shows(`assay_rotation_gate_waits{gate="activate"}`, 1)
	shows("assay_fleet_agents_unacknowledged", 1)
	since := time.Unix(int64(harness.Metric(t, s.Ops, "assay_rotation_phase_since_timestamp_seconds")), 0)
	if age := time.Since(since); age < 0 || age > 10*time.Minute {
		t.Errorf("in its phase since %v", since)
	}
	a.Signal(syscall.SIGCONT)
	shows(`assay_rotation_phase{phase="done"}`, 1)
	shows("assay_fleet_agents_unacknowledged", 0)
	shows(`assay_rotation_gate_waits{gate="activate"}`, 0)
}

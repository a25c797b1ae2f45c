package server

import "testing"

// The gauge says what /readyz says, from before the start to after the end.
func TestReadyGaugeFollowsReadiness(t *testing.T) {
	h := start(t)
	want := func(when string, value float64) {
		t.Helper()
		if got := gauge(t, h.reg, "assay_server_ready"); got != value {
			t.Errorf("%s assay_server_ready is %v, want %v", when, got, value)
		}
	}
	want("while it serves,", 1)
	if err := h.rooms.audit.Close(); err != nil {
		t.Fatal(err)
	}
	want("without its audit log,", 0)
	h.stop()
	want("at the end,", 0)
}

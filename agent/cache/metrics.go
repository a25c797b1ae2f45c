package cache

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// metrics counts failures and, when asked, describes the cache as it is.
type metrics struct {
	cache        *Cache
	signFailures *prometheus.CounterVec
	syncFailures *prometheus.CounterVec

	connected, lastSync, entries, svids, earliest, sequence, authority, clockStep *prometheus.Desc
}

func newMetrics(reg prometheus.Registerer, c *Cache) *metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("assay_agent_"+name, help, labels, nil)
	}
	m := &metrics{
		cache: c,
		signFailures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_agent_sign_failures_total", Help: "X.509-SVIDs that the server did not sign when asked, by reason.",
		}, []string{"reason"}),
		syncFailures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_agent_sync_failures_total", Help: "Sync streams that ended with an error or could not be opened, by reason. bundle_rollback and server_untrusted need a human.",
		}, []string{"reason"}),
		connected: desc("sync_connected", "1 while the stream to the server is open."),
		lastSync:  desc("last_sync_timestamp_seconds", "When the agent's view was last known to be current, in seconds since 1970."),
		entries:   desc("entries", "Entries of this node."),
		svids:     desc("svids", "X.509-SVIDs held for workloads."),
		earliest:  desc("workload_svid_earliest_not_after_timestamp_seconds", "End of the workload X.509-SVID that ends first; absent while there is none."),
		sequence:  desc("bundle_sequence", "Sequence of the trust bundle that is served."),
		clockStep: desc("clock_step_seconds", "How far the machine's clock was set without the server's clock confirming it; 0 while it is believed."),
		authority: desc("authority_not_after_timestamp_seconds", "End of each root in the trust bundle that is served.", "authority"),
	}
	reg.MustRegister(m.signFailures, m.syncFailures, m)
	return m
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.connected, m.lastSync, m.entries, m.svids, m.earliest, m.sequence, m.authority, m.clockStep} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	s := m.cache.Status()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	connected := 0.0
	if s.Connected {
		connected = 1
	}
	gauge(m.connected, connected)
	unix := func(t time.Time) float64 {
		if t.IsZero() {
			return 0
		}
		return float64(t.Unix())
	}
	gauge(m.lastSync, unix(s.LastSync))
	gauge(m.entries, float64(s.Entries))
	gauge(m.svids, float64(s.SVIDs))
	if !s.EarliestNotAfter.IsZero() {
		gauge(m.earliest, unix(s.EarliestNotAfter))
	}
	gauge(m.sequence, float64(s.BundleSequence))
	gauge(m.clockStep, m.cache.clock.Step().Seconds())
	m.cache.mu.Lock()
	b := m.cache.bundle
	m.cache.mu.Unlock()
	if b == nil {
		return
	}
	for _, a := range b.Authorities {
		gauge(m.authority, unix(a.Certificate.NotAfter), a.ID)
	}
}

// reasonLabel maps a reason, which comes over the wire, to a closed set.
func reasonLabel(err error) string {
	switch reason := fault.ReasonOf(err); reason {
	case agentv1.ReasonEntryNotAuthorized, "no_such_workload_on_node", "svid_invalid", "bundle_rollback", "bundle_invalid",
		"sync_protocol", agentv1.ReasonAgentBanned, agentv1.ReasonAgentUnknown, agentv1.ReasonAgentSVIDNotActive,
		"limit_signatures", "limit_overload", "limit_sync_opens", "audit_full", "store_full", "disk_full",
		"server_unreachable", "server_untrusted":
		return reason
	}
	return fault.KindOf(err).Error()
}

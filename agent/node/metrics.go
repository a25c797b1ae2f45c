package node

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	notAfter prometheus.Gauge
	attempts *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		notAfter: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "assay_agent_svid_not_after_timestamp_seconds",
			Help: "When the agent's own X.509-SVID ends, in seconds since 1970; 0 before it has one.",
		}),
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_agent_node_attempts_total",
			Help: "Attempts to prove the node to the server, by step (pin, join_token, rejoin, x509pop, connect, renew) and result (ok, failed).",
		}, []string{"step", "result"}),
	}
	reg.MustRegister(m.notAfter, m.attempts)
	return m
}

func (m *metrics) attempt(step string, err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	m.attempts.WithLabelValues(step, result).Inc()
}

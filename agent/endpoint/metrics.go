package endpoint

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// reasons are the values of the label; any other becomes "other", so that the
// set stays closed whatever attestors say.
var reasons = []string{
	"attestation_failed", "caller_changed", "caller_gone", "caller_unresolvable", "load_shed", "no_identity", "not_synced",
	"request_missing", "resource_names_invalid", "resource_unknown", "response_invalid", "response_too_large", "shutting_down",
	"stream_stalled", "svid_expired_server_unreachable", "svid_pending", "too_many_groups", "type_url_unknown",
}

type metrics struct {
	streams      *prometheus.GaugeVec
	denials      map[string]prometheus.Counter
	updates      map[verdict]prometheus.Counter
	propagation  prometheus.Histogram
	acceptErrors prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, g *gate) *metrics {
	m := &metrics{
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "assay_workload_streams", Help: "Open streams of the Workload API and SDS, by method.",
		}, []string{"method"}),
		denials: map[string]prometheus.Counter{},
		propagation: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "assay_propagation_seconds", Help: "From the commit of an entry at the server to the workload's stream, by the clocks of both.",
			Buckets: []float64{.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60, 300, 3600},
		}),
		acceptErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "assay_workload_accept_errors_total", Help: "Connections that could not be accepted, mostly for lack of descriptors.",
		}),
	}
	waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "assay_workload_held", Help: "Callers that wait for an identity.",
	}, func() float64 { return float64(g.count(held)) })
	spent := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "assay_workload_descriptors", Help: "Open files spent on callers of the Workload API and SDS.",
	}, func() float64 { return float64(g.count(descriptors)) })
	denials := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "assay_workload_denials_total", Help: "Connections and streams of the Workload API and SDS that were refused or ended by the agent, by reason.",
	}, []string{"reason"})
	for _, r := range append(reasons, "other") {
		m.denials[r] = denials.WithLabelValues(r)
	}
	updates := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "assay_sds_updates_total", Help: "SDS responses that Envoy took (ack) or rejected (nack); it goes on with what it had before then.",
	}, []string{"result"})
	m.updates = map[verdict]prometheus.Counter{acked: updates.WithLabelValues("ack"), nacked: updates.WithLabelValues("nack")}
	reg.MustRegister(m.streams, m.propagation, m.acceptErrors, waiting, spent, denials, updates)
	return m
}

func (m *metrics) denied(err error) {
	c := m.denials[fault.ReasonOf(err)]
	if c == nil {
		c = m.denials["other"]
	}
	c.Inc()
}

// propagated notes how long an entry took, unless the clocks of server and
// agent make nonsense of it.
func (m *metrics) propagated(d time.Duration) {
	if d >= 0 && d <= time.Hour {
		m.propagation.Observe(d.Seconds())
	}
}

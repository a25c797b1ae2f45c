package istioca

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/pkg/fault"
)

type metrics struct {
	requests       *prometheus.CounterVec
	impersonations *prometheus.CounterVec
	reviews        *prometheus.HistogramVec
	reg            prometheus.Registerer
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		reg: reg,
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_istio_requests_total",
			Help: "Requests for certificates by the proxies of a mesh, by what became of them (issued, refused, failed) and why.",
		}, []string{"result", "reason"}),
		impersonations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_istio_impersonations_total",
			Help: "Requests by node proxies for the identity of a pod, by what became of them (issued, refused, failed).",
		}, []string{"result"}),
		reviews: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "assay_istio_token_review_seconds", Help: "How long a cluster's API server took to review a token.",
			Buckets: []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5},
		}, []string{"cluster"}),
	}
	for _, c := range []prometheus.Collector{m.requests, m.impersonations, m.reviews} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	// What has not happened yet is told too, so that the first time is an increase.
	m.requests.WithLabelValues("issued", "ok")
	for _, result := range []string{"issued", "refused", "failed"} {
		m.impersonations.WithLabelValues(result)
	}
	return m, nil
}

// watch shows whether a cluster is asked at present.
func (m *metrics) watch(cluster string, b *breaker) error {
	return m.reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "assay_istio_token_review_breaker_open", ConstLabels: prometheus.Labels{"cluster": cluster},
		Help: "1 while the cluster's API server gives no answers about tokens, so that proxies are told to come again.",
	}, func() float64 {
		if b.open() {
			return 1
		}
		return 0
	}))
}

// count notes what became of a request.
func (m *metrics) count(err error, impersonated bool) {
	result, reason := "issued", "ok"
	if err != nil {
		result, reason = "refused", fault.ReasonOf(err)
		if cause := fault.CauseOf(err); cause != "" {
			reason = cause
		}
		switch fault.KindOf(err) {
		case fault.NotReady, fault.Internal:
			result = "failed"
		}
	}
	m.requests.WithLabelValues(result, reason).Inc()
	if impersonated {
		m.impersonations.WithLabelValues(result).Inc()
	}
}

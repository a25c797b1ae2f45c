package ca

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics counts what was signed and describes the authorities. The latter is
// read from the current state at every scrape, so that no series outlives what
// it describes.
type metrics struct {
	signed *prometheus.CounterVec

	authority *Authority
	notAfter  *prometheus.Desc
	state     *prometheus.Desc
	issuer    *prometheus.Desc
	sequence  *prometheus.Desc
}

func newMetrics(reg prometheus.Registerer, a *Authority) (*metrics, error) {
	domain := prometheus.Labels{"trust_domain": a.td.Name()}
	m := &metrics{
		authority: a,
		signed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_x509_svids_signed_total",
			Help: "X.509-SVIDs signed, by kind.",
		}, []string{"kind"}),
		notAfter: prometheus.NewDesc("assay_authority_not_after_timestamp_seconds",
			"End of an authority in the bundle.", []string{"use", "authority"}, domain),
		state: prometheus.NewDesc("assay_authority_state",
			"1 for the state that an authority in the bundle is in, else 0.", []string{"use", "authority", "state"}, domain),
		issuer: prometheus.NewDesc("assay_issuer_not_after_timestamp_seconds",
			"End of this server's issuer.", []string{"issuer"}, domain),
		sequence: prometheus.NewDesc("assay_bundle_sequence",
			"Sequence number of the trust bundle.", nil, nil),
	}
	for _, kind := range kindNames {
		m.signed.WithLabelValues(kind)
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.signed, m} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics of the authority: %w", err)
		}
	}
	return m, nil
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.notAfter, m.state, m.issuer, m.sequence} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	bundle := m.authority.Bundle()
	gauge(m.sequence, float64(bundle.Sequence))
	for _, root := range bundle.Roots {
		gauge(m.notAfter, float64(root.Certificate.NotAfter.Unix()), "x509", root.ID)
		for _, s := range states {
			value := 0.0
			if s == root.State {
				value = 1
			}
			gauge(m.state, value, "x509", root.ID, string(s))
		}
	}
	if info := m.authority.Issuer(); info.ID != "" {
		gauge(m.issuer, float64(info.NotAfter.Unix()), info.ID)
	}
}

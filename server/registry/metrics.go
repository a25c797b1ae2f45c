package registry

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	redeemed *prometheus.CounterVec
}

// newMetrics registers the metrics of r. Sizes are read from the mirror when
// they are collected.
func newMetrics(reg prometheus.Registerer, r *Registry) *metrics {
	m := &metrics{
		redeemed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_join_tokens_redeemed_total",
			Help: "Attempts to redeem a join token: ok, repeated (same key, answer lost), invalid, banned or failed.",
		}, []string{"result"}),
	}
	for _, result := range []string{redeemedOK, redeemedAgain, redeemedInvalid, redeemedBanned, redeemedFailed} {
		m.redeemed.WithLabelValues(result)
	}
	reg.MustRegister(m.redeemed, newCollector(r))
	return m
}

// collector reads the mirror.
type collector struct {
	registry                            *Registry
	entries, agents, revision, earliest *prometheus.Desc
	firstExpiry                         *prometheus.Desc
}

func newCollector(r *Registry) *collector {
	return &collector{
		registry: r,
		entries: prometheus.NewDesc("assay_registry_entries",
			"Registration entries in the store, expired ones included.", nil, nil),
		agents: prometheus.NewDesc("assay_registry_agents",
			"Agents on record: current (unexpired SVID), expired, banned, or new (none used yet).", []string{"state"}, nil),
		revision: prometheus.NewDesc("assay_registry_revision",
			"Newest revision of the store that this server has applied.", nil, nil),
		earliest: prometheus.NewDesc("assay_agent_svid_earliest_not_after_timestamp_seconds",
			"When the first of the current agents' SVIDs ends, in Unix time; absent without current agents.", nil, nil),
		firstExpiry: prometheus.NewDesc("assay_workload_svid_earliest_not_after_timestamp_seconds",
			"When the first workload would lose its identity if no server answered any more, by what agents report; absent while they report none.", nil, nil),
	}
}

func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.entries, c.agents, c.revision, c.earliest, c.firstExpiry} {
		ch <- d
	}
}

func (c *collector) Collect(ch chan<- prometheus.Metric) {
	s := c.registry.mirror.summary(time.Now())
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(c.entries, float64(s.entries))
	gauge(c.revision, float64(s.revision))
	gauge(c.agents, float64(s.current), "current")
	gauge(c.agents, float64(s.expired), "expired")
	gauge(c.agents, float64(s.banned), "banned")
	gauge(c.agents, float64(s.unused), "new")
	if !s.earliest.IsZero() {
		gauge(c.earliest, float64(s.earliest.Unix()))
	}
	if _, at := c.registry.FirstExpiry(time.Now()); !at.IsZero() {
		gauge(c.firstExpiry, float64(at.Unix()))
	}
}

// summary is the mirror in numbers.
type summary struct {
	revision                         int64
	entries                          int
	current, expired, banned, unused int
	earliest                         time.Time
}

func (m *mirror) summary(now time.Time) summary {
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := summary{revision: m.revision, entries: len(m.entries)}
	for _, a := range m.agents {
		ends := a.Ends()
		switch {
		case a.Banned:
			s.banned++
		case a.ActiveSerial == "":
			s.unused++
		case !ends.After(now):
			s.expired++
		default:
			s.current++
			if s.earliest.IsZero() || ends.Before(s.earliest) {
				s.earliest = ends
			}
		}
	}
	return s
}

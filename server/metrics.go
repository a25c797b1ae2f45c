package server

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/pkg/rpc"
)

type metrics struct {
	svidNotAfter prometheus.Gauge
	rpc          *rpc.Metrics
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		svidNotAfter: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "assay_server_svid_not_after_timestamp_seconds",
			Help: "When the server's own X.509-SVID ends, in Unix time.",
		}),
		rpc: rpc.NewMetrics(reg),
	}
	reg.MustRegister(m.svidNotAfter)
	return m
}

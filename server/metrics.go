package server

import (
	"context"

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

// newReadyGauge tells what ready tells, whenever it is collected.
func newReadyGauge(ready func(context.Context) error) prometheus.GaugeFunc {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "assay_server_ready",
		Help: "1 while the server can sign and keeps its audit log and store, as /readyz says, else 0.",
	}, func() float64 {
		if ready(context.Background()) != nil {
			return 0
		}
		return 1
	})
}

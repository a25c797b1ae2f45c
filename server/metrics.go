package server

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/pkg/rpc"
)

type metrics struct {
	svidNotAfter prometheus.Gauge
	refused      *prometheus.CounterVec
	rpc          *rpc.Metrics
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		svidNotAfter: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "assay_server_svid_not_after_timestamp_seconds",
			Help: "When the server's own X.509-SVID ends, in Unix time.",
		}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_x509_svid_refusals_total",
			Help: "X.509-SVIDs for workloads that an agent asked for and was refused, by reason.",
		}, []string{"reason"}),
		rpc: rpc.NewMetrics(reg),
	}
	reg.MustRegister(m.svidNotAfter, m.refused)
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

package rpc

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Metrics counts RPCs over all servers of a process.
type Metrics struct {
	requests   *prometheus.CounterVec
	denials    *prometheus.CounterVec
	limits     *prometheus.CounterVec
	handshakes *prometheus.CounterVec
}

// NewMetrics registers the RPC metrics at reg.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_rpc_requests_total", Help: "RPCs that ended, by socket, method and gRPC code.",
		}, []string{"server", "method", "code"}),
		denials: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_rpc_denials_total", Help: "RPCs refused with InvalidArgument, Unauthenticated or PermissionDenied, by socket and reason.",
		}, []string{"server", "reason"}),
		limits: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_limit_refusals_total", Help: "RPCs refused with ResourceExhausted, and connections closed for a limit, by socket and reason.",
		}, []string{"server", "reason"}),
		handshakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "assay_rpc_handshakes_failed_total",
			Help: "Connections that did not get past their TLS handshake, by socket and reason: svid_invalid for a certificate that is no X.509-SVID of the trust domain, tls for all else.",
		}, []string{"server", "reason"}),
	}
	reg.MustRegister(m.requests, m.denials, m.limits, m.handshakes)
	return m
}

// LimitReached counts a connection that was closed for a limit.
func (m *Metrics) LimitReached(server, reason string) {
	if m != nil {
		m.limits.WithLabelValues(server, reason).Inc()
	}
}

// HandshakeFailed counts a connection that did not get past its handshake.
func (m *Metrics) HandshakeFailed(server string, err error) {
	if m == nil {
		return
	}
	reason := "tls"
	if _, ok := errors.AsType[*fault.Fault](err); ok {
		reason = fault.ReasonOf(err)
	}
	m.handshakes.WithLabelValues(server, reason).Inc()
}

func (m *Metrics) observe(server, method string, err error) {
	if m == nil {
		return
	}
	code := "OK"
	if err != nil {
		kind := fault.KindOf(err)
		code = fault.Code(kind).String()
		switch kind {
		case fault.Invalid, fault.Unauthenticated, fault.Denied:
			m.denials.WithLabelValues(server, fault.ReasonOf(err)).Inc()
		case fault.Exhausted:
			m.limits.WithLabelValues(server, fault.ReasonOf(err)).Inc()
		}
	}
	m.requests.WithLabelValues(server, method, code).Inc()
}

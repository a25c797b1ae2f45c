package kube

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// collector reads the indexes when metrics are collected.
type collector struct {
	clusters             *Clusters
	usable, nodes, known *prometheus.Desc
	published, rootMaps  *prometheus.Desc
	rootMapWrites        *prometheus.Desc
}

// Register adds the metrics of the clusters, if there are any.
func (c *Clusters) Register(reg prometheus.Registerer) error {
	if len(c.byName) == 0 {
		return nil
	}
	return reg.Register(&collector{
		clusters: c,
		usable: prometheus.NewDesc("assay_kubernetes_pod_index_usable",
			"1 while the server knows which pods run in the cluster; else it signs nothing for them.", []string{"cluster"}, nil),
		nodes: prometheus.NewDesc("assay_kubernetes_nodes", "Nodes of the cluster, by its API server.", []string{"cluster"}, nil),
		known: prometheus.NewDesc("assay_kubernetes_pods", "Pods of the cluster, by its API server, ended ones included.", []string{"cluster"}, nil),
		published: prometheus.NewDesc("assay_kubernetes_bundle_published",
			"1 while the cluster's ConfigMap has the current trust bundle, by the last look; no series without bundle_config_map.", []string{"cluster"}, nil),
		rootMaps: prometheus.NewDesc("assay_istio_root_config_maps",
			"Namespaces of the cluster, by whether their ConfigMap istio-ca-root-cert has the trust bundle (current) or not (behind; at least 1 while that can't be watched); no series without root_config_maps.",
			[]string{"cluster", "state"}, nil),
		rootMapWrites: prometheus.NewDesc("assay_istio_root_config_map_writes_total",
			"How often a ConfigMap istio-ca-root-cert of the cluster was made or changed: once for each namespace and set of roots, unless somebody takes it back; no series without root_config_maps.",
			[]string{"cluster"}, nil),
	})
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.usable, c.nodes, c.known, c.published, c.rootMaps, c.rootMapWrites} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	for name, cl := range c.clusters.byName {
		cl.index.mu.Lock()
		usable, nodes, pods := 0.0, len(cl.index.nodes), len(cl.index.pods)
		if cl.index.usable(time.Now()) == nil {
			usable = 1
		}
		cl.index.mu.Unlock()
		ch <- prometheus.MustNewConstMetric(c.usable, prometheus.GaugeValue, usable, name)
		ch <- prometheus.MustNewConstMetric(c.nodes, prometheus.GaugeValue, float64(nodes), name)
		ch <- prometheus.MustNewConstMetric(c.known, prometheus.GaugeValue, float64(pods), name)
		if cl.publisher != nil {
			published := 0.0
			if cl.publisher.current.Load() {
				published = 1
			}
			ch <- prometheus.MustNewConstMetric(c.published, prometheus.GaugeValue, published, name)
		}
		if cl.rootMaps != nil {
			current, behind := cl.rootMaps.count()
			ch <- prometheus.MustNewConstMetric(c.rootMapWrites, prometheus.CounterValue, float64(cl.rootMaps.written()), name)
			ch <- prometheus.MustNewConstMetric(c.rootMaps, prometheus.GaugeValue, float64(current), name, "current")
			ch <- prometheus.MustNewConstMetric(c.rootMaps, prometheus.GaugeValue, float64(behind), name, "behind")
		}
	}
}

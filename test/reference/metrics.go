package reference

import (
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// Metric is one metric family.
type Metric struct {
	Name, Type, Help string
	Labels           []string
}

// Recorder is a registerer that remembers what was registered, also what has
// no series yet, which a scrape does not show.
type Recorder struct {
	*prometheus.Registry

	mu         sync.Mutex
	collectors []prometheus.Collector
}

// Register implements prometheus.Registerer.
func (r *Recorder) Register(c prometheus.Collector) error {
	r.mu.Lock()
	r.collectors = append(r.collectors, c)
	r.mu.Unlock()
	return r.Registry.Register(c)
}

// MustRegister implements prometheus.Registerer.
func (r *Recorder) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		if err := r.Register(c); err != nil {
			panic(err)
		}
	}
}

// Metrics lists what was registered, by name. It fails for a metric whose type
// neither its collector's Go type nor a series tells.
func (r *Recorder) Metrics() ([]Metric, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	gathered, err := r.Gather()
	if err != nil {
		return nil, err
	}
	live := map[string]string{}
	for _, f := range gathered {
		live[f.GetName()] = strings.ToLower(f.GetType().String())
	}
	var all []Metric
	for _, c := range r.collectors {
		for _, d := range descriptions(c) {
			m, err := describe(d)
			if err != nil {
				return nil, err
			}
			if m.Type = live[m.Name]; m.Type == "" {
				m.Type = typeOf(c)
			}
			if m.Type == "" {
				return nil, fmt.Errorf("%s has no series to tell its type by", m.Name)
			}
			all = append(all, m)
		}
	}
	return sorted(all), nil
}

// Gathered lists the families that start with prefix and have a series.
func Gathered(g prometheus.Gatherer, prefix string) ([]Metric, error) {
	families, err := g.Gather()
	if err != nil {
		return nil, err
	}
	var all []Metric
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), prefix) {
			continue
		}
		m := Metric{Name: f.GetName(), Type: strings.ToLower(f.GetType().String()), Help: f.GetHelp()}
		for _, l := range f.GetMetric()[0].GetLabel() {
			m.Labels = append(m.Labels, l.GetName())
		}
		all = append(all, m)
	}
	return all, nil
}

// shared takes out what both lists have.
func shared(a, b []Metric) (onlyA, onlyB, both []Metric) {
	same := func(m Metric) func(Metric) bool {
		return func(other Metric) bool { return reflect.DeepEqual(m, other) }
	}
	for _, m := range a {
		if slices.ContainsFunc(b, same(m)) {
			both = append(both, m)
		} else {
			onlyA = append(onlyA, m)
		}
	}
	for _, m := range b {
		if !slices.ContainsFunc(both, same(m)) {
			onlyB = append(onlyB, m)
		}
	}
	return onlyA, onlyB, both
}

func sorted(all []Metric) []Metric {
	slices.SortFunc(all, func(a, b Metric) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func descriptions(c prometheus.Collector) (all []*prometheus.Desc) {
	ch := make(chan *prometheus.Desc)
	go func() {
		defer close(ch)
		c.Describe(ch)
	}()
	for d := range ch {
		all = append(all, d)
	}
	return all
}

func typeOf(c prometheus.Collector) string {
	switch c := c.(type) {
	case *prometheus.CounterVec:
		return counterType
	case *prometheus.GaugeVec:
		return "gauge"
	case *prometheus.HistogramVec:
		return "histogram"
	case *prometheus.SummaryVec:
		return "summary"
	case prometheus.Metric:
		return metricType(c)
	}
	return ""
}

const counterType = "counter"

func metricType(m prometheus.Metric) string {
	var out dto.Metric
	if err := m.Write(&out); err != nil {
		return ""
	}
	switch {
	case out.Counter != nil:
		return counterType
	case out.Gauge != nil:
		return "gauge"
	case out.Histogram != nil:
		return "histogram"
	case out.Summary != nil:
		return "summary"
	}
	return ""
}

// A description tells what it holds in its text alone.
var descriptionText = regexp.MustCompile(`^Desc\{fqName: ("(?:[^"\\]|\\.)*"), help: ("(?:[^"\\]|\\.)*")(?:, unit: "[^"]*")?, constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)

func describe(d *prometheus.Desc) (Metric, error) {
	parts := descriptionText.FindStringSubmatch(d.String())
	if parts == nil {
		return Metric{}, fmt.Errorf("unexpected description %s", d)
	}
	name, err := strconv.Unquote(parts[1])
	if err != nil {
		return Metric{}, err
	}
	help, err := strconv.Unquote(parts[2])
	if err != nil {
		return Metric{}, err
	}
	m := Metric{Name: name, Help: help}
	for _, constant := range strings.Split(parts[3], ",") {
		if label, _, ok := strings.Cut(constant, "="); ok {
			m.Labels = append(m.Labels, label)
		}
	}
	for _, label := range strings.Split(parts[4], ",") {
		if label != "" {
			m.Labels = append(m.Labels, label)
		}
	}
	return m, nil
}

// MetricsPage is the page of all metrics: those of the daemons, and what every
// program of ours has.
func MetricsPage(server, agent, every []Metric) string {
	var b strings.Builder
	server, agent, both := shared(server, agent)
	both = sorted(append(both, every...))
	b.WriteString("# Metrics\n\n" +
		"Both daemons serve `/metrics` for Prometheus on `metrics.listen`: `127.0.0.1:9402` the server, `127.0.0.1:9403` the\n" +
		"agent. No label holds a SPIFFE ID or anything else that a peer can choose. What to alert on is in the\n" +
		"[operator's guide](../operating.md#watching-it).\n")
	for _, part := range []struct {
		heading string
		metrics []Metric
	}{{"Server", server}, {"Agent", agent}, {"Both", both}} {
		fmt.Fprintf(&b, "\n## %s\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n", part.heading)
		for _, m := range part.metrics {
			labels := ""
			if len(m.Labels) > 0 {
				labels = "`" + strings.Join(m.Labels, "`, `") + "`"
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.Name, m.Type, labels, cell(m.Help))
		}
	}
	b.WriteString("\nBesides them, the `go_` and `process_` metrics that Prometheus's library gives of every Go process.\n")
	return b.String()
}

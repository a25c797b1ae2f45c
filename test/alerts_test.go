package test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// ruleFile is what we look at of Prometheus's form.
type ruleFile struct {
	Groups []struct {
		Name  string
		Rules []alertRule
	}
}

type alertRule struct {
	Alert, Expr, For    string
	Labels, Annotations map[string]string
}

func alertRules(t *testing.T) (all []alertRule) {
	t.Helper()
	var file ruleFile
	if err := yaml.UnmarshalWithOptions([]byte(read(t, "../deploy/prometheus/assay.rules.yaml")), &file, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	for _, group := range file.Groups {
		all = append(all, group.Rules...)
	}
	if len(all) == 0 {
		t.Fatal("no alerts: the test proves nothing")
	}
	return all
}

// panel is a panel of a dashboard, with its queries.
type panel struct {
	Title   string
	Targets []struct{ Expr string }
}

func panels(t *testing.T) []panel {
	t.Helper()
	var dashboard struct{ Panels []panel }
	if err := json.Unmarshal([]byte(read(t, "../deploy/grafana/assay.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	if len(dashboard.Panels) == 0 {
		t.Fatal("no panels: the test proves nothing")
	}
	return dashboard.Panels
}

func read(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

var (
	metricRow = regexp.MustCompile("(?m)^\\| `(assay_\\w+)` \\| (\\w+) \\| ([^|]*) \\|")
	metricUse = regexp.MustCompile(`\b(assay_\w+)(?:\{([^}]*)\})?`)
	matcher   = regexp.MustCompile(`(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"`)
)

// unknown lists what a query names that is not in the reference of metrics,
// which comes from the running daemons: metrics, their labels, and reasons and
// phases.
func unknown(t *testing.T, query string) (out []string) {
	t.Helper()
	labels, types := map[string]string{}, map[string]string{}
	for _, row := range metricRow.FindAllStringSubmatch(read(t, "../docs/reference/metrics.md"), -1) {
		types[row[1]], labels[row[1]] = row[2], row[3]
	}
	reasons, phases := read(t, "../docs/reference/errors.md"), read(t, "../server/rotation/drive.go")
	for _, use := range metricUse.FindAllStringSubmatch(query, -1) {
		name := use[1]
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if base, ok := strings.CutSuffix(name, suffix); ok && types[base] == "histogram" {
				name = base
			}
		}
		if types[name] == "" {
			out = append(out, name)
			continue
		}
		for _, m := range matcher.FindAllStringSubmatch(use[2], -1) {
			if !strings.Contains(labels[name], "`"+m[1]+"`") {
				out = append(out, name+"{"+m[1]+"}")
			}
			for value := range strings.SplitSeq(m[2], "|") {
				if m[1] == "reason" && !strings.Contains(reasons, "\n### "+value+"\n") ||
					m[1] == "phase" && !strings.Contains(phases, `Phase = "`+value+`"`) {
					out = append(out, name+"{"+m[1]+"="+value+"}")
				}
			}
		}
	}
	return out
}

// An alert or a panel that asks for what no daemon tells is silent for ever.
func TestAlertsAndDashboardAskForWhatThereIs(t *testing.T) {
	for _, rule := range alertRules(t) {
		if names := unknown(t, rule.Expr); len(names) > 0 {
			t.Errorf("alert %s asks for %v, which nothing tells", rule.Alert, names)
		}
	}
	queries := 0
	for _, p := range panels(t) {
		for _, target := range p.Targets {
			if queries++; !strings.Contains(target.Expr, "assay_") {
				t.Errorf("panel %q has a query without a metric of ours: %s", p.Title, target.Expr)
			}
			if names := unknown(t, target.Expr); len(names) > 0 {
				t.Errorf("panel %q asks for %v, which nothing tells", p.Title, names)
			}
		}
	}
	if queries < 20 {
		t.Errorf("only %d queries in the dashboard: the test proves nothing", queries)
	}
	wrong := `rate(assay_nonsense_total[5m]) + assay_limit_refusals_total{cause="x", reason=~"store_full|no_such"} + assay_rotation_phase{phase="asleep"}`
	want := []string{"assay_nonsense_total", "assay_limit_refusals_total{cause}", "assay_limit_refusals_total{reason=no_such}", "assay_rotation_phase{phase=asleep}"}
	if got := unknown(t, wrong); !slices.Equal(got, want) {
		t.Errorf("found %v, want %v", got, want)
	}
}

// Who is woken by an alert reads what to do about it, and promtool tests each.
func TestAlertsSayWhatToDo(t *testing.T) {
	anchors := headings(read(t, "../docs/operating.md"))
	link := regexp.MustCompile(`docs/operating\.md#([\w-]+)`)
	files, err := filepath.Glob("../deploy/prometheus/*.test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var tests strings.Builder
	for _, file := range files {
		tests.WriteString(read(t, file))
	}
	seen := map[string]bool{}
	for _, rule := range alertRules(t) {
		if seen[rule.Alert] || !strings.HasPrefix(rule.Alert, "Assay") {
			t.Errorf("alert %q: the name is there twice, or not one of ours", rule.Alert)
		}
		seen[rule.Alert] = true
		if s := rule.Labels["severity"]; s != "warning" && s != "page" {
			t.Errorf("alert %s has severity %q", rule.Alert, s)
		}
		if rule.Annotations["summary"] == "" {
			t.Errorf("alert %s has no summary", rule.Alert)
		}
		to := link.FindStringSubmatch(rule.Annotations["description"])
		if to == nil || !anchors[to[1]] {
			t.Errorf("alert %s leads to no section of the operator's guide: %v", rule.Alert, to)
		}
		if !strings.Contains(tests.String(), rule.Alert+`"`) {
			t.Errorf("alert %s has no test that it fires", rule.Alert)
		}
	}
}

// headings is the anchors of a page.
func headings(page string) map[string]bool {
	anchors := map[string]bool{}
	for _, h := range regexp.MustCompile(`(?m)^##+ (.+)$`).FindAllStringSubmatch(page, -1) {
		text := regexp.MustCompile(`[^\w -]`).ReplaceAllString(strings.ToLower(h[1]), "")
		anchors[strings.ReplaceAll(text, " ", "-")] = true
	}
	return anchors
}

// Command dashboard writes the queries of a Grafana dashboard as rules for
// Prometheus, one for each, so that promtool can check them: Grafana shows a
// query that is none as an empty panel. `make alerts` runs it.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

type rule struct {
	Record string `json:"record"`
	Expr   string `json:"expr"`
}

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "dashboard:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	if len(args) != 1 {
		return fmt.Errorf("give the dashboard's file")
	}
	text, err := os.ReadFile(args[0])
	if err != nil {
		return fmt.Errorf("read dashboard: %w", err)
	}
	var dashboard struct {
		Panels []struct{ Targets []struct{ Expr string } }
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		return fmt.Errorf("read %s: %w", args[0], err)
	}
	var rules []rule
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			// What Grafana fills in.
			expr := strings.ReplaceAll(target.Expr, "$__rate_interval", "5m")
			rules = append(rules, rule{Record: fmt.Sprintf("dashboard:query:%d", len(rules)), Expr: expr})
		}
	}
	if len(rules) == 0 {
		return fmt.Errorf("%s has no queries", args[0])
	}
	type group struct {
		Name  string `json:"name"`
		Rules []rule `json:"rules"`
	}
	// JSON is YAML.
	return json.NewEncoder(out).Encode(map[string][]group{"groups": {{Name: "dashboard", Rules: rules}}})
}

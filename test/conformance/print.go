package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

var states = []string{"proven", "in part", "not applicable", "open", "unproven"}

// totals counts ids, not rows: a range counts for all that is in it.
func (l *list) totals() map[string]int {
	n := map[string]int{}
	for _, s := range l.sections {
		for _, r := range s.rows {
			n[r.state()] += len(r.ids)
		}
	}
	return n
}

func (l *list) summary() string {
	n := l.totals()
	var parts []string
	for _, state := range states {
		if n[state] == 0 {
			continue
		}
		parts = append(parts, fmt.Sprintf("%d %s", n[state], state))
	}
	return strings.Join(parts, ", ")
}

// text prints the table for people at a terminal.
func text(w io.Writer, ls lists) {
	for _, l := range ls {
		fmt.Fprintf(w, "%s: %s\n", l.title, l.summary())
		for _, s := range l.sections {
			fmt.Fprintf(w, "\n%s\n", s.title)
			table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
			for _, r := range s.rows {
				fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", r.label(), r.state(), r.what, r.reasons(test.String))
			}
			_ = table.Flush()
		}
		fmt.Fprintln(w)
	}
}

// reasons are the tests that prove a row, and what its hint says.
func (r *row) reasons(show func(test) string) string {
	var parts []string
	for _, t := range r.by {
		parts = append(parts, show(t))
	}
	all := strings.Join(parts, ", ")
	switch {
	case r.hint.why == "":
		return all
	case all == "":
		return r.hint.why
	}
	return r.hint.why + "; " + all
}

// markdown writes the page that is kept in docs/.
func markdown(w io.Writer, ls lists) {
	fmt.Fprint(w, `# Conformance

Made by `+"`make conformance`"+`, do not edit. Each row is a requirement in our own words: proven by the tests that name it,
proven in part, not applicable, or open. A test in brackets runs only with the build tags given.
`)
	for _, l := range ls {
		fmt.Fprintf(w, "\n## %s\n\n%s.\n", l.title, l.summary())
		if len(l.intro) > 0 {
			fmt.Fprintf(w, "\n%s\n", strings.Join(l.intro, "\n"))
		}
		for _, s := range l.sections {
			fmt.Fprintf(w, "\n### %s\n\n| id | what | state | by, or why |\n|---|---|---|---|\n", s.title)
			for _, r := range s.rows {
				fmt.Fprintf(w, "| %s | %s | %s | %s |\n", r.label(), escape(r.what), r.state(), escape(r.reasons(link)))
			}
		}
	}
}

// link shows a test with the file that it is in. A page in docs/ lies one below
// the project's directory.
func link(t test) string {
	shown := fmt.Sprintf("[%s](../%s/%s)", t.name, t.dir, t.file)
	if t.tags != "" {
		shown += " (" + t.tags + ")"
	}
	return shown
}

func escape(cell string) string { return strings.ReplaceAll(cell, "|", `\|`) }

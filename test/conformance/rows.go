package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A row is one requirement, or a range of them that stand or fall together.
type row struct {
	ids  []id
	what string
	hint hint
	by   []test // the tests that name it
}

// hint says why a row is not, or not wholly, proven.
type hint struct{ state, why string }

// The states that a hint can give to a row. A row without one has to be proven.
const (
	notApplicable = "na"
	open          = "open"
	inPart        = "part"
)

// mostUsers is how many tests may share what a comment in a helper says: with
// more of them it says nothing about any.
const mostUsers = 3

// A section is a titled group of rows.
type section struct {
	title string
	rows  []*row
}

// A list is one file of rows.
type list struct {
	title    string
	intro    []string
	sections []*section
}

type lists []*list

// readLists reads the rows files, in the order of their names. A line is
// "# title", "## section", "> introduction", "id | what" or "id | what | hint",
// where a hint is "na: why", "open: who closes it" or "part: what is missing".
func readLists(dir string) (lists, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.rows"))
	if err != nil {
		return nil, err
	}
	var all lists
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		one := &list{}
		for n, line := range strings.Split(string(content), "\n") {
			if err := one.add(strings.TrimSpace(line)); err != nil {
				return nil, fmt.Errorf("%s:%d: %w", file, n+1, err)
			}
		}
		all = append(all, one)
	}
	return all, nil
}

func (l *list) add(line string) error {
	switch {
	case line == "":
		return nil
	case strings.HasPrefix(line, "## "):
		l.sections = append(l.sections, &section{title: line[3:]})
		return nil
	case strings.HasPrefix(line, "# "):
		l.title = line[2:]
		return nil
	case strings.HasPrefix(line, "> "):
		l.intro = append(l.intro, line[2:])
		return nil
	case len(l.sections) == 0:
		return fmt.Errorf("a row before the first section: %q", line)
	}
	r, err := parseRow(line)
	if err == nil {
		last := l.sections[len(l.sections)-1]
		last.rows = append(last.rows, r)
	}
	return err
}

func parseRow(line string) (*row, error) {
	cells := strings.Split(line, " | ")
	if len(cells) < 2 || len(cells) > 3 {
		return nil, fmt.Errorf("a row has two or three cells: %q", line)
	}
	r := &row{what: cells[1]}
	for _, span := range mentions(cells[0]) {
		r.ids = append(r.ids, span.ids()...)
	}
	if len(r.ids) == 0 {
		return nil, fmt.Errorf("%q is no id", cells[0])
	}
	if len(cells) == 3 {
		state, why, ok := strings.Cut(cells[2], ": ")
		if !ok || !slices.Contains([]string{notApplicable, open, inPart}, state) {
			return nil, fmt.Errorf("%q is no hint", cells[2])
		}
		r.hint = hint{state, why}
	}
	return r, nil
}

// label is how a row is called: an id, or the two ends of a range.
func (r *row) label() string {
	first, last := r.ids[0], r.ids[len(r.ids)-1]
	if first == last {
		return first.String()
	}
	return fmt.Sprintf("%s..%d", first, last.number)
}

// state is what a reader sees.
func (r *row) state() string {
	switch r.hint.state {
	case notApplicable:
		return "not applicable"
	case open:
		return "open"
	case inPart:
		return "in part"
	}
	if len(r.by) == 0 {
		return "unproven"
	}
	return "proven"
}

// judge gives each row the tests that name it, and says what does not fit.
func (ls lists) judge(named []mention) (wrong []string) {
	rows := map[id]*row{}
	for _, l := range ls {
		for _, s := range l.sections {
			for _, r := range s.rows {
				for _, one := range r.ids {
					if rows[one] != nil {
						wrong = append(wrong, fmt.Sprintf("%s has two rows", one))
					}
					rows[one] = r
				}
			}
		}
	}
	for _, m := range named {
		if rows[m.span.first] == nil || rows[m.span.last] == nil {
			wrong = append(wrong, fmt.Sprintf("%s names %s, which has no row", m.where, m.span))
			continue
		}
		switch n := len(m.tests); {
		case n == 0:
			wrong = append(wrong, fmt.Sprintf("%s names %s, and no test is there", m.where, m.span))
		case n > mostUsers:
			wrong = append(wrong, fmt.Sprintf("%s names %s in what %d tests use: name it in the test that proves it", m.where, m.span, n))
		}
		for _, one := range m.span.ids() {
			if r := rows[one]; r != nil {
				r.by = append(r.by, m.tests...)
			}
		}
	}
	for _, l := range ls {
		for _, s := range l.sections {
			for _, r := range s.rows {
				slices.SortFunc(r.by, test.compare)
				r.by = slices.Compact(r.by)
				if complaint := r.complaint(); complaint != "" {
					wrong = append(wrong, r.label()+" "+complaint)
				}
			}
		}
	}
	return wrong
}

func (r *row) complaint() string {
	proven := len(r.by) > 0
	switch {
	case r.hint.state == "" && !proven:
		return "is named by no test, and has no hint why"
	case r.hint.state == inPart && !proven:
		return "is proven in part by no test"
	case (r.hint.state == open || r.hint.state == notApplicable) && proven:
		return "is " + r.state() + ", yet " + r.by[0].String() + " names it"
	}
	return ""
}

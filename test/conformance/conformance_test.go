package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestMentions(t *testing.T) {
	for text, want := range map[string]string{
		"":                              "",
		"nothing here: TLS-1, A-2, 3":   "",
		"WL-3":                          "WL-3",
		"a X509-12: b, ID-3 and NEG-60": "X509-12 ID-3 NEG-60",
		"WL-3..5, BUN-2 to BUN-4":       "WL-3..5 BUN-2..4",
		"WL-3, 4,7 and others":          "WL-3 WL-4 WL-7",
		"WL-3 to 5, 9":                  "WL-3..5 WL-9",
		"WL-3 to X509-5":                "WL-3 X509-5",
		"WL-3, ID-4, 5":                 "WL-3 ID-4 ID-5",
		"XWL-3 WL-3x WL-":               "",
		"NEG-99999999999999999999":      "NEG--1",
	} {
		var got []string
		for _, s := range mentions(text) {
			got = append(got, s.String())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: got %v, want %s", text, got, want)
		}
	}
}

// project lays out a project of one package and two rows files.
func project(t *testing.T, tests string, rows ...string) (root string) {
	t.Helper()
	root = t.TempDir()
	write := func(name, content string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("test/conformance/a.rows", "# A list\n> Of rows.\n\n## First\n"+strings.Join(rows, "\n")+"\n")
	write("pkg/a_test.go", "//go:build e2e\n\npackage a\n\nimport \"testing\"\n"+tests)
	write("docs/.keep", "")
	return root
}

func TestWhatDoesNotFitIsTold(t *testing.T) {
	const one = "func TestOne(t *testing.T) { // WL-1\n}\n"
	for name, c := range map[string]struct {
		tests string
		rows  []string
		want  []string // empty: all is well
	}{
		"proven":             {one, []string{"WL-1 | a"}, nil},
		"above the function": {"// WL-1\nfunc TestOne(t *testing.T) {}\n", []string{"WL-1 | a"}, nil},
		"in a table": {
			"var table = []int{\n1, // WL-1\n}\nfunc TestOne(t *testing.T) { _ = table }\n",
			[]string{"WL-1 | a"},
			nil,
		},
		"in a helper's table": {
			"var table = 1 // WL-1\nfunc help() int { return table }\nfunc TestOne(t *testing.T) { help() }\n",
			[]string{"WL-1 | a"},
			nil,
		},
		"by nobody": {"", []string{"WL-1 | a"}, []string{"WL-1 is named by no test"}},
		"a table of nobody": {
			"var table = 1 // WL-1\n",
			[]string{"WL-1 | a"},
			[]string{"no test is there", "WL-1 is named by no test"},
		},
		"a fuzz target's seeds": {
			"var table = 1 // WL-1\nfunc FuzzOne(f *testing.F) { _ = table }\n",
			[]string{"WL-1 | a"},
			[]string{"no test is there", "WL-1 is named by no test"},
		},
		"a helper of many": {"func help() { // WL-1\n}\nfunc TestA(t *testing.T) { help() }\nfunc TestB(t *testing.T) { help() }\n" +
			"func TestC(t *testing.T) { help() }\nfunc TestD(t *testing.T) { help() }\n", []string{"WL-1 | a"}, []string{"in what 4 tests use"}},
		"a string is no comment":  {"func TestOne(t *testing.T) { _ = \"WL-1\" }\n", []string{"WL-1 | a"}, []string{"WL-1 is named by no test"}},
		"unknown":                 {one, nil, []string{"pkg/a_test.go:6 names WL-1, which has no row"}},
		"open, with reason":       {"", []string{"WL-1 | a | open: later"}, nil},
		"open, yet proven":        {one, []string{"WL-1 | a | open: later"}, []string{"WL-1 is open, yet pkg.TestOne names it"}},
		"not applicable, yet":     {one, []string{"WL-1 | a | na: no"}, []string{"WL-1 is not applicable, yet pkg.TestOne names it"}},
		"in part":                 {one, []string{"WL-1 | a | part: the rest"}, nil},
		"in part by nobody":       {"", []string{"WL-1 | a | part: the rest"}, []string{"WL-1 is proven in part by no test"}},
		"a range, open":           {"", []string{"WL-1..3 | a | open: later"}, nil},
		"twice":                   {one, []string{"WL-1 | a", "WL-1 | b"}, []string{"WL-1 has two rows", "WL-1 is named by no test"}},
		"a range over a gap":      {"func TestOne(t *testing.T) { // WL-1..3\n}\n", []string{"WL-1 | a", "WL-3 | b"}, nil},
		"a range past the end":    {"func TestOne(t *testing.T) { // WL-1..3\n}\n", []string{"WL-1 | a"}, []string{"names WL-1..3, which has no row", "WL-1 is named by no test"}},
		"a row that is no row":    {"", []string{"WL-1"}, []string{"two or three cells"}},
		"a hint that is no hint":  {"", []string{"WL-1 | a | soon"}, []string{"is no hint"}},
		"an id that is none":      {"", []string{"XX-1 | a"}, []string{"is no id"}},
		"a broken file is no end": {"func {", nil, []string{"expected"}},
	} {
		t.Run(name, func(t *testing.T) {
			root := project(t, c.tests, c.rows...)
			got := complaints(root)
			if len(got) != len(c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
			for i := range min(len(got), len(c.want)) {
				if !strings.Contains(got[i], c.want[i]) {
					t.Errorf("got %q, want %q", got[i], c.want[i])
				}
			}
		})
	}
}

func complaints(root string) []string {
	all, err := readLists(filepath.Join(root, "test", "conformance"))
	if err != nil {
		return []string{err.Error()}
	}
	named, err := scan(root)
	if err != nil {
		return []string{err.Error()}
	}
	return all.judge(named)
}

func TestPageIsWrittenAndCheckedForDrift(t *testing.T) {
	root := project(t, "func TestOne(t *testing.T) { // WL-1\n}\n", "WL-1 | a | part: b", "WL-2..4 | c | open: d")
	page := filepath.Join(root, "docs", "page.md")
	var out strings.Builder
	if err := run(&out, root, page, ""); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "A list: 1 in part, 3 open") {
		t.Error(out.String())
	}
	content, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| WL-1 | a | in part | b; [TestOne](../pkg/a_test.go) (e2e) |\n", "| WL-2..4 | c | open | d |\n", "Of rows.\n", "## A list\n", "### First\n",
	} {
		if !slices.Contains(strings.SplitAfter(string(content), "\n"), want) {
			t.Errorf("no line %q in\n%s", want, content)
		}
	}
	if err := run(&out, root, "", page); err != nil {
		t.Errorf("fresh: %v", err)
	}
	if err := os.WriteFile(page, append(content, ' '), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(&out, root, "", page); err == nil {
		t.Error("a stale page passes")
	}
	if err := run(&out, root, "", page+".none"); err == nil {
		t.Error("a missing page passes")
	}
	if fmt.Sprint(complaints(root)) != "[]" {
		t.Error(complaints(root))
	}
}

// Package reference writes the pages of docs/reference from the source: what
// can be configured, typed, measured and go wrong. Tests compare the pages with
// what it writes, so that no page is older than the program; `make docs` writes
// them anew.
package reference

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
)

// TB is the part of testing.TB that Check uses.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Root is the project's directory for tests that lie two directories below it,
// which all who call Check do.
const Root = "../.."

// notice stands at the top of each page.
const notice = "<!-- Written by `make docs`, from the source: don't edit. -->\n\n"

// Check compares a page of docs/reference with what it should say, or writes it
// when update is set.
func Check(t TB, page, want string, update bool) {
	t.Helper()
	path := filepath.Join(Root, "docs", "reference", page)
	want = notice + strings.TrimRight(want, "\n") + "\n"
	if update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatalf("%v", err)
		}
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatalf("%v", err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v: run make docs", err)
	}
	if !bytes.Equal(got, []byte(want)) {
		t.Errorf("docs/reference/%s is not what the source says: run make docs and read the difference.\nFirst: %s", page, firstDifference(string(got), want))
	}
}

func firstDifference(got, want string) string {
	has, should := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(has), len(should)) {
		if has[i] != should[i] {
			return "it has\n  " + has[i] + "\nand should have\n  " + should[i]
		}
	}
	return "one ends before the other"
}

// cell makes text fit into a cell of a table.
func cell(text string) string {
	text = strings.ReplaceAll(text, "|", `\|`)
	text = strings.ReplaceAll(text, "<", "&lt;")
	return strings.Join(strings.Fields(text), " ")
}

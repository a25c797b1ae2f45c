package reference

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestErrorsReference(t *testing.T) {
	makers := makers(t)
	if len(makers) < 4 {
		t.Errorf("only %v make faults", makers)
	}
	reasons, err := Reasons(Root, makers, "cmd", "server", "agent", "pkg", "proto")
	if err != nil {
		t.Fatalf("%v\n(help Reasons to read it, or write the reason as a literal)", err)
	}
	meanings, err := KindMeanings(Root)
	if err != nil {
		t.Fatal(err)
	}
	Check(t, "errors.md", ErrorsPage(meanings, reasons), *update)
}

func makers(t *testing.T) map[string]Maker {
	t.Helper()
	makers, err := Makers(Root)
	if err != nil {
		t.Fatal(err)
	}
	return makers
}

func TestReasonsAreFoundThroughHelpersAndNeverGuessed(t *testing.T) {
	const head = "package x\n\nimport \"github.com/seed-caa81108/assay/pkg/fault\"\n\n"
	read := func(text string) ([]Reason, error) {
		root := t.TempDir()
		if err := os.WriteFile(filepath.Join(root, "x.go"), []byte(head+text), 0o600); err != nil {
			t.Fatal(err)
		}
		return Reasons(root, makers(t), ".")
	}
	got, err := read(`
const constant = "from_constant"

var global = fault.New(fault.NotReady, "global", "at the top")

func one(n int) error { return fault.Newf(fault.Invalid, "literal", "a %d of 100 %%", n) }
func two() error      { return helper(fault.Denied, "passed", "said") }
func three() error    { return helper(fault.Denied, constant, "said "+"too") }

func helper(kind fault.Kind, reason, why string) error { return fault.Wrap(kind, nil, reason, "it is "+why) }

func four(big bool) error {
	reason := "small"
	if big {
		reason = "big"
	}
	local := func(text string) error { return fault.New(fault.Invalid, reason, text) }
	return local("in a closure")
}

func handsOn(err error) error { return fault.New(fault.NotReady, fault.ReasonOf(err), "again") }
`)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, r := range got {
		lines = append(lines, r.Code+" "+r.Kind.Error()+" "+strings.Join(r.Texts, "/"))
	}
	want := []string{
		"big invalid in a closure", "from_constant denied it is said too", "global not_ready at the top",
		"literal invalid a … of 100 %", "passed denied it is said", "small invalid in a closure",
	}
	if !slices.Equal(lines, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
	for _, unknown := range []string{
		`func f(m map[string]string) error { return fault.New(fault.Invalid, m["x"], "text") }`,
		`func f(k fault.Kind) error { return fault.New(k, "reason", "text") }`,
		`func f(reason string) error { return fault.New(fault.Invalid, reason, "text") }`,
		`func f(what string) error { return fault.New(fault.Invalid, "a_"+what, "text") }`,
		`func f() error { return fault.New(fault.Nothing, "reason", "text") }`,
	} {
		if got, err := read(unknown); err == nil {
			t.Errorf("%s was read as %v", unknown, got)
		}
	}
}

package test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// files calls do with each Go file of the project that matches suffix.
func files(t *testing.T, suffix string, do func(path string, content []byte)) {
	t.Helper()
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "out" || d.Name() == ".git" || d.Name() == "bin"):
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, suffix):
			return nil
		}
		content, err := os.ReadFile(path)
		if err == nil {
			do(path, content)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A sleep in a test is a guess about other people's machines, except in a
// synctest bubble, where it takes no time. Who sleeps has bubbles in its
// package; that each sleep is in one shows in how long the tests take.
func TestSleepsAreInBubbles(t *testing.T) {
	sleeps, bubbles := map[string]bool{}, map[string]bool{}
	files(t, "_test.go", func(path string, content []byte) {
		dir := filepath.Dir(path)
		sleeps[dir] = sleeps[dir] || bytes.Contains(content, []byte("time."+"Sleep("))
		bubbles[dir] = bubbles[dir] || bytes.Contains(content, []byte(`"testing/synctest"`))
	})
	for dir, sleeping := range sleeps {
		if sleeping && !bubbles[dir] {
			t.Errorf("the tests of %s sleep, and have no synctest bubble", dir)
		}
	}
}

// Every test that is written runs.
func TestNothingIsSkipped(t *testing.T) {
	files(t, "_test.go", func(path string, content []byte) {
		for _, skip := range []string{"t.Skip" + "(", "t.Skip" + "f(", "t.Skip" + "Now(", "b.Skip" + "("} {
			if bytes.Contains(content, []byte(skip)) {
				t.Errorf("%s calls %s", path, skip)
			}
		}
	})
}

// Suites of their own are left out elsewhere by a tag, and make finds them by the
// names of their files.
func TestSuitesAreCalledByTheirTags(t *testing.T) {
	for _, tag := range []string{"long", "istio"} {
		found := false
		files(t, "_test.go", func(path string, content []byte) {
			constraint, _, _ := strings.Cut(string(content), "\n")
			tagged := strings.HasPrefix(constraint, "//go:build ") && strings.Contains(constraint, tag)
			if tagged != strings.HasSuffix(path, "_"+tag+"_test.go") {
				t.Errorf("%s: has the tag %s: %v", path, tag, tagged)
			}
			found = found || tagged
		})
		if !found {
			t.Errorf("nothing has the tag %s: the test proves nothing", tag)
		}
	}
}

// I1: the authority is the only road to a signature. Its key is opened, and
// certificates are made, in server/ca and nowhere else in the product.
func TestOnlyTheAuthoritySigns(t *testing.T) {
	found := false
	files(t, ".go", func(path string, content []byte) {
		if strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "bench/") || strings.HasPrefix(path, "../test/") {
			return
		}
		for _, power := range []string{"x509.CreateCertificate(", "KeyRef)", "keys.Open("} {
			if !bytes.Contains(content, []byte(power)) {
				continue
			}
			if filepath.Dir(path) != "../server/ca" {
				t.Errorf("%s has %s", path, power)
			}
			found = true
		}
	})
	if !found {
		t.Error("not even the authority signs: the test proves nothing")
	}
}

func TestFilesStayReadable(t *testing.T) {
	const most = 600
	files(t, ".go", func(path string, content []byte) {
		if strings.HasSuffix(path, ".pb.go") || strings.HasSuffix(path, "_test.go") {
			return
		}
		if n := bytes.Count(content, []byte("\n")); n > most {
			t.Errorf("%s has %d lines, at most %d are readable", path, n, most)
		}
	})
}

// The documents that name tests name real ones.
func TestDocumentsNameTestsThatExist(t *testing.T) {
	var source strings.Builder
	files(t, "_test.go", func(_ string, content []byte) { source.Write(content) })
	named := 0
	files(t, ".md", func(path string, content []byte) {
		for _, name := range regexp.MustCompile("`(Test[A-Z][A-Za-z0-9]*)`").FindAllSubmatch(content, -1) {
			if named++; !strings.Contains(source.String(), "\nfunc "+string(name[1])+"(") {
				t.Errorf("%s names %s, which does not exist", path, name[1])
			}
		}
	})
	if named < 20 {
		t.Errorf("only %d tests are named: the test proves nothing", named)
	}
}

// Decisions are cited by their number.
func TestDecisionsHaveNumbersOfTheirOwn(t *testing.T) {
	names, err := filepath.Glob("../docs/adr/[0-9]*.md")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	taken := map[string]string{}
	for _, name := range names {
		number, _, _ := strings.Cut(filepath.Base(name), "-")
		if other := taken[number]; other != "" {
			t.Errorf("%s and %s have the same number: give the newer one the next free", other, name)
		}
		taken[number] = name
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if want := "# " + strings.TrimLeft(number, "0") + ". "; !strings.HasPrefix(string(text), want) {
			t.Errorf("%s does not begin with %q", name, want)
		}
	}
}

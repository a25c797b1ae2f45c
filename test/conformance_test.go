package test

import (
	"os/exec"
	"testing"
)

// Each requirement is proven by a test that names it, or has a hint why not;
// the page in docs/ is what comes of that.
func TestConformanceTableIsTrueAndFresh(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "run", "./test/conformance", "-check", "docs/conformance.md")
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

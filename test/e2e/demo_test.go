//go:build e2e

package e2e

import (
	"os/exec"
	"strings"
	"testing"
)

// The README's first command, with binaries that are built already.
func TestDemo(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "../demo.sh", plain.built(t)).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"spiffe://example.org/demo", "svid.pem: OK", "reached the waiting client", "Done."} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the demo does not show %q:\n%s", want, out)
		}
	}
}

//go:build e2e && root

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// NEG-39: an agent that was told to need the host's PID namespace does not
// start in another one, where it could not tell its callers apart.
func TestAgentInAnotherPIDNamespaceDoesNotStart(t *testing.T) {
	s := newSite(t, "")
	for _, dir := range []string{"pub", "data", "run"} {
		if err := os.Mkdir(s.File(dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	config := s.Write("agent.yaml", fmt.Sprintf(`trust_domain: example.org
server:
  addresses: [127.0.0.1:1]
pin: %s
join_token_file: %s
sockets:
  dir: %s
data_dir: %s
run_dir: %s
metrics:
  listen: 127.0.0.1:%d
attestation:
  require_host_pid: true
`, strings.Repeat("ab", 32), s.Write("token", strings.Repeat("t", 43)), s.File("pub"), s.File("data"), s.File("run"), s.Ops))
	cmd := exec.CommandContext(t.Context(), "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
		filepath.Join(s.Bins, "assay-agent"), "run", "--config", config)
	out, _ := cmd.CombinedOutput() // the code says more
	if code := cmd.ProcessState.ExitCode(); code != 78 || !strings.Contains(string(out), "error: needs_host_pid: ") {
		t.Errorf("exit %d, %s", code, out)
	}
}

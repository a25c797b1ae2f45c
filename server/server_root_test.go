//go:build root

package server

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// NEG-60: who may operate is decided by uid and gid.
func TestOperatorNeedsToBeListed(t *testing.T) {
	h := start(t, func(c *Config) { c.Admin.UIDs, c.Admin.Group = []uint32{30001}, "30002" })
	if info, err := os.Stat(filepath.Dir(h.server.AdminSocket())); err != nil || info.Mode().Perm() != 0o750 || info.Sys().(*syscall.Stat_t).Gid != 30002 {
		t.Errorf("the socket's directory: %v, %v", info.Mode(), err)
	}
	// Let everybody come as far as the rule.
	for dir := filepath.Dir(h.server.AdminSocket()); dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(h.server.AdminSocket())
	if err != nil || info.Mode().Perm() != 0o660 || info.Sys().(*syscall.Stat_t).Gid != 30002 {
		t.Errorf("the socket: %v, %v", info.Mode(), err)
	}
	if err := os.Chmod(h.server.AdminSocket(), 0o666); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		uid, gid uint32
		want     codes.Code
	}{
		"root": {0, 0, codes.OK}, "listed": {30001, 7, codes.OK}, "group": {30003, 30002, codes.OK}, "stranger": {30004, 30004, codes.PermissionDenied},
	} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"ASSAY_TEST_OPERATOR_SOCKET=" + h.server.AdminSocket()}
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.uid, Gid: c.gid, NoSetGroups: false}}
		text, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		if got := codes.Code(cmd.ProcessState.ExitCode()); got != c.want {
			t.Errorf("%s: %v: %s", name, got, text)
		}
		if c.want != codes.OK && !strings.Contains(string(text), "operator_not_allowed") {
			t.Errorf("%s: %s", name, text)
		}
	}
	eventually(t, "audit of the refusal", 5*time.Second, func() bool {
		line := h.audited("call.refuse")
		return sub(line, "actor", "uid") == float64(30004) && sub(line, "result", "reason") == "operator_not_allowed"
	})
}

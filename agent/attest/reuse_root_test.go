//go:build root

package attest

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// The attack (NEG-36): a process connects and ends, and a victim is made to get
// its pid. An agent that then looks the pid up takes the connection, which the
// attacker may have handed on before it ended, for the victim's.
//
// It runs in a PID namespace of its own, where nothing else takes pids. A build
// with the tag nopidfd must fall for it, or the test would prove nothing.
func TestReusedPIDIsNotTheCaller(t *testing.T) {
	victim := filepath.Join(t.TempDir(), "victim")
	copyBinary(t, victim)
	c := startCaller(t, "reuse", victim, func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	})
	line, err := c.lines.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var tries, early, late int
	if _, err := fmt.Sscanf(line, "tries %d early %d late %d", &tries, &early, &late); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	t.Logf("%d pids used again; taken for the victim at the handshake %d times, at a later check %d times", tries, early, late)
	if tries != 2*reuses {
		t.Fatalf("the pid was used again %d times only", tries)
	}
	if pinned && early+late != 0 {
		t.Error("the attack works")
	}
	if !pinned && early == 0 {
		t.Error("the attack fails even without the pidfd: this test proves nothing")
	}
}

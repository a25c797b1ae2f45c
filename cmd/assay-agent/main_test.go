package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/test/harness"
)

const childVariable = "ASSAY_AGENT_TEST_CHILD"

// Run in a child, the test binary is the program: run hardens its process,
// which is not for the process of the tests.
func TestMain(m *testing.M) {
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	if os.Getenv(childVariable) == "" {
		return m.Run()
	}
	return daemon.Main(context.Background(), program(), os.Args[1:], os.Stdout, os.Stderr)
}

func execute(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = daemon.Main(t.Context(), program(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func freeAddress(t *testing.T) string {
	t.Helper()
	var ports harness.Ports
	return fmt.Sprintf("127.0.0.1:%d", ports.Free(t))
}

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestValidate(t *testing.T) {
	pin := "pin: " + strings.Repeat("ab", 32) + "\n"
	good := "trust_domain: example.org\nserver:\n  addresses: [ca.example.org:8443]\njoin_token_file: /etc/assay-agent/join.token\n" + pin
	path := writeConfig(t, good)
	if code, out, errs := execute(t, "validate", "--config", path); code != 0 || out != path+" is valid\n" {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
	for text, want := range map[string]string{
		"":                                "error: config_invalid: trust_domain ",
		good + pin:                        `line 6: key "pin" is given twice, first in line 5`,
		good + "limits:\n  streams: lots": "line 7: limits.streams: must be a number",
	} {
		if code, _, errs := execute(t, "validate", "--config", writeConfig(t, text)); code != 78 || !strings.Contains(errs, want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("exit %d: %s", code, errs)
		}
	}
}

// Without its server the agent stays up, says why it is not ready, and stops
// when told to.
func TestAgentWithoutItsServerIsAliveAndNotReady(t *testing.T) {
	dir, metrics := t.TempDir(), freeAddress(t)
	for _, sub := range []string{"data", "run", "public"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte(strings.Repeat("t", 43)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	config := writeConfig(t, fmt.Sprintf(`trust_domain: example.org
server:
  addresses: ["%s"]
pin: %s
join_token_file: %s
sockets:
  dir: %s/public
data_dir: %s/data
run_dir: %s/run
metrics:
  listen: %s
`, freeAddress(t), strings.Repeat("ab", 32), token, dir, dir, dir, metrics))

	cmd := exec.CommandContext(t.Context(), os.Args[0], "run", "--config", config)
	cmd.Env = append(os.Environ(), childVariable+"=1")
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	limit := time.After(20 * time.Second)
	for told := false; !told; {
		select {
		case err := <-exited:
			t.Fatalf("%v: %s", err, log.String())
		default:
			code, _, errs := execute(t, "healthcheck", "--config", config)
			if told = code == 69 && strings.HasPrefix(errs, "error: not_ready: not_attested: "); told {
				break
			}
			select {
			case <-limit:
				t.Fatalf("healthcheck says %d %q", code, errs)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-exited; err != nil {
		t.Errorf("%v: %s", err, log.String())
	}
	if !strings.HasSuffix(log.String(), "msg=stopped program=assay-agent\n") {
		t.Errorf("log ends otherwise: %s", log.String())
	}
}

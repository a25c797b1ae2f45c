package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
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

const childVariable = "ASSAY_SERVER_TEST_CHILD"

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

// place is a directory with a configuration for a new trust domain in it.
type place struct{ dir, config, metrics string }

func newPlace(t *testing.T) place {
	t.Helper()
	dir := t.TempDir()
	p := place{dir: dir, config: filepath.Join(dir, "server.yaml"), metrics: freeAddress(t)}
	for _, sub := range []string{"data", "run", "etc"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	text := fmt.Sprintf(`trust_domain: example.org
bootstrap: %s
seal_key_file: %s/etc/seal.key
data_dir: %s/data
admin:
  socket: %s/run/admin.sock
listen: 127.0.0.1:0
metrics:
  listen: %s
`, time.Now().UTC().Format(time.DateOnly), dir, dir, dir, p.metrics)
	if err := os.WriteFile(p.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func freeAddress(t *testing.T) string {
	t.Helper()
	var ports harness.Ports
	return fmt.Sprintf("127.0.0.1:%d", ports.Free(t))
}

func TestValidate(t *testing.T) {
	p := newPlace(t)
	if code, out, errs := execute(t, "validate", "--config", p.config); code != 0 || out != p.config+" is valid\n" {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
	for text, want := range map[string]string{
		"": "error: config_invalid: trust_domain is missing",
		"trust_domain: a.org\nlisten: 127.0.0.1:9402\n":       "error: config_invalid: listen and metrics.listen are the same address",
		"trust_domain: a.org\nlisten_: x\n":                   "error: config_invalid: " + p.config + `: line 2: unknown key "listen_"`,
		"trust_domain: a.org\nca:\n  x509_svid_ttl: 1 hour\n": "error: config_invalid: " + p.config + `: line 3: ca.x509_svid_ttl: "1 hour" is not a duration`,
	} {
		if err := os.WriteFile(p.config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if code, _, errs := execute(t, "validate", "--config", p.config); code != 78 || !strings.HasPrefix(errs, want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("exit %d: %s", code, errs)
		}
	}
}

func TestSealKeyIsNeverOverwritten(t *testing.T) {
	file := filepath.Join(t.TempDir(), "seal.key")
	if code, _, errs := execute(t, "seal-key", file); code != 0 {
		t.Fatalf("exit %d: %s", code, errs)
	}
	first, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if code, _, errs := execute(t, "seal-key", file); code != 73 || !strings.HasPrefix(errs, "error: seal_key_exists: ") {
		t.Errorf("exit %d: %s", code, errs)
	}
	if again, err := os.ReadFile(file); err != nil || !bytes.Equal(first, again) {
		t.Errorf("the key changed: %v", err)
	}
	if code, _, errs := execute(t, "seal-key"); code != 64 || !strings.HasPrefix(errs, "error: usage: ") {
		t.Errorf("exit %d: %s", code, errs)
	}
}

func TestUsageNamesEveryCommand(t *testing.T) {
	if code, _, errs := execute(t); code != 64 || !strings.HasPrefix(errs, "error: usage: name a command: run, validate, healthcheck, seal-key or restore;") {
		t.Errorf("exit %d: %s", code, errs)
	}
}

// A port in use gets free: the exit code is one after which the unit restarts.
func TestServerWithItsPortInUseExitsForARestart(t *testing.T) {
	p := newPlace(t)
	if code, _, errs := execute(t, "seal-key", filepath.Join(p.dir, "etc", "seal.key")); code != 0 {
		t.Fatal(errs)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	text, err := os.ReadFile(p.config)
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.Replace(text, []byte("listen: 127.0.0.1:0\n"), []byte("listen: "+l.Addr().String()+"\n"), 1)
	if err := os.WriteFile(p.config, text, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "run", "--config", p.config)
	cmd.Env = append(os.Environ(), childVariable+"=1")
	log, _ := cmd.CombinedOutput() // the code says more
	if code := cmd.ProcessState.ExitCode(); code != 69 || !bytes.Contains(log, []byte("error: config_listen: listen: "+l.Addr().String())) {
		t.Errorf("exit %d: %s", code, log)
	}
}

func TestServerRunsFromItsCommandLine(t *testing.T) {
	p := newPlace(t)
	run := func() (*exec.Cmd, *bytes.Buffer) {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "run", "--config", p.config)
		cmd.Env = append(os.Environ(), childVariable+"=1")
		log := &bytes.Buffer{}
		cmd.Stderr = log
		return cmd, log
	}
	cmd, log := run()
	_ = cmd.Run() // the code says more
	if code := cmd.ProcessState.ExitCode(); code != 78 || !strings.Contains(log.String(), "error: seal_key_missing: ") {
		t.Fatalf("without a seal key: exit %d: %s", code, log)
	}
	if code, _, errs := execute(t, "seal-key", filepath.Join(p.dir, "etc", "seal.key")); code != 0 {
		t.Fatal(errs)
	}

	cmd, log = run()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	for ready := false; !ready; {
		select {
		case err := <-exited:
			t.Fatalf("%v: %s", err, log)
		default:
			code, out, _ := execute(t, "healthcheck", "--config", p.config)
			ready = code == 0 && out == "ready\n"
		}
	}
	if code, _, errs := execute(t, "healthcheck", "--addr", p.metrics); code != 0 {
		t.Errorf("exit %d: %s", code, errs)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-exited; err != nil {
		t.Errorf("%v: %s", err, log)
	}
	if !strings.HasSuffix(log.String(), "msg=stopped program=assay-server\n") {
		t.Errorf("log ends otherwise: %s", log)
	}
	if code, _, _ := execute(t, "healthcheck", "--addr", p.metrics); code != 69 {
		t.Errorf("exit %d after the end", code)
	}
}

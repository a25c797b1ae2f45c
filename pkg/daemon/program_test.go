package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// What a test needs a process of its own for is done by this program when the
// variable is set.
const childVariable = "ASSAY_DAEMON_TEST_CHILD"

func TestMain(m *testing.M) {
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	switch mode := os.Getenv(childVariable); mode {
	case "":
		return m.Run()
	case "harden":
		return childHarden()
	default:
		return Main(context.Background(), testProgram(mode), os.Args[1:], os.Stdout, os.Stderr)
	}
}

func child(t *testing.T, what string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), childVariable+"="+what)
	return cmd
}

type testConfig struct {
	Log     testLog `yaml:"log"`
	Metrics testLog `yaml:"metrics"`
}

type testLog struct {
	Level  string `yaml:"level"`
	Format string `yaml:"format"`
	Listen string `yaml:"listen"`
}

// testService does what its mode says once it is told to stop.
type testService struct {
	mode string
	log  *slog.Logger
}

func (s testService) Run(ctx context.Context) error {
	fmt.Println("serving")
	switch s.mode {
	case "fails":
		return fault.New(fault.NotReady, "store_commit_unknown", "restart")
	case "deaf":
		select {}
	}
	<-ctx.Done()
	s.log.InfoContext(ctx, "draining")
	return nil
}

func (testService) Ready(context.Context) error { return nil }

func testProgram(mode string) Program {
	return Program{
		Name: "assay-test", Short: "A daemon for tests", Config: "/nonexistent/test.yaml",
		Load: func(path string) (Settings, error) {
			var cfg testConfig
			if err := Load(path, &cfg); err != nil {
				return Settings{}, err
			}
			return Settings{LogLevel: cfg.Log.Level, LogFormat: cfg.Log.Format, Metrics: cfg.Metrics.Listen, New: func(r Runtime) (Service, error) {
				if mode == "refuses" {
					return nil, fault.New(fault.Precondition, "seal_key_missing", "make one")
				}
				return testService{mode: mode, log: r.Log}, nil
			}}, nil
		},
		Commands: []*cobra.Command{{Use: "extra FILE", Args: cobra.ExactArgs(1), RunE: func(*cobra.Command, []string) error {
			return errors.New("extra failed")
		}}},
	}
}

const goodConfig = "metrics:\n  listen: 127.0.0.1:0\n"

func TestCommandLine(t *testing.T) {
	good := writeConfig(t, goodConfig)
	bad := writeConfig(t, "metrics:\n  lisen: x\n")
	for _, c := range []struct {
		args           []string
		code           int
		stdout, stderr string
	}{
		{[]string{"--version"}, 0, "assay-test version ", ""},
		{[]string{"--help"}, 0, "healthcheck", ""},
		{[]string{"validate", "--config", good}, 0, good + " is valid", ""},
		{[]string{"validate", "--config", bad}, 78, "", "error: config_invalid: " + bad + `: line 2: unknown key "metrics.lisen"`},
		{[]string{"validate"}, 78, "", "error: config_missing: there is no file /nonexistent/test.yaml"},
		{[]string{"run", "--config", bad}, 78, "", "error: config_invalid: "},
		{nil, 64, "", "error: usage: name a command: run, validate, healthcheck or extra; "},
		{[]string{"rnu"}, 64, "", `error: usage: unknown command "rnu"`},
		{[]string{"run", "x"}, 64, "", "error: usage: "},
		{[]string{"run", "--confg", "x"}, 64, "", "error: usage: unknown flag: --confg"},
		{[]string{"healthcheck", "--config", good, "--addr", "x"}, 64, "", "error: usage: give --config or --addr"},
		{[]string{"healthcheck", "--addr", "x"}, 64, "", "error: usage: "},
		{[]string{"healthcheck", "--addr", "127.0.0.1:1"}, 69, "", "error: unreachable: "},
		{[]string{"healthcheck", "--config", bad}, 78, "", "error: config_invalid: "},
		{[]string{"extra"}, 64, "", "error: usage: accepts 1 arg(s)"},
		{[]string{"extra", "f"}, 70, "", "error: internal: extra failed"},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			var out, errs bytes.Buffer
			cmd := child(t, "serves", c.args...) // hardening is for a whole process
			cmd.Stdout, cmd.Stderr = &out, &errs
			_ = cmd.Run() // the code says more
			if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.Contains(out.String(), c.stdout) || !strings.HasPrefix(errs.String(), c.stderr) {
				t.Errorf("exit %d\nstdout %s\nstderr %s", code, out.String(), errs.String())
			}
			if n := strings.Count(errs.String(), "\n"); (c.code == 0) != (n == 0) || n > 1 {
				t.Errorf("stderr has %d lines: %s", n, errs.String())
			}
		})
	}
}

// started runs the daemon in a process of its own until it serves.
func started(t *testing.T, mode, config string) (cmd *exec.Cmd, stderr *safeBuffer, exited <-chan int) {
	t.Helper()
	cmd = child(t, mode, "run", "--config", writeConfig(t, config))
	stderr = &safeBuffer{}
	cmd.Stderr = stderr
	serving := &waitFor{text: "serving", found: make(chan struct{})}
	cmd.Stdout = serving
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	codes := make(chan int, 1)
	go func() {
		_ = cmd.Wait()
		codes <- cmd.ProcessState.ExitCode()
	}()
	select {
	case <-serving.found:
	case code := <-codes:
		t.Fatalf("exit %d: %s", code, stderr)
	}
	return cmd, stderr, codes
}

func TestSignalsStopTheDaemonCleanly(t *testing.T) {
	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
		cmd, stderr, exited := started(t, "serves", goodConfig)
		if err := cmd.Process.Signal(syscall.SIGPIPE); err != nil { // a log reader that went away
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if code := <-exited; code != 0 {
			t.Errorf("%v: exit %d: %s", sig, code, stderr)
		}
		for _, want := range []string{"msg=starting", "metrics=127.0.0.1:", "msg=draining", "msg=stopped"} {
			if !strings.Contains(stderr.String(), want) {
				t.Errorf("%v: no %q in the log: %s", sig, want, stderr)
			}
		}
	}
}

func TestASecondSignalEndsADaemonThatDoesNotStop(t *testing.T) {
	cmd, stderr, exited := started(t, "deaf", goodConfig)
	// The first is taken by the daemon, one of the next ends it. They come one at
	// a time: the race detector's runtime does not take a hail of signals well.
	for ended := false; !ended; {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended by now
		select {
		case code := <-exited:
			if ended = true; code > 0 {
				t.Fatalf("exit %d: %s", code, stderr)
			}
		case <-time.After(20 * time.Millisecond):
		}
	}
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("ended by %v", cmd.ProcessState)
	}
}

func TestErrorsOfTheDaemonAreItsExit(t *testing.T) {
	for _, c := range []struct {
		mode, config, want string
		code               int
	}{
		{"refuses", goodConfig, "error: seal_key_missing: make one\n", 78},
		{"fails", goodConfig, "error: store_commit_unknown: restart\n", 74},
		{"fails", goodConfig + "log:\n  format: json\n", `{"error":{"code":"not_ready","reason":"store_commit_unknown"`, 74},
		{"serves", goodConfig + "log:\n  level: loud\n", `error: config_invalid: log.level "loud" is unknown`, 78},
		{"serves", "metrics:\n  listen: 192.0.2.1:1\n", "error: metrics_listen_failed: metrics.listen 192.0.2.1:1 can't be bound", 69},
	} {
		var errs bytes.Buffer
		cmd := child(t, c.mode, "run", "--config", writeConfig(t, c.config))
		cmd.Stderr = &errs
		_ = cmd.Run()
		lines := strings.Split(strings.TrimSuffix(errs.String(), "\n"), "\n")
		if cmd.ProcessState.ExitCode() != c.code || !strings.HasPrefix(lines[len(lines)-1]+"\n", c.want) {
			t.Errorf("%s: exit %d: %s", c.mode, cmd.ProcessState.ExitCode(), errs.String())
		}
	}
}

func TestHarden(t *testing.T) {
	cmd := child(t, "harden", filepath.Join(t.TempDir(), "file"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// childHarden hardens this process and looks at what became of it.
func childHarden() int {
	if err := Harden(); err != nil {
		return Fail(os.Stderr, "text", err)
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil || dumpable != 0 {
		return Fail(os.Stderr, "text", fmt.Errorf("dumpable is %d: %w", dumpable, err))
	}
	var core unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil || core.Cur != 0 || core.Max != 0 {
		return Fail(os.Stderr, "text", fmt.Errorf("core limit is %+v: %w", core, err))
	}
	if err := os.WriteFile(os.Args[1], nil, 0o666); err != nil {
		return Fail(os.Stderr, "text", err)
	}
	info, err := os.Stat(os.Args[1])
	if err != nil || info.Mode().Perm() != 0o600 {
		return Fail(os.Stderr, "text", fmt.Errorf("a file was made with %v: %w", info.Mode(), err))
	}
	return 0
}

func TestSignalsEndTheContext(t *testing.T) {
	defer signal.Reset(unix.SIGPIPE)
	ctx, stop := Signals(t.Context())
	defer stop()
	if err := unix.Kill(os.Getpid(), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done()
}

type safeBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// waitFor closes found once text was written.
type waitFor struct {
	text  string
	found chan struct{}
	got   strings.Builder
	once  sync.Once
}

func (w *waitFor) Write(p []byte) (int, error) {
	w.got.Write(p)
	if strings.Contains(w.got.String(), w.text) {
		w.once.Do(func() { close(w.found) })
	}
	return len(p), nil
}

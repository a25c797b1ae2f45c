package harness

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// TB is the part of testing.TB that the harness uses.
type TB interface {
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
	Cleanup(func())
}

// Process is a child that is always stopped and waited for.
type Process struct {
	tb   TB
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// Start starts a program whose output goes to the end of a file. It is killed
// when the test ends, and when the test's process does, however that comes.
func Start(tb TB, logFile string, env []string, name string, args ...string) *Process {
	tb.Helper()
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		tb.Fatalf("open log: %v", err)
	}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p := &Process{tb: tb, cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		defer close(p.done)
		defer func() { _ = out.Close() }()
		// The child dies with its parent's thread, which therefore waits for it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		tb.Fatalf("start %s: %v", name, err)
	}
	tb.Cleanup(func() { p.Stop(syscall.SIGKILL) })
	return p
}

// PID returns the process's id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// ExitCode returns the exit status of an ended process, -1 if a signal ended
// it.
func (p *Process) ExitCode() int {
	<-p.done
	return p.cmd.ProcessState.ExitCode()
}

// Signal sends sig to the process.
func (p *Process) Signal(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) }

// Stop sends sig and waits for the end; a process that doesn't end within 20 s
// is an error, and killed.
func (p *Process) Stop(sig syscall.Signal) {
	select {
	case <-p.done:
		return
	default:
	}
	p.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		p.Signal(syscall.SIGKILL)
		<-p.done
		p.tb.Errorf("%s did not stop after %v", p.cmd.Path, sig)
	}
}

// Eventually polls check until it succeeds; the process's end or the limit
// fail the test.
func (p *Process) Eventually(limit time.Duration, what string, check func() error) {
	p.tb.Helper()
	deadline := time.After(limit)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-p.done:
			p.tb.Fatalf("waiting for %s: the process ended: %v (last: %v)", what, p.err, err)
		case <-deadline:
			p.tb.Fatalf("waiting for %s: %v", what, err)
		case <-tick.C:
		}
	}
}

// WaitReady waits for /readyz on the process's metrics port.
func (p *Process) WaitReady(port int) {
	p.tb.Helper()
	p.Eventually(30*time.Second, "readiness", func() error {
		resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/readyz", port))
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", resp.Status, body)
		}
		return err
	})
}

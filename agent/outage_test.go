package agent_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// lines returns those that have all of words.
func (b *logBuffer) lines(words ...string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var found []string
line:
	for line := range strings.Lines(b.buf.String()) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue line
			}
		}
		found = append(found, line)
	}
	return found
}

func (m *machine) awaitLog(words ...string) {
	m.t.Helper()
	eventually(m.t, "the log to say "+strings.Join(words, ", "), func() error {
		if len(m.log.lines(words...)) == 0 {
			return errors.New(strings.Join(m.log.lines(), ""))
		}
		return nil
	})
}

// syncFailures returns the metric's value for a reason.
func (m *machine) syncFailures(reason string) float64 {
	for _, family := range must(m.reg.Gather()) {
		if family.GetName() != "assay_agent_sync_failures_total" {
			continue
		}
		for _, metric := range family.GetMetric() {
			if metric.GetLabel()[0].GetValue() == reason {
				return metric.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func (m *machine) apiSocket() string { return filepath.Join(m.cfg.Sockets.Dir, "api.sock") }

// openStream starts a workload's stream and returns when it has its SVID; the
// channel gets what it receives next.
func (m *machine) openStream() <-chan error {
	m.t.Helper()
	cc := must(grpc.NewClient("unix://"+m.apiSocket(), grpc.WithTransportCredentials(insecure.NewCredentials())))
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true"))
	m.t.Cleanup(func() {
		cancel()
		_ = cc.Close()
	})
	stream := must(workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{}))
	if _, err := stream.Recv(); err != nil {
		m.t.Fatal(err)
	}
	next := make(chan error, 1)
	go func() {
		_, err := stream.Recv()
		next <- err
	}()
	return next
}

// NEG-44: a socket that is gone or replaced comes back, and streams that are open
// don't notice.
func TestSocketThatWasRemovedOrReplacedComesBack(t *testing.T) {
	cases := map[string]func(path string) error{
		"the one for Envoy": func(path string) error {
			return errors.Join(os.Remove(path), os.Remove(filepath.Join(filepath.Dir(path), "sds.sock")))
		},
		"removed":            os.Remove,
		"with its directory": func(path string) error { return os.RemoveAll(filepath.Dir(path)) },
		"replaced by a dead socket": func(path string) error {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path + ".x", Net: "unix"})
			if err != nil {
				return err
			}
			l.SetUnlinkOnClose(false)
			return errors.Join(l.Close(), os.Rename(path+".x", path))
		},
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, mine("web"))
			f.start(t)
			m := newMachine(t, f)
			m.start()
			m.awaitReady()
			open := m.openStream()
			if err := spoil(m.apiSocket()); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			m.awaitLog("level=WARN", "the socket was removed or replaced", m.apiSocket())
			if _, err := m.fetch(); err != nil {
				t.Fatal(err)
			}
			t.Logf("back after %v", time.Since(start))
			m.awaitReady() // with both sockets
			for _, path := range []string{m.apiSocket(), filepath.Join(m.cfg.Sockets.Dir, "sds.sock")} {
				if info := must(os.Stat(path)); info.Mode() != 0o666|os.ModeSocket {
					t.Errorf("%s has mode %v", path, info.Mode())
				}
			}
			select {
			case err := <-open:
				t.Errorf("the open stream ended: %v", err)
			default:
			}
			if err := m.stop(); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(m.apiSocket()); !os.IsNotExist(err) {
				t.Errorf("the socket stayed behind: %v", err)
			}
		})
	}
}

func TestAgentIsNotReadyWhileSomethingStandsInItsSocketsPlace(t *testing.T) {
	f := newFake(t)
	f.start(t)
	m := newMachine(t, f)
	m.start()
	m.awaitReady()
	other := filepath.Join(m.cfg.Sockets.Dir, "other")
	if err := errors.Join(os.WriteFile(other, []byte("precious"), 0o600), os.Rename(other, m.apiSocket())); err != nil {
		t.Fatal(err)
	}
	if err := m.agent.Ready(t.Context()); fault.ReasonOf(err) != "socket_missing" {
		t.Error(err)
	}
	m.awaitLog("level=ERROR", "can't be put back", "path_untrusted", m.apiSocket())
	if string(must(os.ReadFile(m.apiSocket()))) != "precious" {
		t.Error("the file was touched")
	}
	if err := os.Remove(m.apiSocket()); err != nil {
		t.Fatal(err)
	}
	m.awaitReady()
}

// The log says where the server was looked for and what was wrong there, and
// that the agent is back.
func TestLogSaysWhyTheAgentCantGetBackToItsServer(t *testing.T) {
	f := newFake(t, mine("web"))
	f.start(t)
	m := newMachine(t, f)
	m.start()
	m.awaitReady()
	f.stop()
	m.awaitLog("level=WARN", "lost the server's stream")
	m.awaitLog("level=WARN", "reason=server_unreachable", f.addr, "connection refused")
	if m.syncFailures("server_unreachable") == 0 {
		t.Error("not counted")
	}

	stranger := newFake(t)
	stranger.addr = f.addr
	stranger.start(t)
	m.awaitLog("level=WARN", "reason=server_untrusted", f.addr, "expected spiffe://example.org/assay/server", f.bundle().GetX509Authorities()[0].GetId())
	if m.syncFailures("server_untrusted") == 0 {
		t.Error("not counted")
	}
	if len(m.log.lines("attesting anew")) > 0 || m.syncFailures("internal") > 0 {
		t.Error("took a server that it does not trust for its own")
	}
	stranger.stop()

	back := len(m.log.lines("level=INFO", "in sync with the server"))
	f.start(t)
	eventually(t, "the return", func() error {
		if len(m.log.lines("level=INFO", "in sync with the server")) == back {
			return errors.New("not back")
		}
		return m.agent.Ready(t.Context())
	})
	if f.joined != 1 {
		t.Errorf("joined %d times", f.joined)
	}
}

// At the first start too: a wrong pin or address has to be found by the log.
func TestLogSaysWhyTheAgentCantJoin(t *testing.T) {
	f := newFake(t)
	f.start(t)
	f.stop() // only the address is of use
	m := newMachine(t, f)
	m.start()
	m.awaitLog("level=WARN", "reason=server_unreachable", f.addr)
}

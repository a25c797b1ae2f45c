package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// startOps runs a listener until the test ends and returns its address.
func startOps(t *testing.T, o Ops) string {
	t.Helper()
	if o.Addr == "" {
		o.Addr = "127.0.0.1:0"
	}
	if o.Registry == nil {
		o.Registry = prometheus.NewRegistry()
	}
	if o.Ready == nil {
		o.Ready = func(context.Context) error { return nil }
	}
	o.Log = slog.New(slog.DiscardHandler)
	s, err := ListenOps(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s.Addr().String()
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestOpsServesMetricsAndHealth(t *testing.T) {
	reg := NewRegistry(Build{Version: "v1"})
	var state atomic.Pointer[error]
	addr := startOps(t, Ops{Registry: reg, Ready: func(context.Context) error {
		if p := state.Load(); p != nil {
			return *p
		}
		return nil
	}})
	base := "http://" + addr
	if code, body := get(t, base+"/metrics"); code != 200 || !strings.Contains(body, "assay_build_info{") || !strings.Contains(body, "go_goroutines") {
		t.Errorf("/metrics: %d %.100q", code, body)
	}
	if code, body := get(t, base+"/readyz"); code != 200 || body != "ok\n" {
		t.Errorf("/readyz: %d %q", code, body)
	}
	if err := CheckHealth(t.Context(), addr); err != nil {
		t.Error(err)
	}

	// The reason is told, its cause is not.
	notReady := fmt.Errorf("outer: %w", fault.Wrap(fault.NotReady, errors.New("10.0.0.3 refused"), "store_silent", "nothing heard from the store for 60 s"))
	state.Store(&notReady)
	if code, body := get(t, base+"/readyz"); code != 503 || body != "store_silent: nothing heard from the store for 60 s\n" {
		t.Errorf("/readyz: %d %q", code, body)
	}
	err := CheckHealth(t.Context(), addr)
	if fault.ReasonOf(err) != "not_ready" || fault.SafeText(err) != "store_silent: nothing heard from the store for 60 s" || ExitCode(err) != 69 {
		t.Errorf("%v", err)
	}
	if code, body := get(t, base+"/healthz"); code != 200 || body != "ok\n" {
		t.Errorf("/healthz: %d %q", code, body)
	}
}

func TestOpsIsReadOnlyAndSmall(t *testing.T) {
	base := "http://" + startOps(t, Ops{})
	for _, path := range []string{"/", "/debug/pprof/", "/debug/pprof/heap", "/metricsx", "/metrics/x"} {
		if code, _ := get(t, base+path); code != 404 {
			t.Errorf("%s: %d", path, code)
		}
	}
	resp, err := http.Post(base+"/metrics", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", resp.StatusCode)
	}
}

func TestProfilesAreForLoopbackOnly(t *testing.T) {
	if code, body := get(t, "http://"+startOps(t, Ops{Profiling: true})+"/debug/pprof/"); code != 200 || !strings.Contains(body, "goroutine") {
		t.Errorf("%d %.100q", code, body)
	}
	for _, addr := range []string{"0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0", "example.org:0", "nonsense"} {
		if _, err := ListenOps(t.Context(), Ops{Addr: addr, Profiling: true}); fault.ReasonOf(err) != "config_invalid" {
			t.Errorf("%s: %v", addr, err)
		}
	}
	for _, addr := range []string{"127.0.0.1:0", "127.8.8.8:1", "[::1]:0", "localhost:80"} {
		if !isLoopback(addr) {
			t.Errorf("%s is not taken for loopback", addr)
		}
	}
}

func TestOpsBoundsConnections(t *testing.T) {
	addr := startOps(t, Ops{})
	var idle []net.Conn
	for range maxOpsConns { // peers that connect and say half a request
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET /healthz HTTP/1.1\r\n"); err != nil {
			t.Fatal(err)
		}
		idle = append(idle, c)
	}
	late, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	if _, err := io.WriteString(late, "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answered := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(late).ReadString('\n')
		answered <- line
	}()
	// One of them leaves, and the late one is served.
	if err := idle[0].Close(); err != nil {
		t.Fatal(err)
	}
	if line := <-answered; !strings.Contains(line, "200 OK") {
		t.Errorf("got %q", line)
	}
}

func TestBoundedListenerHoldsTheNextPeerBack(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newBounded(inner, 1)
	for range 2 {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	first, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if len(l.slots) != cap(l.slots) {
		t.Fatal("a second connection could be accepted")
	}
	type accepted struct {
		conn net.Conn
		err  error
	}
	results := make(chan accepted)
	accept := func() {
		c, err := l.Accept()
		results <- accepted{c, err}
	}
	go accept()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	_ = first.Close() // a second close must not free a second slot
	second := <-results
	if second.err != nil {
		t.Fatal(second.err)
	}
	defer second.conn.Close()
	go accept()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if r := <-results; !errors.Is(r.err, net.ErrClosed) {
		t.Fatalf("after Close: %v", r.err)
	}
}

func TestOpsLetsARequestFinish(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	s, err := ListenOps(t.Context(), Ops{
		Addr: "127.0.0.1:0", Registry: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler),
		Ready: func(context.Context) error { close(entered); <-release; return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	answered := make(chan error, 1)
	go func() { answered <- CheckHealth(t.Context(), s.Addr().String()) }()
	<-entered
	cancel()
	close(release)
	if err := <-answered; err != nil {
		t.Errorf("the request under way got %v", err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestAddressInUseIsToldAtOnce(t *testing.T) {
	addr := startOps(t, Ops{})
	_, err := ListenOps(t.Context(), Ops{Addr: addr, Log: slog.New(slog.DiscardHandler)})
	if err == nil || ExitCode(err) != 69 {
		t.Errorf("%v", err)
	}
}

func TestCheckHealthOfSomethingElse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	other := &http.Server{Handler: http.RedirectHandler("http://192.0.2.1/", http.StatusFound), ReadHeaderTimeout: time.Second}
	go func() { _ = other.Serve(l) }()
	defer other.Close()
	if err := CheckHealth(t.Context(), l.Addr().String()); fault.ReasonOf(err) != "not_a_daemon" {
		t.Errorf("a redirecting server: %v", err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	if err := CheckHealth(t.Context(), free.Addr().String()); fault.ReasonOf(err) != "unreachable" || ExitCode(err) != 69 {
		t.Errorf("nobody: %v", err)
	}
	for _, bad := range []string{"", "host", "host:", "127.0.0.1:1/x\x00"} {
		if err := CheckHealth(t.Context(), bad); ExitCode(err) != 64 {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestWildcardAddressesAreDialedLocally(t *testing.T) {
	for addr, want := range map[string]string{
		":9402": "127.0.0.1:9402", "0.0.0.0:1": "127.0.0.1:1", "[::]:1": "[::1]:1", "10.0.0.1:1": "10.0.0.1:1", "localhost:1": "localhost:1",
	} {
		if got, err := dialable(addr); err != nil || got != want {
			t.Errorf("%s: %s, %v", addr, got, err)
		}
	}
}

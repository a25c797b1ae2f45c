package endpoint

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func TestStreamsBeyondTheLimitAreShed(t *testing.T) { // NEG-43
	ca := newAuthority(t)
	for name, limits := range map[string]Limits{"per user": {StreamsPerUID: 2}, "in all": {Streams: 2, StreamsPerUID: 2}} {
		t.Run(name, func(t *testing.T) {
			e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, withLimits(limits))
			c := e.client()
			first := fetch(t, c, withHeader(t))
			recv(t, first)
			recv(t, fetch(t, c, withHeader(t)))
			_, err := fetch(t, c, withHeader(t)).Recv()
			wantStatus(t, err, codes.Unavailable, "load_shed")
			wantStatus(t, call(withHeader(t), e.conn(), "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"), codes.Unavailable, "load_shed")
			if n := e.value("assay_workload_denials_total", "load_shed"); n != 2 {
				t.Fatalf("%v denials", n)
			}
		})
	}
}

// A stream whose request never comes takes memory as well.
func TestHalfRequestsCountAsStreams(t *testing.T) { // NEG-43
	const reflect = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, withLimits(Limits{StreamsPerUID: 2}))
	half := func(ctx context.Context, method string) grpc.ClientStream { // headers alone
		stream, err := e.conn().NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	for _, method := range []string{fetchSVID, reflect} {
		ctx, cancel := context.WithCancel(withHeader(t))
		half(ctx, method)
		half(ctx, method)
		until(t, "both counted", func() bool { return e.server.gate.count(streams) == 2 })
		wantStatus(t, half(ctx, method).RecvMsg(new(workload.X509SVIDResponse)), codes.Unavailable, "load_shed")
		cancel()
		until(t, "both given back", func() bool { return e.server.gate.count(streams) == 0 })
	}
	recv(t, fetch(t, e.client(), withHeader(t)))
	if n := e.value("assay_workload_denials_total", "load_shed"); n != 2 {
		t.Fatalf("%v denials", n)
	}
}

// NEG-43: nor does it take it for ever. A caller that is held has sent its request.
func TestHalfRequestsEnd(t *testing.T) {
	e := serve(t, &source{err: errNoIdentity}, withTiming(func(w *timing) { w.hold = 2 * time.Second }),
		func(c *Config, _ *timing) { c.MessageTimeout = time.Second })
	half, err := e.conn().NewStream(withHeader(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, fetchSVID)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := half.RecvMsg(new(workload.X509SVIDResponse)); status.Code(err) != codes.Canceled {
		t.Errorf("half a call: %v", err)
	}
	until(t, "given back", func() bool { return e.server.gate.count(streams) == 0 })
	if time.Since(began) < time.Second {
		t.Error("not given the time")
	}
	began = time.Now()
	_, err = fetch(t, e.client(), withHeader(t)).Recv()
	wantStatus(t, err, codes.PermissionDenied, "no_identity")
	if held := time.Since(began); held < 2*time.Second {
		t.Errorf("held for %v only", held)
	}
}

func TestRefusedCallsDoNotFloodTheLog(t *testing.T) { // NEG-43
	logs := &strings.Builder{}
	e := serve(t, &source{err: errNoIdentity}, func(c *Config, _ *timing) { c.Log = slog.New(slog.NewTextHandler(logs, nil)) })
	cc, begin := e.conn(), time.Now()
	const calls = 200
	for range calls {
		wantStatus(t, call(t.Context(), cc, fetchSVID), codes.InvalidArgument, "security_header_missing")
	}
	e.stop()
	most := 10 + 10*int(time.Since(begin)/time.Second+1)
	if n := strings.Count(logs.String(), "reason=security_header_missing"); n == 0 || n > most {
		t.Errorf("%d lines, want at most %d", n, most)
	}
	if n := e.value("assay_rpc_denials_total", "security_header_missing"); n != calls {
		t.Errorf("%v denials counted", n)
	}
}

func TestConnectionsBeyondTheLimitAreToldAndClosed(t *testing.T) { // NEG-43
	ca := newAuthority(t)
	full := func(shed time.Duration) (*endpoint, workload.SpiffeWorkloadAPIClient) {
		e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, withTiming(func(w *timing) { w.shed, w.grace = shed, 50*time.Millisecond }),
			withLimits(Limits{Descriptors: 10, DescriptorsPerUID: 10}))
		good := e.client()
		recv(t, fetch(t, good, withHeader(t)))
		for e.value("assay_workload_descriptors") < 10 {
			before := e.value("assay_workload_descriptors")
			e.dial()
			until(t, "accepted", func() bool { return e.value("assay_workload_descriptors") > before })
		}
		return e, good
	}
	// The next ones are told why, for a moment.
	e, good := full(time.Hour)
	_, err := fetch(t, e.client(), withHeader(t)).Recv()
	wantStatus(t, err, codes.Unavailable, "load_shed")
	recv(t, fetch(t, good, withHeader(t))) // who is in stays in
	e, good = full(50 * time.Millisecond)
	over := e.dial()
	if _, err := io.Copy(io.Discard, over); err != nil { // reads until it is closed
		t.Fatal(err)
	}
	recv(t, fetch(t, good, withHeader(t)))
}

func TestConnectionsFarBeyondTheLimitAreClosed(t *testing.T) { // NEG-43
	e := serve(t, &source{err: errNoIdentity}, withTiming(func(w *timing) { w.shed, w.grace = time.Hour, time.Millisecond }),
		withLimits(Limits{Descriptors: 10, DescriptorsPerUID: 10}))
	for range 2 * maxShed {
		e.dial()
	}
	until(t, "all but a few closed", func() bool {
		e.server.mu.Lock()
		defer e.server.mu.Unlock()
		return len(e.server.open) <= 10+maxShedPerUID && e.value("assay_workload_denials_total", "load_shed") >= 2*maxShed-10
	})
}

func TestLimitsLeaveDescriptorsForTheAgent(t *testing.T) {
	var open unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &open); err != nil {
		t.Fatal(err)
	}
	for cur, want := range map[uint64]Limits{
		256:     {Descriptors: 192, DescriptorsPerUID: 144},
		20_000:  {Descriptors: 16384, DescriptorsPerUID: 12288},
		1 << 20: {Descriptors: 16384, DescriptorsPerUID: 12288},
	} {
		if cur > open.Max {
			continue
		}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: cur, Max: open.Max}); err != nil {
			t.Fatal(err)
		}
		got := Limits{}.withDefaults()
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &open); err != nil {
			t.Fatal(err)
		}
		if got.Descriptors != want.Descriptors || got.DescriptorsPerUID != want.DescriptorsPerUID {
			t.Errorf("%d files: %+v", cur, got)
		}
	}
}

func TestSenselessLimitsAreRefused(t *testing.T) { // I6
	for _, l := range []Limits{{Streams: -1}, {Held: 5, HeldPerUID: 6}, {DescriptorsPerUID: -2}} {
		if err := l.Check(); fault.ReasonOf(err) != "config_limits" {
			t.Errorf("%+v: %v", l, err)
		}
	}
	if err := (Limits{}).Check(); err != nil {
		t.Fatal(err)
	}
}

// flaky is a listener that fails a few times.
type flaky struct {
	net.Listener
	fail chan error
}

func (f *flaky) Accept() (net.Conn, error) {
	if err, ok := <-f.fail; ok {
		return nil, err
	}
	return f.Listener.Accept()
}

func TestAcceptErrorsAreWaitedOut(t *testing.T) { // NEG-43
	e := serve(t, &source{err: errNoIdentity})
	inner, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	fail := make(chan error, 3)
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM} {
		fail <- &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", errno)}
	}
	close(fail)
	lis := &listener{Listener: &flaky{inner, fail}, server: e.server, closed: make(chan struct{})}
	dialled, err := net.Dial("unix", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	c, err := lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if n := e.value("assay_workload_accept_errors_total"); n != 3 {
		t.Fatalf("%v errors counted", n)
	}
	// Closing ends the wait.
	again := make(chan error, 1000)
	for range cap(again) {
		again <- syscall.EMFILE
	}
	lis = &listener{Listener: &flaky{inner, again}, server: e.server, closed: make(chan struct{})}
	ended := make(chan error, 1)
	go func() {
		_, err := lis.Accept()
		ended <- err
	}()
	_ = lis.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Fatal(err)
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestDescriptorsComeBack(t *testing.T) { // NEG-38
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	cc := e.conn()
	if err := call(withHeader(t), cc, fetchSVID); err != nil {
		t.Fatal(err)
	}
	before := openFiles(t)
	for i := range 10_000 {
		c, err := net.Dial("unix", e.path)
		for errors.Is(err, unix.EAGAIN) { // the backlog is full
			c, err = net.Dial("unix", e.path)
		}
		if err != nil {
			t.Fatal(err)
		}
		if i%3 == 0 { // else gone before the server's first frame
			_, _ = c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
		}
		_ = c.Close()
	}
	until(t, "all closed", func() bool { return openFiles(t) <= before })
	if err := call(withHeader(t), cc, fetchSVID); err != nil {
		t.Fatal(err)
	}
}

func TestConnectionThatIsNotReadIsClosed(t *testing.T) { // NEG-43
	e := serve(t, &source{err: errNoIdentity}, withTiming(func(w *timing) { w.send = 50 * time.Millisecond }))
	c := e.dial()
	hello := append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 0, 0, 0, 4, 0, 0, 0, 0, 0)
	if _, err := c.Write(hello); err != nil {
		t.Fatal(err)
	}
	// Settings that have to be acknowledged, until the acknowledgements fill the
	// socket that nobody reads from.
	many := make([]byte, 0, 9*1000)
	for range 1000 {
		many = append(many, 0, 0, 0, 4, 0, 0, 0, 0, 0)
	}
	for {
		if err := c.SetWriteDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(many); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("the server waits for ever")
			}
			return
		}
	}
}

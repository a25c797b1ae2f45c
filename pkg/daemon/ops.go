package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	maxOpsConns   = 64
	maxScrapes    = 4
	readyTimeout  = 5 * time.Second
	profileWrite  = 2 * time.Minute
	opsDrainLimit = 3 * time.Second
)

// Ops is the operations listener of a daemon: plain HTTP, read only.
type Ops struct {
	// Addr is host:port.
	Addr string
	// Registry is what /metrics shows.
	Registry prometheus.Gatherer
	// Ready is what /readyz asks: nil, or why the daemon can't serve. It must
	// answer from memory.
	Ready func(context.Context) error
	// Profiling adds /debug/pprof. It is refused unless Addr is a loopback
	// address: profiles are for whoever is on this host.
	Profiling bool
	Log       *slog.Logger
}

// OpsServer is a bound operations listener.
type OpsServer struct {
	listener net.Listener
	http     *http.Server
}

// ListenOps binds the listener. Nothing is answered before Run.
func ListenOps(ctx context.Context, o Ops) (*OpsServer, error) {
	if o.Profiling && !isLoopback(o.Addr) {
		return nil, fault.Newf(fault.Precondition, "config_invalid", "profiles are served on a loopback address only and metrics.listen is %s: set metrics.listen to 127.0.0.1 and a port, or leave --pprof out", clip(o.Addr))
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", o.Addr)
	if err != nil {
		return nil, fault.Wrap(fault.NotReady, err, "metrics_listen_failed", "metrics.listen "+clip(o.Addr)+" can't be bound: stop what uses it, or configure another address")
	}
	return &OpsServer{listener: newBounded(l, maxOpsConns), http: &http.Server{
		Handler:           o.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug), // what peers do wrong is not news
	}}, nil
}

// Addr is the bound address: it tells the port when the configured one is 0.
func (s *OpsServer) Addr() net.Addr { return s.listener.Addr() }

// Run answers until ctx ends, then lets requests under way finish, for a short
// time.
func (s *OpsServer) Run(ctx context.Context) error {
	drained := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(drained)
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), opsDrainLimit)
		defer cancel()
		if s.http.Shutdown(limit) != nil {
			_ = s.http.Close() // cuts what did not finish in time; there is nothing to lose
		}
	})
	err := s.http.Serve(s.listener)
	if !stop() {
		<-drained
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve metrics: %w", err)
}

func (o Ops) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.Registry, promhttp.HandlerOpts{
		ErrorHandling:       promhttp.ContinueOnError, // one broken collector must not hide the others
		ErrorLog:            slog.NewLogLogger(o.Log.Handler(), slog.LevelError),
		MaxRequestsInFlight: maxScrapes,
		Timeout:             10 * time.Second,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
		defer cancel()
		if err := o.Ready(ctx); err != nil {
			answer(w, http.StatusServiceUnavailable, fault.ReasonOf(err)+": "+oneLine(fault.SafeText(err)))
			return
		}
		answer(w, http.StatusOK, "ok")
	})
	if o.Profiling {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/profile", slow(pprof.Profile))
		mux.HandleFunc("GET /debug/pprof/trace", slow(pprof.Trace))
	}
	return mux
}

func answer(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = io.WriteString(w, text+"\n") // the peer went away
}

// slow gives a profile that is recorded for a while more time than the rest.
func slow(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(profileWrite)); err != nil {
			answer(w, http.StatusInternalServerError, "can't record that long")
			return
		}
		h(w, r)
	}
}

func isLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// bounded is a listener that accepts no more than so many connections at a
// time; the others wait in the kernel's queue.
type bounded struct {
	net.Listener
	slots  chan struct{}
	closed chan struct{}
	once   sync.Once
}

func newBounded(l net.Listener, n int) *bounded {
	return &bounded{Listener: l, slots: make(chan struct{}, n), closed: make(chan struct{})}
}

func (b *bounded) Accept() (net.Conn, error) {
	select {
	case b.slots <- struct{}{}:
	case <-b.closed:
		return nil, net.ErrClosed
	}
	c, err := b.Listener.Accept()
	if err != nil {
		<-b.slots
		return nil, err
	}
	return &boundedConn{Conn: c, release: sync.OnceFunc(func() { <-b.slots })}, nil
}

func (b *bounded) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.Listener.Close()
}

type boundedConn struct {
	net.Conn
	release func()
}

func (c *boundedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

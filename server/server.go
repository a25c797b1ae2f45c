package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/keys"
)

// Deps is what a Server gets from the program around it.
type Deps struct {
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Version    string
}

// Server is an Assay server.
type Server struct {
	cfg     Config
	deps    Deps
	metrics *metrics

	started   chan struct{} // closed when the listeners serve
	startOnce sync.Once
	stopping  chan struct{} // closed when the listeners are to end
	stopOnce  sync.Once
	addr      atomic.Pointer[net.Addr]
	istioAddr atomic.Pointer[net.Addr]
	health    atomic.Pointer[func() error] // nil while not serving
}

// New checks the configuration and returns a server. Nothing is opened or
// started before Run.
func New(cfg Config, deps Deps) (*Server, error) {
	cfg, err := cfg.Validate()
	if err != nil {
		return nil, err
	}
	if deps.Log == nil || deps.Registerer == nil {
		return nil, errors.New("make server: Log and Registerer are needed")
	}
	s := &Server{cfg: cfg, deps: deps, metrics: newMetrics(deps.Registerer), started: make(chan struct{}), stopping: make(chan struct{})}
	deps.Registerer.MustRegister(newReadyGauge(s.Ready))
	return s, nil
}

// WriteSealKey makes a new seal key in a file that must not exist.
func WriteSealKey(path string) error { return keys.WriteSealKey(path) }

// AdminSocket is the path of the operators' socket.
func (s *Server) AdminSocket() string { return s.cfg.Admin.Socket }

// Started returns a channel that is closed when the listeners serve.
func (s *Server) Started() <-chan struct{} { return s.started }

// Addr is the address of the agents' listener, nil before it listens. It tells
// the port when the configured one is 0.
func (s *Server) Addr() net.Addr {
	if a := s.addr.Load(); a != nil {
		return *a
	}
	return nil
}

// IstioAddr is the address of the mesh's listener, nil before it listens and if
// there is none.
func (s *Server) IstioAddr() net.Addr {
	if a := s.istioAddr.Load(); a != nil {
		return *a
	}
	return nil
}

// Ready says whether the server serves and can sign: nil, or why not.
func (s *Server) Ready(context.Context) error {
	if check := s.health.Load(); check != nil {
		return (*check)()
	}
	return fault.New(fault.NotReady, "server_starting", "the server is starting or stopping")
}

// Run opens the server and serves until ctx ends, then drains and closes
// everything. An error says what could not be opened or kept up; after
// store_commit_unknown the process has to be restarted.
func (s *Server) Run(ctx context.Context) error {
	r, err := s.open(ctx)
	if err != nil && ctx.Err() != nil {
		return nil // told to stop while it was starting
	}
	if err != nil {
		return err
	}
	return s.run(ctx, r)
}

// run serves and then closes what open has opened.
func (s *Server) run(ctx context.Context, r *rooms) error {
	err := s.serve(ctx, r)
	if errors.Is(err, errStopped) {
		err = nil
	}
	return errors.Join(err, r.close())
}

// errStopped says that a part of the server ended because it was told to.
var errStopped = errors.New("stopped")

// serve runs the rooms and, on top of them, the listeners. The rooms outlive
// the listeners: a call that is being drained still needs the mirror.
func (s *Server) serve(ctx context.Context, r *rooms) error {
	g, gctx := errgroup.WithContext(ctx)
	below, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	for _, room := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"authority", r.authority.Run}, {"registry", r.registry.Run}, {"refusals", r.refusals.Run},
	} {
		g.Go(func() error {
			err := room.run(below)
			if below.Err() != nil {
				return nil
			}
			if err == nil {
				err = errors.New("ended by itself")
			}
			return fmt.Errorf("run %s: %w", room.name, err)
		})
	}
	g.Go(func() error {
		return r.clusters.Run(below, func() ([]byte, <-chan struct{}) {
			bundle := r.authority.Bundle()
			return bundle.PEM(), bundle.Replaced()
		}, s.deps.Log)
	})
	g.Go(func() error {
		select {
		case <-r.store.Failed():
			return fmt.Errorf("keep the store: %w", r.store.Err())
		case <-below.Done():
			return nil
		}
	})
	g.Go(func() error {
		defer stop()
		return s.listen(gctx, r)
	})
	return g.Wait()
}

// warnings are what an operator should know about the configuration; they are
// logged at start and shown by status.
func (s *Server) warnings() (out []string) {
	data, derr := filepath.EvalSymlinks(s.cfg.DataDir)
	seal, serr := filepath.EvalSymlinks(filepath.Dir(s.cfg.SealKeyFile))
	if derr == nil && serr == nil && data == seal {
		out = append(out, "the seal key is in the data directory: whoever copies that directory has the CA; move seal_key_file elsewhere")
	}
	if s.cfg.Bootstrap != "" && s.cfg.Bootstrap != time.Now().UTC().Format(time.DateOnly) {
		out = append(out, "bootstrap names a day that is not today: take it out of the configuration")
	}
	return out
}

func (s *Server) setServing(r *rooms, check func() error) {
	addr := r.port.Addr()
	s.addr.Store(&addr)
	if r.mesh != nil {
		addr := r.mesh.Addr()
		s.istioAddr.Store(&addr)
	}
	s.health.Store(&check)
	s.startOnce.Do(func() { close(s.started) })
}

func (s *Server) setStopping() {
	s.health.Store(nil)
	s.stopOnce.Do(func() { close(s.stopping) })
}

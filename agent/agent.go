// Package agent is the node daemon: it proves the node to a server, tells
// processes of the node apart, and hands each its X.509-SVIDs.
//
// Data goes one way: node has the connection to the server, cache follows the
// server's word over it and keeps what this node may have, endpoint gives it to
// callers whom attest has recognised. state is what survives a restart.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/agent/attest"
	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/agent/endpoint"
	"github.com/seed-caa81108/assay/agent/node"
	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// staleAfter is how long the agent may be without its server and still call
// itself ready. It goes on serving either way.
const staleAfter = 2 * time.Minute

// Deps are what an agent gets from its program.
type Deps struct {
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Version    string
}

// Agent is one node daemon.
type Agent struct {
	cfg  Config
	td   spiffeid.TrustDomain
	deps Deps

	cache atomic.Pointer[cache.Cache] // once Run has made it
}

// New checks the configuration and returns an agent that does nothing yet.
func New(cfg Config, deps Deps) (*Agent, error) {
	cfg, err := cfg.Validate()
	if err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("parse trust domain: %w", err)
	}
	return &Agent{cfg: cfg, td: td, deps: deps}, nil
}

// Run serves until ctx ends. A ban by the server ends it too, with reason
// agent_banned, after everything that this node could serve is forgotten.
func (a *Agent) Run(ctx context.Context) (err error) {
	st, err := state.Open(a.cfg.DataDir, a.td)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	p, err := a.build(st)
	if err != nil {
		return err
	}
	if err := durable.MkdirPrivate(a.cfg.Sockets.Dir, 0o755); err != nil {
		return err
	}
	lis, err := durable.ListenUnix(filepath.Join(a.cfg.Sockets.Dir, "api.sock"), 0o666)
	if err != nil {
		return err
	}
	a.cache.Store(p.cache)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.endpoint.Serve(ctx, lis) })
	g.Go(func() error { return p.cache.Run(ctx) })
	g.Go(func() error {
		err := p.node.Run(ctx)
		if fault.ReasonOf(err) == "agent_banned" {
			err = errors.Join(err, p.cache.Purge())
		}
		return err
	})
	return g.Wait()
}

// parts are the rooms of a running agent.
type parts struct {
	node     *node.Node
	cache    *cache.Cache
	endpoint *endpoint.Server
}

func (a *Agent) build(st *state.State) (*parts, error) {
	prefix := "/" + a.cfg.ReservedPrefix + "/"
	n, err := node.New(node.Options{
		Config: node.Config{
			TrustDomain: a.td, ReservedPrefix: prefix, Addresses: a.cfg.Server.Addresses,
			TrustBundle: a.cfg.TrustBundle, Pin: a.cfg.Pin, JoinTokenFile: a.cfg.JoinTokenFile, Version: a.deps.Version,
		},
		State: st, Log: a.deps.Log, Registerer: a.deps.Registerer,
	})
	if err != nil {
		return nil, err
	}
	c, err := cache.New(cache.Options{
		TrustDomain: a.td, ReservedPrefix: prefix, RunDir: a.cfg.RunDir, Version: a.deps.Version,
		State: st, Connector: connector{n}, Log: a.deps.Log, Registerer: a.deps.Registerer,
	})
	if err != nil {
		return nil, err
	}
	who, err := attest.NewAttestor(attest.Options{Config: a.cfg.Attestation, Log: a.deps.Log})
	if err != nil {
		return nil, err
	}
	e, err := endpoint.New(endpoint.Config{
		Attestor:  who,
		Subscribe: func(s selector.Set) endpoint.Subscription { return c.Subscribe(s) },
		Limits:    a.cfg.Limits, Log: a.deps.Log, Calls: rpc.NewMetrics(a.deps.Registerer), Registerer: a.deps.Registerer,
	})
	if err != nil {
		return nil, err
	}
	return &parts{node: n, cache: c, endpoint: e}, nil
}

// Ready says why the agent can't do its whole work, nil if it can: it is in
// sync with a server and what it holds has not ended.
func (a *Agent) Ready(context.Context) error {
	c := a.cache.Load()
	if c == nil {
		return fault.New(fault.NotReady, "starting", "the agent is starting")
	}
	s := c.Status()
	switch {
	case !s.Synced:
		return fault.New(fault.NotReady, "not_synced", "the agent has not heard from its server yet")
	case !s.Connected && time.Since(s.LastSync) > staleAfter:
		return fault.Newf(fault.NotReady, "sync_stale", "no word from the server for %v: serving what there is", time.Since(s.LastSync).Round(time.Second))
	case !s.EarliestNotAfter.IsZero() && time.Now().After(s.EarliestNotAfter):
		return fault.New(fault.NotReady, "svid_expired", "an X.509-SVID has ended and could not be renewed")
	}
	return nil
}

// connector shows a node's connections to the cache.
type connector struct{ node *node.Node }

func (c connector) Conn(ctx context.Context) (cache.Conn, error) {
	conn, err := c.node.Conn(ctx)
	if err != nil {
		return nil, err
	}
	return connection{conn}, nil
}

type connection struct{ *node.Conn }

func (c connection) Client() agentv1.AgentClient { return c.Conn.Client }

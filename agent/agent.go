// Package agent is the daemon of a node: it proves the node to the server,
// keeps the workloads' X.509-SVIDs fresh and serves the SPIFFE Workload API and
// Envoy's SDS.
//
// It owns the one Config and the wiring of its rooms, from the bottom up:
//
//	state      what must not be forgotten, in data_dir
//	node       who this agent is, and its connection to the server
//	cache      entries, bundle and SVIDs; survives in run_dir
//	attest     who is calling on the sockets
//	endpoint   caller -> subscription -> message
//
// It trusts the server that node has verified, and nothing that a workload
// says.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/agent/attest"
	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/agent/endpoint"
	"github.com/seed-caa81108/assay/agent/node"
	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// Deps is what an Agent gets from the program around it.
type Deps struct {
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Version    string
}

// Agent is an Assay agent.
type Agent struct {
	cfg   Config
	deps  Deps
	calls *rpc.Metrics
	rooms atomic.Pointer[rooms] // nil while not serving
}

// New checks the configuration and returns an agent. Nothing is opened or
// started before Run.
func New(cfg Config, deps Deps) (*Agent, error) {
	cfg, err := cfg.Validate()
	if err != nil {
		return nil, err
	}
	if deps.Log == nil || deps.Registerer == nil {
		return nil, errors.New("make agent: Log and Registerer are needed")
	}
	return &Agent{cfg: cfg, deps: deps, calls: rpc.NewMetrics(deps.Registerer)}, nil
}

// rooms are the parts of a running agent.
type rooms struct {
	state    *state.State
	node     *node.Node
	cache    *cache.Cache
	endpoint *endpoint.Server
	api, sds *durable.KeptListener
	clock    *schedule.Clock
	pinning  string // how callers are pinned
}

// Run opens everything and serves until ctx ends. An error says what could not
// be opened, or that the server banned this agent (agent_banned): then nothing
// is left of its identity and certificates. An Agent runs once.
func (a *Agent) Run(ctx context.Context) error {
	r, err := a.open()
	if err != nil {
		return err
	}
	a.rooms.Store(r)
	a.deps.Log.InfoContext(ctx, "serving workloads", slog.String("socket", a.cfg.socket()), slog.String("sds_socket", a.cfg.sdsSocket()),
		slog.String("trust_domain", a.cfg.TrustDomain), slog.String("callers_pinned_by", r.pinning))
	err = a.serve(ctx, r)
	a.rooms.Store(nil)
	return errors.Join(err, r.state.Close())
}

// open makes the rooms in their order. What fails closes what was open.
func (a *Agent) open() (_ *rooms, err error) {
	r := &rooms{clock: schedule.SystemClock()}
	if r.state, err = state.Open(a.cfg.DataDir, a.cfg.trustDomain()); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = r.state.Close()
		}
	}()
	log, reg := a.deps.Log, a.deps.Registerer
	if r.node, err = node.New(node.Options{
		Config: node.Config{
			TrustDomain: a.cfg.trustDomain(), ReservedPrefix: a.cfg.prefix(), Addresses: a.cfg.Server.Addresses,
			TrustBundle: a.cfg.TrustBundle, Pin: a.cfg.Pin, JoinTokenFile: a.cfg.JoinTokenFile, X509Pop: node.X509Pop(a.cfg.X509Pop), K8SPsat: node.K8SPsat(a.cfg.K8SPsat), Version: a.deps.Version,
		},
		State: r.state, Clock: r.clock, Log: log, Registerer: reg,
	}); err != nil {
		return nil, err
	}
	if r.cache, err = cache.New(cache.Options{
		TrustDomain: a.cfg.trustDomain(), ReservedPrefix: a.cfg.prefix(), RunDir: a.cfg.RunDir, Version: a.deps.Version,
		State: r.state, Connector: connector{r.node}, Clock: r.clock, Log: log, Registerer: reg,
	}); err != nil {
		return nil, err
	}
	sources := map[string]attest.Source{"unix": attest.NewUnix(a.cfg.Attestation.Unix)}
	if a.cfg.K8SPsat.Cluster != "" {
		if sources["k8s"], err = attest.NewK8S(a.cfg.Attestation.K8S, r.cache); err != nil {
			return nil, err
		}
	}
	attestor, err := attest.NewAttestor(attest.Options{Config: a.cfg.Attestation, Sources: sources, Log: log})
	if err != nil {
		return nil, err
	}
	r.pinning = attestor.Mode()
	if r.endpoint, err = endpoint.New(endpoint.Config{
		Attestor:  attestor,
		Subscribe: func(s selector.Set) endpoint.Subscription { return r.cache.Subscribe(s) },
		Limits:    a.cfg.Limits, SDS: a.cfg.SDS, Log: log, Calls: a.calls, Registerer: reg,
	}); err != nil {
		return nil, err
	}
	if r.api, err = a.listen(a.cfg.socket()); err != nil {
		return nil, err
	}
	if r.sds, err = a.listen(a.cfg.sdsSocket()); err != nil {
		_ = r.api.Close()
		return nil, err
	}
	return r, nil
}

// listen puts a socket for workloads in place, and its directory if need be.
func (a *Agent) listen(path string) (*durable.KeptListener, error) {
	return durable.KeepUnix(func() (*durable.Listener, error) {
		if err := durable.MkdirPrivate(a.cfg.Sockets.Dir, 0o755); err != nil {
			return nil, err
		}
		return durable.ListenUnix(path, 0o666)
	})
}

// serve runs the rooms until ctx ends or one of them fails.
func (a *Agent) serve(ctx context.Context, r *rooms) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		err := r.node.Run(ctx)
		if fault.ReasonOf(err) == agentv1.ReasonAgentBanned {
			// Before the streams end, so that workloads learn that they have
			// nothing any more.
			return errors.Join(err, r.cache.Purge())
		}
		return err
	})
	g.Go(func() error { return r.cache.Run(ctx) })
	g.Go(func() error { return r.endpoint.Serve(ctx, endpoint.Sockets{API: r.api, SDS: r.sds}) })
	g.Go(func() error {
		r.api.Keep(ctx, func(err error) { a.tellSocket(ctx, a.cfg.socket(), err) })
		return nil
	})
	g.Go(func() error {
		r.sds.Keep(ctx, func(err error) { a.tellSocket(ctx, a.cfg.sdsSocket(), err) })
		return nil
	})
	return g.Wait()
}

// tellSocket logs what became of a socket that somebody removed or replaced.
func (a *Agent) tellSocket(ctx context.Context, socket string, err error) {
	path := slog.String("socket", socket)
	if err != nil {
		a.deps.Log.LogAttrs(ctx, slog.LevelError, "the socket is gone and can't be put back; open streams go on, new callers find nothing", path,
			slog.String("reason", fault.ReasonOf(err)), slog.String("error", err.Error()))
		return
	}
	a.deps.Log.LogAttrs(ctx, slog.LevelWarn, "the socket was removed or replaced: put it back; open streams went on", path)
}

// connector lets the cache use the node's connections.
type connector struct{ node *node.Node }

// Conn implements cache.Connector.
func (c connector) Conn(ctx context.Context) (cache.Conn, error) {
	conn, err := c.node.Conn(ctx)
	if err != nil {
		return nil, err
	}
	return nodeConn{conn}, nil
}

type nodeConn struct{ *node.Conn }

// Client implements cache.Conn.
func (c nodeConn) Client() agentv1.AgentClient { return c.Conn.Client }

// stale is how long the agent may be without its server before it calls itself
// not ready. It goes on serving all the same.
const stale = 5 * time.Minute

// Ready says whether the agent can serve, and will be able to for a while:
// nil, or why not.
func (a *Agent) Ready(context.Context) error {
	r := a.rooms.Load()
	if r == nil {
		return fault.New(fault.NotReady, "agent_starting", "the agent is starting or stopping")
	}
	id, attested := r.state.Identity()
	return ready(r.clock.Now(), attested, id, r.cache.Status(), r.api.InPlace() && r.sds.InPlace())
}

// ready is the rule of Ready.
func ready(now time.Time, attested bool, id state.Identity, c cache.Status, sockets bool) error {
	switch {
	case !sockets:
		return fault.New(fault.NotReady, "socket_missing", "a socket was removed or replaced; the agent puts it back within seconds, or its log says why it can't")
	case !attested:
		return fault.New(fault.NotReady, "not_attested", "the agent has not joined yet: see its log")
	case !c.Synced:
		return fault.New(fault.NotReady, "not_synced", "the agent has not heard from its server yet")
	case c.Connected:
		return nil
	case !c.EarliestNotAfter.IsZero() && !now.Before(c.EarliestNotAfter):
		return fault.New(fault.NotReady, "svid_expired_server_unreachable", "certificates have expired and the server can't be reached")
	case !now.Before(id.NotAfter()):
		return fault.New(fault.NotReady, "agent_svid_expired", "the agent's own certificate has expired and the server can't be reached")
	case now.Sub(c.LastSync) > stale:
		return fault.Newf(fault.NotReady, "sync_stale", "no contact with the server since %s%s",
			c.LastSync.UTC().Format(time.RFC3339), budget(c.EarliestNotAfter))
	}
	return nil
}

// budget says how long serving goes on.
func budget(earliest time.Time) string {
	if earliest.IsZero() {
		return ""
	}
	return fmt.Sprintf("; all certificates last until %s", earliest.UTC().Format(time.RFC3339))
}

package node

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// Config says which server to trust and how to prove the node to it.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// ReservedPrefix of the paths of servers and agents: "/assay/".
	ReservedPrefix string
	// Addresses of servers, host:port, tried in turn.
	Addresses []string
	// TrustBundle is a file with roots, all of which are trusted; Pin names
	// one root by its key. One of the two, read until a bundle came from an
	// authenticated server.
	TrustBundle string
	Pin         string
	// JoinTokenFile may be empty once the agent has an identity.
	JoinTokenFile string
	// X509Pop is how the node proves itself instead, if it is set.
	X509Pop X509Pop
	// K8SPsat is another such way.
	K8SPsat K8SPsat
	// Version is what the agent tells the server about itself.
	Version string
}

// Options are what New needs.
type Options struct {
	Config
	State *state.State
	// Clock tells the time; nil: the wall clock, whatever it shows.
	Clock      *schedule.Clock
	Log        *slog.Logger
	Registerer prometheus.Registerer
	// Dial reaches an address; nil means TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
}

// Node is this agent towards the server.
type Node struct {
	cfg      Config
	serverID spiffeid.ID
	state    *state.State
	clock    *schedule.Clock
	log      *slog.Logger
	metrics  *metrics
	reach    func(ctx context.Context, address string) (net.Conn, error)

	// bootstrap is set by Run and read by handshakes, which gRPC makes when it
	// sees fit, also while Run is fetching it again.
	bootstrap atomic.Pointer[state.Bundle]
	// disowned: the server does not accept the identity in the state. Owned by
	// Run.
	disowned bool

	mu      sync.Mutex
	current *Conn
	changed chan struct{} // closed when current changes
}

// New checks the configuration and returns a Node that does nothing yet.
func New(o Options) (*Node, error) {
	serverID, err := spiffeid.FromPath(o.TrustDomain, o.ReservedPrefix+"server")
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "config_trust_domain", "trust_domain or reserved_prefix gives no valid ID for the server")
	}
	if len(o.Addresses) == 0 {
		return nil, fault.New(fault.Precondition, "config_server", "server.addresses needs at least one host:port")
	}
	if (o.TrustBundle == "") == (o.Pin == "") {
		return nil, fault.New(fault.Precondition, "config_trust", "set one of trust_bundle and pin, so that the agent can recognise its server")
	}
	if o.Pin != "" {
		if err := CheckPin(o.Pin); err != nil {
			return nil, err
		}
	}
	n := &Node{
		cfg: o.Config, serverID: serverID, state: o.State, clock: o.Clock, log: o.Log, metrics: newMetrics(o.Registerer),
		reach: o.Dial, changed: make(chan struct{}),
	}
	if n.reach == nil {
		n.reach = func(ctx context.Context, address string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", address)
		}
	}
	if id, ok := o.State.Identity(); ok {
		n.metrics.notAfter.Set(float64(id.NotAfter().Unix()))
	}
	return n, nil
}

// Run proves the node and keeps it proven until ctx ends, when it returns nil.
// A ban by the server ends it with reason agent_banned, a configuration under
// which it could never work with a fault that says so.
func (n *Node) Run(ctx context.Context) error {
	defer n.publish(nil)
	err := n.run(ctx)
	if isBan(err) {
		n.log.ErrorContext(ctx, "this agent is banned: forgetting its identity", slog.String("error", err.Error()))
		n.metrics.notAfter.Set(0)
		return errors.Join(err, n.state.DropIdentity())
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (n *Node) run(ctx context.Context) error {
	if _, ok := n.state.Identity(); !ok && n.cfg.JoinTokenFile == "" && !n.cfg.X509Pop.isSet() && !n.cfg.K8SPsat.isSet() {
		return fault.New(fault.Precondition, "config_no_attestor", "this agent has no identity yet: set join_token_file, x509pop or k8s_psat")
	}
	if err := n.establishTrust(ctx); err != nil {
		return err
	}
	taken := schedule.Backoff{Min: 2 * time.Second, Max: time.Minute}
	for {
		id, err := n.ensureIdentity(ctx)
		if err != nil {
			return err
		}
		since := time.Now()
		conn, err := n.connect(ctx, id)
		if err == nil {
			n.publish(conn)
			n.log.InfoContext(ctx, "connected to the server", slog.String("agent_id", id.AgentID.String()),
				slog.String("serial", id.Chain[0].SerialNumber.Text(16)), slog.Time("not_after", id.NotAfter()))
			err = n.keep(ctx, conn, id)
		}
		switch {
		case err == nil: // renewed: the connection lives until its successor works
		case errors.Is(err, errNotAccepted):
			n.disowned = true
			n.publish(nil)
			pause := time.Duration(0)
			if fault.ReasonOf(err) == agentv1.ReasonAgentSVIDNotActive {
				pause = pauseAfterTakeover(&taken, time.Since(since))
			}
			n.log.WarnContext(ctx, "attesting anew", slog.String("error", err.Error()), slog.Duration("in", pause))
			if err := schedule.Sleep(ctx, pause); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// heldLong is how long an identity has to last for its loss not to count with
// the one before.
const heldLong = 10 * time.Minute

// pauseAfterTakeover is how long to wait when another certificate of this
// agent was used. If that was another machine with the same evidence, both
// would take it from each other as fast as they can attest.
func pauseAfterTakeover(taken *schedule.Backoff, held time.Duration) time.Duration {
	if held > heldLong {
		taken.Reset()
	}
	return taken.Next()
}

// retry does what until it succeeds, ctx ends or the server's verdict on this
// agent makes trying again pointless. It counts attempts under step, if any.
// Pauses after a refusal begin at a second and grow longer than those for a
// server that is away.
func (n *Node) retry(ctx context.Context, what, step string, do func(context.Context) error) error {
	away, refusal := schedule.Backoff{Max: 15 * time.Second}, schedule.Backoff{Min: 2 * time.Second, Max: time.Minute}
	for {
		err := do(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if step != "" {
			n.metrics.attempt(step, err)
		}
		if err == nil || isBan(err) || errors.Is(err, errNotAccepted) {
			return err
		}
		wait := &refusal
		if fault.KindOf(err) == fault.NotReady {
			wait = &away
		}
		level := slog.LevelWarn
		if fault.ReasonOf(err) == "bundle_rollback" {
			level = slog.LevelError // somebody has to look at this
		}
		pause := max(wait.Next(), fault.RetryAfterOf(err))
		n.log.LogAttrs(ctx, level, "step failed, trying again", slog.String("step", what),
			slog.String("reason", fault.ReasonOf(err)), slog.String("error", err.Error()), slog.Duration("retry_in", pause))
		if err := schedule.Sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// errExpired is a reason to attest anew that the agent sees by itself.
var errExpired = fault.New(fault.Unauthenticated, "svid_expired", "the agent's own certificate has expired")

// patience is how many attempts with a certificate may fail before the agent
// asks whether the certificate is the problem.
const patience = 5

// connect dials with id's certificate and makes one authenticated call, which
// proves that the server accepts it and makes it the active one.
func (n *Node) connect(ctx context.Context, id state.Identity) (*Conn, error) {
	conn, err := n.dialAs(id)
	if err != nil {
		return nil, err
	}
	failures := 0
	err = n.retry(ctx, "connect to the server", "connect", func(ctx context.Context) error {
		if !n.clock.Now().Before(id.NotAfter()) {
			return errors.Join(errNotAccepted, errExpired)
		}
		err := n.probe(ctx, conn)
		if verdict := verdictOf(err); verdict != nil {
			return verdict
		}
		if err == nil || !fromTransport(err) {
			return err
		}
		if failures++; failures%patience == 0 && n.reachableWithoutCertificate(ctx) {
			return errors.Join(errNotAccepted, err)
		}
		return err
	})
	if err != nil {
		_ = conn.cc.Close()
		return nil, err
	}
	return conn, nil
}

// fromTransport tells a broken connection from a server that answers that it
// can't help now: the latter gives a reason.
func fromTransport(err error) bool { return fault.ReasonOf(err) == fault.NotReady.Error() }

// probe is the cheapest authenticated call: a batch of nothing. A server that
// refuses an empty batch has authenticated the agent before it looked.
func (n *Node) probe(ctx context.Context, conn *Conn) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := conn.Client.SignX509(ctx, &agentv1.SignX509Request{})
	if err = conn.cc.explain(err); fault.KindOf(err) == fault.Invalid {
		return nil
	}
	return err
}

// reachableWithoutCertificate tells a server that is down from one that ends
// the handshake because our certificate chains to no root of its.
func (n *Node) reachableWithoutCertificate(ctx context.Context) bool {
	cc, err := n.dial(n.anonymous())
	if err != nil {
		return false
	}
	defer func() { _ = cc.Close() }()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err = agentv1.NewAgentClient(cc).Bundle(ctx, &agentv1.BundleRequest{})
	return err == nil
}

// keep watches the connection and the clock. It returns nil after a renewal,
// else why the connection is of no use any more.
func (n *Node) keep(ctx context.Context, conn *Conn, id state.Identity) error {
	leaf := id.Chain[0]
	life := id.NotAfter().Sub(leaf.NotBefore)
	due := schedule.RenewAt(leaf.NotBefore, id.NotAfter())
	wait := schedule.Backoff{Max: min(time.Minute, max(life/20, time.Second))}
	tick := time.NewTicker(schedule.Tick(life))
	defer tick.Stop()
	judged := uint64(0) // sequence of the bundle that due accords with
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-conn.trouble:
			return err
		case <-tick.C:
		}
		now := n.clock.Now()
		if !now.Before(id.NotAfter()) {
			return errors.Join(errNotAccepted, errExpired)
		}
		if b, ok := n.state.Bundle(); ok && b.Sequence != judged {
			judged = b.Sequence
			due = earlier(due, leaveBy(id, b, now))
		}
		if now.Before(due) {
			continue
		}
		err := n.renew(ctx, conn, id)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		n.metrics.attempt("renew", err)
		if err == nil {
			return nil
		}
		if verdict := verdictOf(err); verdict != nil {
			return verdict
		}
		due = now.Add(max(wait.Next(), fault.RetryAfterOf(err)))
		n.log.WarnContext(ctx, "could not renew the agent's certificate", slog.String("reason", fault.ReasonOf(err)),
			slog.String("error", err.Error()), slog.Time("not_after", id.NotAfter()), slog.Time("retry_at", due))
	}
}

// leaveWindow is the most of the time over which a fleet replaces its
// certificates under a retired root.
const leaveWindow = 5 * time.Minute

// leaveBy is when an identity has to be replaced because of its root: at once
// under one that is tainted or gone, within a window under a retired one, zero
// if there is no such reason.
func leaveBy(id state.Identity, b *state.Bundle, now time.Time) time.Time {
	root, ok := b.Authority(id.AuthorityID())
	switch {
	case !ok || root.Tainted:
		return now
	case root.Retired:
		life := id.NotAfter().Sub(id.Chain[0].NotBefore)
		return schedule.Within(now, min(leaveWindow, life/12))
	}
	return time.Time{}
}

// earlier is at, unless sooner is set and comes before it.
func earlier(at, sooner time.Time) time.Time {
	if !sooner.IsZero() && sooner.Before(at) {
		return sooner
	}
	return at
}

package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

const (
	// callTimeout bounds the unary calls of this package.
	callTimeout = 15 * time.Second
	// maxRecvBytes bounds a message from the server: a chunk of a snapshot or
	// a batch of chains.
	maxRecvBytes = 16 << 20
)

// Conn is a connection to the server that is authenticated with the agent's
// current certificate. It reconnects by itself; only a renewed certificate, or
// one that the server no longer accepts, makes another Conn necessary.
type Conn struct {
	Client agentv1.AgentClient

	cc       *link
	replaced chan struct{}
	trouble  chan error // capacity 1: why the server does not accept us

	mu      sync.Mutex
	users   int
	retired bool
}

// Replaced is closed when users should release this Conn and ask for another.
func (c *Conn) Replaced() <-chan struct{} { return c.replaced }

// Ready returns nil if the connection stands or can be made, else why not:
// server_unreachable or server_untrusted, with the address.
func (c *Conn) Ready(ctx context.Context) error { return c.cc.ready(ctx) }

// Release says that the caller is done with the Conn. Each Conn that was
// returned by Node.Conn is released once.
func (c *Conn) Release() {
	c.mu.Lock()
	c.users--
	last := c.retired && c.users == 0
	c.mu.Unlock()
	if last {
		_ = c.cc.Close()
	}
}

// use counts a user, unless the connection is on its way out.
func (c *Conn) use() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.retired {
		return false
	}
	c.users++
	return true
}

// retire tells the users to go; the last one closes.
func (c *Conn) retire() {
	c.mu.Lock()
	again := c.retired
	c.retired = true
	idle := c.users == 0
	c.mu.Unlock()
	if again {
		return
	}
	close(c.replaced)
	if idle {
		_ = c.cc.Close()
	}
}

// errNotAccepted is wrapped by the reason why the server does not accept the
// agent's certificate: the way back is to attest.
var errNotAccepted = errors.New("the server does not accept this agent's certificate")

// observe looks at the outcome of every call over the connection, whoever
// makes it, for the server's verdict on this agent.
func (c *Conn) observe(err error) {
	if err == nil || errors.Is(err, io.EOF) {
		return
	}
	if verdict := verdictOf(fault.FromStatus(err)); verdict != nil {
		select {
		case c.trouble <- verdict:
		default:
		}
	}
}

// verdictOf returns what err says about the agent itself, nil for errors that
// are about the call or the network.
func verdictOf(err error) error {
	switch {
	case isBan(err):
		return err
	case fault.ReasonOf(err) == agentv1.ReasonAgentUnknown, fault.ReasonOf(err) == agentv1.ReasonAgentSVIDNotActive,
		fault.KindOf(err) == fault.Unauthenticated:
		return fmt.Errorf("%w: %w", errNotAccepted, err)
	}
	return nil
}

func isBan(err error) bool { return fault.ReasonOf(err) == agentv1.ReasonAgentBanned }

func (c *Conn) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, cc, opts...)
	c.observe(err)
	return err
}

func (c *Conn) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		c.observe(err)
		return nil, err
	}
	return &observedStream{ClientStream: s, conn: c}, nil
}

type observedStream struct {
	grpc.ClientStream
	conn *Conn
}

func (s *observedStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	s.conn.observe(err)
	return err
}

// dial makes a client of the configured addresses, which are tried in turn.
func (n *Node) dial(creds credentials.TransportCredentials, opts ...grpc.DialOption) (*link, error) {
	servers := manual.NewBuilderWithScheme("assay")
	addresses := make([]resolver.Address, len(n.cfg.Addresses))
	for i, a := range n.cfg.Addresses {
		addresses[i] = address(a)
	}
	servers.InitialState(resolver.State{Addresses: addresses})
	l := &link{node: n, failed: map[string]error{}, news: make(chan struct{})}
	cc, err := grpc.NewClient("assay:///server", append([]grpc.DialOption{
		grpc.WithResolvers(servers),
		grpc.WithTransportCredentials(proving{creds, l}),
		grpc.WithContextDialer(l.dial),
		grpc.WithNoProxy(),
		grpc.WithUserAgent("assay-agent/" + n.cfg.Version),
		grpc.WithDisableServiceConfig(),
		grpc.WithIdleTimeout(0),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxRecvBytes)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.4, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		// A server that fell silent without a word: the stream must notice.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 45 * time.Second, Timeout: 15 * time.Second}),
	}, opts...)...)
	if err != nil {
		return nil, fmt.Errorf("make client: %w", err)
	}
	l.ClientConn = cc
	return l, nil
}

// anonymous are credentials without a client certificate.
func (n *Node) anonymous() credentials.TransportCredentials {
	return rpc.ClientTLS(n.serverID, n.roots, func() *tls.Certificate { return nil })
}

func (n *Node) roots() []*x509.Certificate { return n.bundle().Roots() }

// dialAs makes a client that authenticates as id.
func (n *Node) dialAs(id state.Identity) (*Conn, error) {
	cert := &tls.Certificate{PrivateKey: id.Key, Leaf: id.Chain[0]}
	for _, c := range id.Chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	c := &Conn{replaced: make(chan struct{}), trouble: make(chan error, 1)}
	cc, err := n.dial(rpc.ClientTLS(n.serverID, n.roots, func() *tls.Certificate { return cert }),
		grpc.WithUnaryInterceptor(c.unary), grpc.WithStreamInterceptor(c.stream))
	if err != nil {
		return nil, err
	}
	c.cc, c.Client = cc, agentv1.NewAgentClient(cc)
	return c, nil
}

// Conn returns the current connection, waiting for one until ctx ends. The
// caller releases it.
func (n *Node) Conn(ctx context.Context) (*Conn, error) {
	for {
		n.mu.Lock()
		current, changed := n.current, n.changed
		n.mu.Unlock()
		if current != nil && current.use() {
			return current, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fault.Wrap(fault.NotReady, ctx.Err(), "server_unreachable", "no connection to the server yet")
		}
	}
}

// publish makes c the current connection, nil for none, and retires the one
// before.
func (n *Node) publish(c *Conn) {
	n.mu.Lock()
	old := n.current
	n.current = c
	close(n.changed)
	n.changed = make(chan struct{})
	n.mu.Unlock()
	if old != nil {
		old.retire()
	}
}

package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/server/api"
)

// maxOperatorConns is how many connections one remote operator may have: its
// ID may be shared by the jobs of a pipeline.
const maxOperatorConns = 64

// remoteServer builds the server of remote operators. They come to the agents'
// port, and once the handshake has shown who they are, their connections go
// through a handover to a server of their own: agents and strangers reach neither
// its methods nor its limits, which are those of the admin socket.
func (s *Server) remoteServer(r *rooms) (*grpc.Server, error) {
	ids := s.cfg.Admin.remoteIDs()
	own, err := spiffeid.FromPath(s.cfg.trustDomain(), s.cfg.prefix()+"server")
	if err != nil {
		return nil, fmt.Errorf("build server ID: %w", err)
	}
	srv := rpc.NewServer(rpc.ServerConfig{
		Name: "operators", Methods: api.RateLimited(api.RemoteMethods(ids, r.refusals.Report), s.cfg.Limits.OperatorRate), Creds: doorCreds{},
		Unlisted:          r.refusals.ReportUnlisted,
		RefusalsPerSecond: refusalLines,
		MaxRecvBytes:      maxAdminMessage, MaxStreams: s.cfg.Limits.Streams, Log: s.deps.Log, Metrics: s.metrics.rpc,
		Options: keepalives(),
	})
	s.registerOperators(srv, r, api.RemoteGuard(ids, own))
	return srv, nil
}

// handover is a listener for connections whose handshake is done.
type handover struct {
	addr  net.Addr
	conns chan *operatorConn
	done  chan struct{}
	close func()
}

func newHandover(addr net.Addr) *handover {
	done := make(chan struct{})
	return &handover{addr: addr, conns: make(chan *operatorConn), done: done, close: sync.OnceFunc(func() { close(done) })}
}

// give hands conn over; false if nobody takes it any more.
func (h *handover) give(conn *operatorConn) bool {
	select {
	case h.conns <- conn:
		return true
	case <-h.done:
		return false
	}
}

// Accept implements net.Listener.
func (h *handover) Accept() (net.Conn, error) {
	select {
	case conn := <-h.conns:
		return conn, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *handover) Close() error { h.close(); return nil }

// Addr implements net.Listener.
func (h *handover) Addr() net.Addr { return h.addr }

// operatorConn is a connection of a remote operator.
type operatorConn struct {
	net.Conn
	info operatorInfo

	mu    sync.Mutex
	limit *time.Timer
}

// SetDeadline implements net.Conn. The server that accepted the connection
// takes its deadline off the socket when it hears that the connection is gone,
// which may be after the next one has set its own. So that one is kept here.
func (c *operatorConn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.limit != nil {
		c.limit.Stop()
		c.limit = nil
	}
	if !t.IsZero() {
		c.limit = time.AfterFunc(time.Until(t), func() { _ = c.Conn.Close() })
	}
	return nil
}

// operatorInfo is who a remote operator is.
type operatorInfo struct{ *rpc.TLSInfo }

// Caller returns the peer as its certificate shows it.
func (i operatorInfo) Caller() rpc.Caller {
	c := i.TLSInfo.Caller()
	c.Operator = true
	return c
}

// doorCreds are the credentials of connections from a handover.
type doorCreds struct{}

// ServerHandshake implements credentials.TransportCredentials.
func (doorCreds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := conn.(*operatorConn)
	if !ok {
		_ = conn.Close()
		return nil, nil, errors.New("not a connection whose handshake is done")
	}
	return c, c.info, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (doorCreds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server credentials on a client")
}

// Info implements credentials.TransportCredentials.
func (doorCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (doorCreds) Clone() credentials.TransportCredentials { return doorCreds{} }

// OverrideServerName implements credentials.TransportCredentials.
func (doorCreds) OverrideServerName(string) error { return nil }

package server

import (
	"context"
	"errors"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"

	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/server/limit"
)

// connLimits bounds the connections of the agents' listener: per agent or
// operator once a certificate was seen that isAgent or isOperator admits, per
// address before and without one. A replaced certificate of an agent, or that
// of a banned one, counts as none: who stole it could otherwise take all the
// places of the agent. It wraps the transport credentials, because only they
// know both. Operators are handed over to a server of their own.
type connLimits struct {
	credentials.TransportCredentials
	isAgent, isOperator rpc.Rule
	operators           *handover
	counts              *connCounts
	refused             func(limit string)
	failed              func(error) // told of handshakes that failed
}

// ServerHandshake implements credentials.TransportCredentials.
func (l *connLimits) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	host := limit.HostOf(raw.RemoteAddr().String())
	if !l.counts.enter(host) {
		l.refused("limit_anonymous_connections")
		_ = raw.Close()
		return nil, nil, errors.New("too many connections without an agent's certificate from this address")
	}
	conn, info, err := l.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		l.counts.leave(host)
		l.failed(err)
		return nil, nil, err
	}
	peer, limit := l.known(info)
	if limit == 0 {
		return &countedConn{Conn: conn, release: sync.OnceFunc(func() { l.counts.leave(host) })}, info, nil
	}
	if !l.counts.become(host, peer.ID.String(), limit) {
		l.refused("limit_connections")
		_ = conn.Close()
		return nil, nil, errors.New("too many connections of " + peer.ID.String())
	}
	counted := &countedConn{Conn: conn, release: sync.OnceFunc(func() { l.counts.leaveKnown(peer.ID.String()) })}
	tlsInfo, ok := info.(*rpc.TLSInfo)
	if !ok || l.isOperator(peer) != nil {
		return counted, info, nil
	}
	if !l.operators.give(&operatorConn{Conn: counted, info: operatorInfo{tlsInfo}}) {
		_ = counted.Close()
		return nil, nil, errors.New("stopping")
	}
	return nil, nil, credentials.ErrConnDispatched
}

// known returns who a peer is that has places of its own, and how many.
func (l *connLimits) known(info credentials.AuthInfo) (rpc.Caller, int) {
	c, ok := info.(interface{ Caller() rpc.Caller })
	if !ok {
		return rpc.Caller{}, 0
	}
	switch peer := c.Caller(); {
	case l.isAgent(peer) == nil:
		return peer, l.counts.perAgent
	case l.isOperator(peer) == nil:
		return peer, maxOperatorConns
	}
	return rpc.Caller{}, 0
}

// ClientHandshake implements credentials.TransportCredentials.
func (*connLimits) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server credentials on a client")
}

// Clone implements credentials.TransportCredentials; the counts stay shared.
func (l *connLimits) Clone() credentials.TransportCredentials {
	clone := *l
	clone.TransportCredentials = l.TransportCredentials.Clone()
	return &clone
}

// countedConn gives its place back when it is closed.
type countedConn struct {
	net.Conn
	release func()
}

// Close implements net.Conn.
func (c *countedConn) Close() error {
	c.release()
	return c.Conn.Close()
}

type connCounts struct {
	perAgent, perAddress int

	mu        sync.Mutex
	known     map[string]int // by SPIFFE ID
	addresses map[string]int
}

func newConnCounts(perAgent, perAddress int) *connCounts {
	return &connCounts{perAgent: perAgent, perAddress: perAddress, known: map[string]int{}, addresses: map[string]int{}}
}

func (c *connCounts) enter(host string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.addresses[host] >= c.perAddress {
		return false
	}
	c.addresses[host]++
	return true
}

func (c *connCounts) leave(host string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	drop(c.addresses, host)
}

// become moves a connection from its address to who it is of.
func (c *connCounts) become(host, id string, limit int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	drop(c.addresses, host)
	if c.known[id] >= limit {
		return false
	}
	c.known[id]++
	return true
}

func (c *connCounts) leaveKnown(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	drop(c.known, id)
}

func drop(counts map[string]int, key string) {
	if counts[key]--; counts[key] <= 0 {
		delete(counts, key)
	}
}

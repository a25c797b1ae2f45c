package server

import (
	"context"
	"errors"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"

	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/server/api"
)

// connLimits bounds the connections of the agents' listener: per agent once a
// certificate was seen that isAgent admits, per address before and without one.
// A replaced certificate of an agent, or that of a banned one, counts as none:
// who stole it could otherwise take all the places of the agent. It wraps the
// transport credentials, because only they know both.
type connLimits struct {
	credentials.TransportCredentials
	isAgent rpc.Rule
	counts  *connCounts
}

func limitConns(creds credentials.TransportCredentials, isAgent rpc.Rule, perAgent, perAddress int) credentials.TransportCredentials {
	return &connLimits{TransportCredentials: creds, isAgent: isAgent, counts: &connCounts{
		perAgent: perAgent, perAddress: perAddress, agents: map[string]int{}, addresses: map[string]int{},
	}}
}

// ServerHandshake implements credentials.TransportCredentials.
func (l *connLimits) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	host := api.HostOf(raw.RemoteAddr().String())
	if !l.counts.enter(host) {
		_ = raw.Close()
		return nil, nil, errors.New("too many connections without an agent's certificate from this address")
	}
	conn, info, err := l.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		l.counts.leave(host)
		return nil, nil, err
	}
	agent := ""
	if c, ok := info.(interface{ Caller() rpc.Caller }); ok && l.isAgent(c.Caller()) == nil {
		agent = c.Caller().ID.String()
		if !l.counts.become(host, agent) {
			_ = conn.Close()
			return nil, nil, errors.New("too many connections of " + agent)
		}
	}
	return &countedConn{Conn: conn, release: sync.OnceFunc(func() {
		if agent != "" {
			l.counts.leaveAgent(agent)
		} else {
			l.counts.leave(host)
		}
	})}, info, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (*connLimits) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server credentials on a client")
}

// Clone implements credentials.TransportCredentials; the counts stay shared.
func (l *connLimits) Clone() credentials.TransportCredentials {
	return &connLimits{TransportCredentials: l.TransportCredentials.Clone(), isAgent: l.isAgent, counts: l.counts}
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
	agents    map[string]int
	addresses map[string]int
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

// become moves a connection from its address to its agent.
func (c *connCounts) become(host, agent string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	drop(c.addresses, host)
	if c.agents[agent] >= c.perAgent {
		return false
	}
	c.agents[agent]++
	return true
}

func (c *connCounts) leaveAgent(agent string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	drop(c.agents, agent)
}

func drop(counts map[string]int, key string) {
	if counts[key]--; counts[key] <= 0 {
		delete(counts, key)
	}
}

package node

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/resolver"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// link is a client of the configured addresses that remembers why none of them
// could be used: gRPC itself only has a text for that.
type link struct {
	*grpc.ClientConn
	node *Node

	mu     sync.Mutex
	failed map[string]error // by address, since there was hope for the last time
	news   chan struct{}    // closed at the next failure
}

// addressKey finds the configured address in a resolver.Address.
type addressKey struct{}

func address(a string) resolver.Address {
	return resolver.Address{Addr: a, Attributes: attributes.New(addressKey{}, a)}
}

// dial reaches one address.
func (l *link) dial(ctx context.Context, address string) (net.Conn, error) {
	c, err := l.node.reach(ctx, address)
	if err != nil {
		l.fail(address, fault.Wrap(fault.NotReady, err, "server_unreachable",
			"the server at "+address+" can't be reached: is it running, and is the way to it open"))
	}
	return c, err
}

// proving are credentials whose verdict on the server the link remembers.
type proving struct {
	credentials.TransportCredentials
	link *link
}

// ClientHandshake implements credentials.TransportCredentials.
func (p proving) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := p.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err == nil {
		p.link.hope()
		return conn, info, nil
	}
	address, _ := credentials.ClientHandshakeInfoFromContext(ctx).Attributes.Value(addressKey{}).(string)
	p.link.fail(address, p.link.node.judge(address, err))
	return nil, nil, err
}

// Clone implements credentials.TransportCredentials.
func (p proving) Clone() credentials.TransportCredentials {
	return proving{p.TransportCredentials.Clone(), p.link}
}

// judge says what a failed handshake means.
func (n *Node) judge(address string, err error) error {
	if fault.KindOf(err) != fault.Unauthenticated { // not the verification: it never came to that
		return fault.Wrap(fault.NotReady, err, "server_unreachable", "what answers at "+address+" does not finish the TLS handshake: is it the server's port for agents")
	}
	var roots []string
	for _, a := range n.bundle().Authorities {
		roots = append(roots, a.ID)
	}
	return fault.Wrap(fault.NotReady, err, "server_untrusted", fmt.Sprintf(
		"the server at %s is not the one to trust: expected %s, certified under root %s, but %s; check server.addresses, trust_domain and both clocks, and whether the server was set up anew",
		address, n.serverID, strings.Join(roots, " or "), fault.SafeText(err)))
}

// hope forgets old failures: something has changed.
func (l *link) hope() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.failed)
}

func (l *link) fail(address string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed[address] = err
	close(l.news)
	l.news = make(chan struct{})
}

// trouble returns why no address can be used, nil if one may be yet, and a
// channel that is closed when the answer may be another.
func (l *link) trouble() (news <-chan struct{}, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var each []string
	reason := "server_unreachable"
	for _, address := range l.node.cfg.Addresses {
		err := l.failed[address]
		switch {
		case err == nil:
			return l.news, nil
		case len(l.node.cfg.Addresses) == 1:
			return l.news, err
		case fault.ReasonOf(err) == "server_untrusted":
			reason = "server_untrusted" // it needs a human; the other may pass
		}
		each = append(each, err.Error())
	}
	return l.news, fault.New(fault.NotReady, reason, strings.Join(each, "; "))
}

// explain replaces what gRPC says about a link that has no connection.
func (l *link) explain(err error) error {
	err = fault.FromStatus(err)
	if err == nil || fault.ReasonOf(err) != fault.NotReady.Error() {
		return err // the server's own word
	}
	if _, trouble := l.trouble(); trouble != nil {
		return trouble
	}
	return err
}

// ready returns when there is a connection, at once if there is, or why there
// can't be one now. It waits for gRPC's next try, which is never far: to cut its
// pauses short with ResetConnectBackoff is a data race in gRPC.
func (l *link) ready(ctx context.Context) error {
	limit, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	l.hope()
	for {
		state := l.GetState()
		switch state {
		case connectivity.Ready:
			return nil
		case connectivity.Shutdown:
			return fault.New(fault.NotReady, "interrupted", "the connection was closed")
		case connectivity.Idle:
			l.Connect()
		case connectivity.Connecting, connectivity.TransientFailure:
		}
		news, trouble := l.trouble()
		if trouble != nil {
			return trouble
		}
		if l.changed(limit, state, news) {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fault.Newf(fault.NotReady, "server_unreachable", "the server at %s does not answer%s",
			strings.Join(l.node.cfg.Addresses, " or at "), l.partly())
	}
}

// changed waits for another state or for news; false says that ctx ended.
func (l *link) changed(ctx context.Context, state connectivity.State, news <-chan struct{}) bool {
	wait, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		select {
		case <-news:
			stop()
		case <-wait.Done():
		}
	}()
	l.WaitForStateChange(wait, state)
	return ctx.Err() == nil
}

// partly names the failures of some addresses while others are silent.
func (l *link) partly() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var text strings.Builder
	for _, address := range l.node.cfg.Addresses {
		if err := l.failed[address]; err != nil {
			text.WriteString("; " + err.Error())
		}
	}
	return text.String()
}

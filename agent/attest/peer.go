package attest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// Peer is the caller behind one connection. It is the AuthInfo of every RPC
// that comes over it.
type Peer struct {
	credentials.CommonAuthInfo
	caller      rpc.Caller
	attestor    *Attestor
	process     *process
	facts       *facts
	descriptors int
	err         error // why this caller gets nothing
}

// selectors caches the answer of the sources: they are asked once per process.
type selectors struct {
	known atomic.Pointer[selector.Set]
}

// AuthType implements credentials.AuthInfo.
func (*Peer) AuthType() string { return "unix" }

// Caller returns the peer as the kernel recorded it at connect.
func (p *Peer) Caller() rpc.Caller { return p.caller }

// Pinned returns p, also through types that embed it.
func (p *Peer) Pinned() *Peer { return p }

// Descriptors returns how many files were opened for this peer's process by
// this connection: none if an earlier one holds it already.
func (p *Peer) Descriptors() int { return p.descriptors }

// PeerFrom returns the caller of the RPC that ctx belongs to.
func PeerFrom(ctx context.Context) (*Peer, bool) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	info, ok := p.AuthInfo.(interface{ Pinned() *Peer })
	if !ok {
		return nil, false
	}
	return info.Pinned(), true
}

// Err says why the caller could not be pinned, nil if it is.
func (p *Peer) Err() error { return p.err }

// Selectors returns what is known of the caller, as all sources together say.
func (p *Peer) Selectors(ctx context.Context) (selector.Set, error) {
	if p.err != nil {
		return nil, p.err
	}
	if known := p.facts.known.Load(); known != nil {
		return *known, nil
	}
	set, err := p.attestor.attest(ctx, p.facts.process)
	if err != nil {
		if gone := p.Check(); gone != nil { // that is why
			return nil, gone
		}
		return nil, err
	}
	p.facts.known.Store(&set)
	return set, nil
}

// Check says whether the caller is still the process that connected, with the
// same ids, cgroup and program. It is called before each message (WL-26).
func (p *Peer) Check() error {
	if p.err != nil {
		return p.err
	}
	if !p.process.enter() {
		return refusal(errGone)
	}
	defer p.process.leave()
	err := p.process.same(p.facts)
	if err == nil {
		err = p.process.alive()
	}
	if err != nil {
		return refusal(p.process.blame(err))
	}
	return nil
}

// blame finds out what is behind an error: what is left of an exited process
// looks changed, and one that /proc hides from us (hidepid) looks gone.
func (p *process) blame(err error) error {
	switch {
	case !errors.Is(err, errChanged) && !errors.Is(err, errGone):
		return err
	case p.alive() != nil:
		return errGone
	}
	state, _, statErr := stat(p.pid)
	switch {
	case statErr == nil && (state == "Z" || state == "X"):
		return errGone // the leader has exited, be it that other threads live on
	case pinned && errors.Is(statErr, errGone) && p.alive() == nil:
		return errUnresolvable
	}
	return err
}

// refusal is the fault for a caller that could not be pinned or is not what it
// was.
func refusal(err error) error {
	switch {
	case errors.Is(err, errGone):
		return fault.Wrap(fault.Denied, err, "caller_gone", "the process that made this connection has ended")
	case errors.Is(err, errChanged):
		return fault.Wrap(fault.Denied, err, "caller_changed",
			"the process that made this connection has changed its program, user or cgroup; connect again")
	case errors.Is(err, errUnresolvable):
		return fault.Wrap(fault.Denied, err, "caller_unresolvable",
			"the caller's process or user has no number here: it is in a PID or user namespace, or behind a hidepid /proc, that the agent can't see into")
	case errors.Is(err, errTooManyGroups):
		return fault.Wrap(fault.Denied, err, "too_many_groups",
			fmt.Sprintf("the caller has more than %d supplementary groups: run it with fewer", maxGroups))
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		return fault.Wrap(fault.NotReady, err, "load_shed", "the agent has no descriptors or memory left; retry later")
	}
	return fault.Wrap(fault.NotReady, err, "attestation_failed",
		"workload attestation failed; retry, and see the agent's log if it stays")
}

var (
	errUnresolvable  = errors.New("pid 0, overflow uid or no entry in /proc")
	errTooManyGroups = errors.New("too many supplementary groups")
)

// pin looks at the process behind a connected socket. It always returns a peer;
// one that may not be served carries the reason.
func (a *Attestor) pin(sock int) *Peer {
	p := &Peer{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		attestor:       a,
	}
	if err := p.pin(sock); err != nil {
		p.release()
		p.process, p.facts = nil, nil
		p.err = refusal(err)
	}
	return p
}

func (p *Peer) pin(sock int) error {
	cred, err := unix.GetsockoptUcred(sock, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return fmt.Errorf("get credentials of peer: %w", err)
	}
	p.caller = rpc.Caller{Local: true, UID: cred.Uid, GID: cred.Gid, PID: cred.Pid, Addr: "unix"}
	if cred.Pid == 0 || cred.Uid == p.attestor.overflow.uid {
		return errUnresolvable
	}
	groups, err := peerGroups(sock)
	if err != nil {
		return err
	}
	ps := &p.attestor.processes
	p.process, p.descriptors, err = ps.hold(p.attestor.kernel, sock, cred.Pid)
	if err != nil {
		return err
	}
	seen, err := p.process.observe(p.attestor.mapped(groups))
	if err != nil {
		return p.process.blame(err)
	}
	if seen.process.UID != cred.Uid || seen.process.GID != cred.Gid {
		return p.process.blame(errChanged)
	}
	p.facts = ps.settle(p.process, seen)
	return nil
}

// mapped drops the group number that stands for all groups without a mapping.
func (a *Attestor) mapped(groups []uint32) []uint32 {
	var known []uint32
	for _, g := range groups {
		if g != a.overflow.gid {
			known = append(known, g)
		}
	}
	return known
}

func (p *Peer) release() {
	if p.process != nil {
		p.attestor.processes.release(p.process)
	}
}

// conn is an accepted connection. It gives up its peer's process when it is
// closed, on whatever path.
type conn struct {
	net.Conn
	mu     sync.Mutex
	peer   *Peer
	closed bool
}

// Listener wraps a Unix listener. Credentials works on connections of such a
// listener only: gRPC closes the connection that was accepted, not the one that
// a handshake returned, when a client goes away early, and descriptors must be
// given back on that path too.
func (a *Attestor) Listener(lis net.Listener) net.Listener { return listener{lis} }

type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &conn{Conn: c}, nil
}

func (c *conn) Close() error {
	c.mu.Lock()
	if !c.closed && c.peer != nil {
		c.peer.release()
	}
	c.closed = true
	c.mu.Unlock()
	return c.Conn.Close()
}

// SyscallConn implements syscall.Conn.
func (c *conn) SyscallConn() (syscall.RawConn, error) {
	sc, ok := c.Conn.(syscall.Conn)
	if !ok {
		return nil, errors.New("not a socket")
	}
	return sc.SyscallConn()
}

func (c *conn) pin(a *Attestor) (*Peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("pin peer: %w", err)
	}
	var p *Peer
	if err := raw.Control(func(fd uintptr) { p = a.pin(int(fd)) }); err != nil {
		return nil, fmt.Errorf("pin peer: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		p.release()
		return nil, net.ErrClosed
	}
	c.peer = p
	return p, nil
}

// Credentials returns transport credentials that pin the peer of each
// connection that Listener accepted.
func (a *Attestor) Credentials() credentials.TransportCredentials { return handshake{a} }

type handshake struct{ attestor *Attestor }

func (h handshake) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, errors.New("pin peer: connection was not accepted by the attestor's listener")
	}
	p, err := c.pin(h.attestor)
	if err != nil {
		return nil, nil, err
	}
	return c, p, nil
}

func (handshake) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for servers")
}

func (handshake) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

func (h handshake) Clone() credentials.TransportCredentials { return h }

func (handshake) OverrideServerName(string) error { return nil }

package endpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"

	"github.com/seed-caa81108/assay/agent/attest"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
)

var errShed = fault.New(fault.NotReady, "load_shed", "too many connections or streams at the agent's socket: close some, or retry later")

// maxStalls is how many streams of one connection may stall before the whole of
// it is closed: gRPC keeps what a stalled stream was sent until then.
const maxStalls = 4

// listener accepts for as long as it is open. Errors such as a lack of
// descriptors pass; gRPC's own loop would end on some of them.
type listener struct {
	net.Listener
	server *Server
	closed chan struct{}
	once   sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	backoff := schedule.Backoff{Min: 5 * time.Millisecond, Max: time.Second}
	for {
		c, err := l.accept()
		if err == nil {
			return c, nil
		}
		if errors.Is(err, net.ErrClosed) {
			return nil, err
		}
		l.server.metrics.acceptErrors.Inc()
		l.server.log.Warn("accept failed; waiting before the next", slog.String("error", err.Error()))
		wait := time.NewTimer(backoff.Next())
		select {
		case <-wait.C:
		case <-l.closed:
			wait.Stop()
			return nil, net.ErrClosed
		}
	}
}

func (l *listener) accept() (net.Conn, error) {
	inner, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	sc, ok := inner.(syscall.Conn)
	if !ok {
		_ = inner.Close()
		return nil, errors.New("accept: not a Unix socket")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		_ = inner.Close()
		return nil, fmt.Errorf("accept: %w", err)
	}
	c := &conn{Conn: inner, reader: newReader(raw), server: l.server}
	l.server.track(c)
	return c, nil
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// conn is a connection that counts against the limits until it is closed.
type conn struct {
	net.Conn
	*reader
	server *Server
	stalls atomic.Int32

	mu       sync.Mutex
	closed   bool
	giveBack func()

	// writable is the write deadline in force. gRPC has one writer at a time:
	// the handshake, then the transport's own.
	writable time.Time
}

// Write bounds how long a peer that does not read can block gRPC's writer, and
// with it all streams of the connection. Arming the deadline only when it comes
// near keeps it off most writes. A connection that can't be written to is closed
// here: gRPC's reader would go on without its writer.
func (c *conn) Write(p []byte) (int, error) {
	limit := c.server.timing.send
	if now := time.Now(); c.writable.Sub(now) < limit {
		c.writable = now.Add(2 * limit)
		if err := c.Conn.SetWriteDeadline(c.writable); err != nil {
			return 0, err
		}
	}
	n, err := c.Conn.Write(p)
	if err != nil {
		_ = c.Close()
	}
	return n, err
}

// SetDeadline leaves writes to Write: gRPC takes all deadlines away after the
// handshake.
func (c *conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

func (c *conn) Close() error {
	c.mu.Lock()
	giveBack := c.giveBack
	c.closed, c.giveBack = true, nil
	c.mu.Unlock()
	if giveBack != nil {
		giveBack()
	}
	c.server.forget(c)
	return c.Conn.Close()
}

// onClose runs f when the connection is closed, at once if it is.
func (c *conn) onClose(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		f()
		return
	}
	c.giveBack = f
}

func (c *conn) stalled() {
	if c.stalls.Add(1) >= maxStalls {
		_ = c.Close()
	}
}

// caller is the AuthInfo of a connection: the pinned peer and what it may use.
type caller struct {
	*attest.Peer
	conn *conn
	shed bool
}

// callerFrom returns the caller of an RPC, or why it is not served.
func callerFrom(ctx context.Context) (*caller, error) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return nil, fault.New(fault.Internal, "internal", "no caller on this connection")
	}
	c, ok := p.AuthInfo.(*caller)
	switch {
	case !ok:
		return nil, fault.New(fault.Internal, "internal", "no caller on this connection")
	case c.shed:
		return nil, errShed
	}
	return c, nil
}

// handshake pins the peer and counts the connection.
type handshake struct {
	credentials.TransportCredentials
	server *Server
}

func (h handshake) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(*conn)
	if !ok {
		return nil, nil, errors.New("connection was not accepted by this endpoint")
	}
	_, info, err := h.TransportCredentials.ServerHandshake(c.Conn)
	if err != nil {
		return nil, nil, err
	}
	who := &caller{Peer: info.(*attest.Peer), conn: c}
	return c, who, h.server.admit(who)
}

func (h handshake) Clone() credentials.TransportCredentials { return h }

// admit counts a connection against the limits. A few beyond them are kept for
// a moment, so that their clients read the reason; the rest are closed, which
// clients see as Unavailable too. So is one whose caller can't be pinned for want
// of descriptors: on the next one it may be.
func (s *Server) admit(who *caller) error {
	uid, files := who.Caller().UID, 1+who.Descriptors()
	if fault.KindOf(who.Err()) != fault.NotReady && s.gate.take(uid, descriptors, files) {
		who.conn.onClose(func() { s.gate.give(uid, descriptors, files) })
		return nil
	}
	s.metrics.denied(errShed)
	if !s.gate.take(uid, shed, 1) {
		return errShed
	}
	who.shed = true
	timer := time.AfterFunc(s.timing.shed, func() { _ = who.conn.Close() })
	who.conn.onClose(func() {
		timer.Stop()
		s.gate.give(uid, shed, 1)
	})
	return nil
}

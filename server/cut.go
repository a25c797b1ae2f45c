package server

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/server/ca"
)

// cutEvery is how soon at the latest a connection ends whose peer's root was
// revoked. Its peer was verified at the handshake only, and nothing else would
// end it before its age does.
const cutEvery = time.Second

// rootWatch knows the open connections by the root that their peers chain to,
// and closes those whose root is not published any more.
type rootWatch struct {
	bundle func() *ca.Bundle
	log    *slog.Logger

	mu   sync.Mutex
	open map[*watchedConn]struct{}
}

func newRootWatch(bundle func() *ca.Bundle, log *slog.Logger) *rootWatch {
	return &rootWatch{bundle: bundle, log: log, open: map[*watchedConn]struct{}{}}
}

// watchedConn is a connection whose peer has shown a certificate.
type watchedConn struct {
	net.Conn
	watch *rootWatch
	peer  rpc.Caller
}

// Close implements net.Conn.
func (c *watchedConn) Close() error {
	c.watch.mu.Lock()
	delete(c.watch.open, c)
	c.watch.mu.Unlock()
	return c.Conn.Close()
}

// credentials returns creds whose connections are watched.
func (w *rootWatch) credentials(creds credentials.TransportCredentials) credentials.TransportCredentials {
	return &watchedCreds{TransportCredentials: creds, watch: w}
}

type watchedCreds struct {
	credentials.TransportCredentials
	watch *rootWatch
}

// ServerHandshake implements credentials.TransportCredentials.
func (c *watchedCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	known, ok := info.(interface{ Caller() rpc.Caller })
	if !ok || known.Caller().State == rpc.CertNone {
		return conn, info, nil
	}
	watched := &watchedConn{Conn: conn, watch: c.watch, peer: known.Caller()}
	c.watch.mu.Lock()
	c.watch.open[watched] = struct{}{}
	c.watch.mu.Unlock()
	return watched, info, nil
}

// Clone implements credentials.TransportCredentials; the watch stays shared.
func (c *watchedCreds) Clone() credentials.TransportCredentials {
	return &watchedCreds{TransportCredentials: c.TransportCredentials.Clone(), watch: c.watch}
}

// run closes connections until ctx ends.
func (w *rootWatch) run(ctx context.Context) error {
	tick := time.NewTicker(cutEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			w.cut(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

func (w *rootWatch) cut(ctx context.Context) {
	published := map[string]bool{}
	for _, root := range w.bundle().Roots {
		published[root.ID] = true
	}
	for _, c := range w.withoutRoot(published) {
		w.log.LogAttrs(ctx, slog.LevelWarn, "connection cut, as the root of its peer is revoked",
			slog.String("spiffe_id", c.peer.ID.String()), slog.String("serial", c.peer.Serial), slog.String("authority_id", c.peer.Authority))
		// What is under TLS goes first: a peer that does not read would hold up
		// the goodbye.
		if conn, ok := c.Conn.(*tls.Conn); ok {
			_ = conn.NetConn().Close()
		}
		_ = c.Close()
	}
}

func (w *rootWatch) withoutRoot(published map[string]bool) []*watchedConn {
	w.mu.Lock()
	defer w.mu.Unlock()
	var gone []*watchedConn
	for c := range w.open {
		if !published[c.peer.Authority] {
			gone = append(gone, c)
		}
	}
	return gone
}

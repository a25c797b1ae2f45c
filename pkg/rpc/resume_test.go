package rpc_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"sync/atomic"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/rpc"
)

// handshake connects with a client's own TLS configuration to a server with
// our credentials, far enough for the client to have got session tickets.
func handshake(t *testing.T, server func(net.Conn) error, cfg *tls.Config) (tls.ConnectionState, error) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	served := make(chan error, 1)
	go func() {
		conn, err := lis.Accept()
		if err == nil {
			err = server(conn)
			_ = conn.Close()
		}
		served <- err
	}()
	raw, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	conn := tls.Client(raw, cfg)
	if err = conn.Handshake(); err == nil {
		_, err = conn.Read(make([]byte, 1))
	}
	_ = raw.Close()
	return conn.ConnectionState(), errors.Join(err, <-served)
}

// NEG-26, CLIENT-14: a client that keeps sessions shakes hands anew each time,
// so that a root that is gone counts from its next connection on. Others don't
// notice.
func TestSessionsAreNotResumed(t *testing.T) {
	const serverName = "spiffe://example.org/assay/server"
	old, next := newPKI(t), newPKI(t)
	var trusted atomic.Pointer[x509.CertPool]
	both := old.pool()
	both.AddCert(next.cert)
	trusted.Store(both)
	leaf := old.sign(leafTemplate(serverName))
	creds := rpc.ServerTLS(func() (*tls.Certificate, error) { return leaf, nil }, func() (spiffeid.TrustDomain, *x509.CertPool) { return td, trusted.Load() })
	server := func(raw net.Conn) error {
		conn, _, err := creds.ServerHandshake(raw)
		if err == nil {
			_, err = conn.Write([]byte("x"))
		}
		return err
	}
	client := func(ca *pki) *tls.Config {
		return &tls.Config{
			InsecureSkipVerify: true, ServerName: "server", NextProtos: []string{"h2"},
			Certificates: []tls.Certificate{*ca.sign(leafTemplate("spiffe://example.org/assay/agent/x"))}, ClientSessionCache: tls.NewLRUClientSessionCache(10),
		}
	}
	leaving, staying := client(old), client(next)
	for range 3 {
		for _, cfg := range []*tls.Config{leaving, staying} {
			if state, err := handshake(t, server, cfg); err != nil || state.DidResume {
				t.Errorf("resumed %v, %v", state.DidResume, err)
			}
		}
	}
	trusted.Store(next.pool())
	if _, err := handshake(t, server, leaving); err == nil {
		t.Error("a root that is gone is still good for its clients")
	}
	if state, err := handshake(t, server, staying); err != nil || state.DidResume {
		t.Errorf("a client of the other root: resumed %v, %v", state.DidResume, err)
	}

	// The same client resumes where that is offered: the test would see it.
	offers := &tls.Config{Certificates: []tls.Certificate{*leaf}, NextProtos: []string{"h2"}}
	resumed := false
	cached := client(old)
	for range 2 {
		state, err := handshake(t, func(raw net.Conn) error {
			conn := tls.Server(raw, offers)
			_, err := conn.Write([]byte("x"))
			return err
		}, cached)
		if err != nil {
			t.Fatal(err)
		}
		resumed = resumed || state.DidResume
	}
	if !resumed {
		t.Error("nobody ever resumes: the test proves nothing")
	}
}

// NEG-26: our own clients keep no sessions either, whatever a server offers.
func TestOurClientsResumeNothing(t *testing.T) {
	const name = "spiffe://example.org/assay/server"
	ca := newPKI(t)
	leaf := ca.sign(leafTemplate(name))
	offers := &tls.Config{Certificates: []tls.Certificate{*leaf}, NextProtos: []string{"h2"}}
	creds := rpc.ClientTLS(spiffeid.RequireFromString(name), func() []*x509.Certificate { return []*x509.Certificate{ca.cert} }, func() *tls.Certificate { return nil })
	for range 3 {
		near, far := net.Pipe()
		resumed := make(chan bool, 1)
		go func() {
			conn := tls.Server(far, offers)
			_, _ = conn.Write([]byte("x"))
			resumed <- conn.ConnectionState().DidResume
			_ = far.Close()
		}()
		conn, _, err := creds.ClientHandshake(context.Background(), "", near)
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		_ = near.Close()
		if err != nil || <-resumed {
			t.Errorf("resumed, or %v", err)
		}
	}
}

//go:build e2e

package e2e

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// rawHTTP2 is a client that sends whatever frames it likes.
type rawHTTP2 struct {
	*http2.Framer
	t    testing.TB
	conn net.Conn

	closed chan struct{}
	mu     sync.Mutex
	goAway http2.ErrCode
	told   bool            // there was a GOAWAY
	ended  map[uint32]bool // streams that the server has ended
	news   chan struct{}
}

// dialHTTP2 connects to a socket, or with TLS to a port, and says hello.
func dialHTTP2(t testing.TB, network, address string) *rawHTTP2 {
	t.Helper()
	var conn net.Conn
	var err error
	if network == "unix" {
		conn, err = net.Dial(network, address)
	} else {
		// It attacks: who is at the other end does not matter.
		conn, err = tls.Dial(network, address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13})
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	r := &rawHTTP2{
		Framer: http2.NewFramer(conn, conn), t: t, conn: conn,
		closed: make(chan struct{}), ended: map[uint32]bool{}, news: make(chan struct{}, 1),
	}
	r.AllowIllegalWrites, r.AllowIllegalReads = true, true
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	go r.read()
	return r
}

// read takes note of what the server says until it closes the connection.
func (r *rawHTTP2) read() {
	defer close(r.closed)
	for {
		frame, err := r.ReadFrame()
		if err != nil {
			return
		}
		r.mu.Lock()
		switch f := frame.(type) {
		case *http2.GoAwayFrame:
			r.goAway, r.told = f.ErrCode, true
		case *http2.RSTStreamFrame:
			r.ended[f.StreamID] = true
		case *http2.HeadersFrame:
			r.ended[f.StreamID] = r.ended[f.StreamID] || f.StreamEnded()
		}
		r.mu.Unlock()
		select {
		case r.news <- struct{}{}:
		default:
		}
	}
}

// awaits something that the server says.
func (r *rawHTTP2) awaits(what string, ok func() bool) {
	r.t.Helper()
	if !r.heard(what, ok) {
		r.t.Errorf("the server closed the connection before %s", what)
	}
}

// awaitsOrClosed is awaits where closing will do too.
func (r *rawHTTP2) awaitsOrClosed(what string, ok func() bool) {
	r.t.Helper()
	r.heard(what, ok)
}

// heard says whether something was said before the server closed.
func (r *rawHTTP2) heard(what string, ok func() bool) bool {
	r.t.Helper()
	deadline := time.After(time.Minute)
	for {
		r.mu.Lock()
		done := ok()
		r.mu.Unlock()
		if done {
			return true
		}
		select {
		case <-r.news:
		case <-r.closed:
			r.mu.Lock()
			defer r.mu.Unlock()
			return ok()
		case <-deadline:
			r.t.Errorf("no %s", what)
			return true
		}
	}
}

// write sends a frame; false means that the server does not take any more.
func (r *rawHTTP2) write(frame func() error) bool {
	r.t.Helper()
	if err := r.conn.SetWriteDeadline(time.Now().Add(time.Minute)); err != nil {
		return false
	}
	err := frame()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		r.t.Error("the server neither reads nor closes")
	}
	return err == nil
}

// request is the header block of a call of method, with more fields.
func request(method string, more ...hpack.HeaderField) []byte {
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "https"},
		{Name: ":path", Value: method},
		{Name: ":authority", Value: "x"},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "te", Value: "trailers"},
		{Name: "workload.spiffe.io", Value: "true"},
	}, more...) {
		_ = enc.WriteField(f) // into memory
	}
	return block.Bytes()
}

// open begins a stream.
func (r *rawHTTP2) open(stream uint32, block []byte) bool {
	r.t.Helper()
	return r.write(func() error {
		return r.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block, EndHeaders: true})
	})
}

// answers wants a whole call to be answered.
func (r *rawHTTP2) answers(stream uint32, block []byte) {
	r.t.Helper()
	r.open(stream, block)
	r.write(func() error { return r.WriteData(stream, true, make([]byte, 5)) }) // an empty message
	r.awaits("an answer", func() bool { return r.ended[stream] })
}

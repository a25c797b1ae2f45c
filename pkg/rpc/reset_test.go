package rpc_test

import (
	"bytes"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// NEG-28: a peer that begins calls and takes them back at once has no more
// handlers at work than one that waits for its answers.
func TestHandlersOfRapidResetsAreBounded(t *testing.T) {
	const streams = 10
	lis, target := unixListener(t)
	var running, peak, ended atomic.Int64
	release := make(chan struct{})
	svc := &service{sync: func(grpc.BidiStreamingServer[agentv1.SyncRequest, agentv1.SyncResponse]) error {
		n := running.Add(1)
		for p := peak.Load(); n > p && !peak.CompareAndSwap(p, n); p = peak.Load() {
		}
		<-release // the worst kind: it does not look whether the caller is still there
		running.Add(-1)
		ended.Add(1)
		return nil
	}}
	serve(t, rpc.ServerConfig{
		Name: "test", Creds: rpc.LocalCreds(), MaxStreams: streams, Methods: rpc.Methods{syncMethod: rpc.Anyone},
	}, svc, lis)
	conn, err := net.Dial("unix", strings.TrimPrefix(target, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", syncMethod}, {":authority", "x"}, {"content-type", "application/grpc"}} {
		if err := enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			t.Fatal(err)
		}
	}
	const calls = 5000
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write([]byte(http2.ClientPreface))
		framer := http2.NewFramer(conn, nil)
		if err == nil {
			err = framer.WriteSettings()
		}
		for i := uint32(0); err == nil && i < calls; i++ {
			err = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: block.Bytes(), EndHeaders: true})
			if err == nil {
				err = framer.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
			}
		}
		sent <- err
	}()
	go func() { // the server's answers must not be what stops it
		buf := make([]byte, 64<<10)
		for err := error(nil); err == nil; _, err = conn.Read(buf) {
		}
	}()
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for running.Load() < streams {
		<-poll.C
	}
	for range 20 { // time for more, if there were any
		<-poll.C
	}
	if n := running.Load(); n != streams {
		t.Errorf("%d handlers at work, the limit is %d", n, streams)
	}
	close(release)
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	for ended.Load() < streams || running.Load() > 0 {
		<-poll.C
	}
	if n := peak.Load(); n > streams {
		t.Errorf("%d handlers at a time, the limit is %d", n, streams)
	}
}

package endpoint

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

type svidStream = grpc.ServerStreamingClient[workload.X509SVIDResponse]

func fetch(t testing.TB, c workload.SpiffeWorkloadAPIClient, ctx context.Context) svidStream {
	t.Helper()
	stream, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func recv(t testing.TB, stream svidStream) *workload.X509SVIDResponse {
	t.Helper()
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func wantResponse(t testing.TB, got *workload.X509SVIDResponse, snap *cache.Snapshot) {
	t.Helper()
	if !proto.Equal(got, x509SVIDResponse(snap)) {
		t.Fatalf("got %d SVIDs, want those of the snapshot (%d)", len(got.GetSvids()), len(snap.SVIDs))
	}
}

func TestFirstMessageIsTheCompleteState(t *testing.T) { // WL-21, WL-22, WL-35, WL-40 to WL-47
	ca := newAuthority(t)
	snap := ca.snapshot(ca.svid("/b", ""), ca.svid("/a", "x"), ca.svid("/c", "y"))
	e := serve(t, &source{snap: snap})
	resp := recv(t, fetch(t, e.client(), withHeader(t)))
	wantResponse(t, resp, snap)
	if len(resp.GetCrl()) != 0 || len(resp.GetFederatedBundles()) != 0 {
		t.Fatal("own trust domain among the federated ones, or a CRL")
	}
	for i, got := range resp.GetSvids() {
		certs, err := x509.ParseCertificates(got.GetX509Svid())
		if err != nil || len(certs) != 2 || certs[0].URIs[0].String() != got.GetSpiffeId() || certs[0].IsCA || !certs[1].IsCA {
			t.Fatalf("SVID %d: %v, %d certificates", i, err, len(certs))
		}
		if _, err := x509.ParsePKCS8PrivateKey(got.GetX509SvidKey()); err != nil {
			t.Fatal(err)
		}
		if roots, err := x509.ParseCertificates(got.GetBundle()); err != nil || len(roots) != 1 {
			t.Fatalf("bundle: %v", err)
		}
	}
	until(t, "delivery is reported", func() bool { return e.source.wasSent(snap) })
}

func TestCallerIsSubscribedByItsSelectors(t *testing.T) { // WL-8, WL-9
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	recv(t, fetch(t, e.client(), withHeader(t)))
	if !e.source.selectors.Contains(selector.NewSet(selector.Selector{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())})) {
		t.Fatalf("subscribed to %v", e.source.selectors)
	}
}

func TestBundles(t *testing.T) { // WL-46, WL-49, WL-51, WL-52, BUN-23
	ca := newAuthority(t)
	snap := ca.snapshot(ca.svid("/a", ""))
	e := serve(t, &source{snap: snap})
	stream, err := e.client().FetchX509Bundles(withHeader(t), &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil || len(resp.GetBundles()) != 1 || string(resp.GetBundles()["spiffe://example.org"]) != string(snap.BundleDER) {
		t.Fatalf("%v %v", resp, err)
	}
	// A renewed SVID is nothing to this stream, a new root is.
	renewed := ca.snapshot(ca.svid("/a", ""))
	e.source.set(renewed, nil)
	until(t, "renewal counts as delivered", func() bool { return e.source.wasSent(renewed) })
	next := newAuthority(t)
	rolled := ca.snapshot(renewed.SVIDs...)
	rolled.BundleDER = append(append([]byte{}, ca.root.Raw...), next.root.Raw...)
	e.source.set(rolled, nil)
	if resp, err = stream.Recv(); err != nil || string(resp.GetBundles()["spiffe://example.org"]) != string(rolled.BundleDER) {
		t.Fatalf("%v %v", resp, err)
	}
}

func TestOnlyChangesAreSent(t *testing.T) { // WL-23, WL-52, BUN-23, PLAN-3
	ca := newAuthority(t)
	a, b := ca.svid("/a", ""), ca.svid("/b", "")
	first := ca.snapshot(a, b)
	e := serve(t, &source{snap: first})
	stream := fetch(t, e.client(), withHeader(t))
	wantResponse(t, recv(t, stream), first)

	same := ca.snapshot(a, b)
	same.BundleSequence = 2 // a root was prepared and taken back, say
	e.source.set(same, nil)
	until(t, "unchanged content counts as delivered", func() bool { return e.source.wasSent(same) })

	for _, next := range []*cache.Snapshot{
		ca.snapshot(ca.svid("/a", ""), b), // one of two renewed: both are in the message, WL-21
		ca.snapshot(b),                    // partial revocation, WL-27
		{SVIDs: []*cache.SVID{b}, TrustDomain: td, BundleDER: append(append([]byte{}, ca.root.Raw...), newAuthority(t).root.Raw...)},
	} {
		e.source.set(next, nil)
		wantResponse(t, recv(t, stream), next) // so nothing came for the unchanged state
	}
}

func TestTotalRevocationEndsTheStream(t *testing.T) { // WL-26, WL-28, CODE-8, PLAN-3
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	stream := fetch(t, e.client(), withHeader(t))
	recv(t, stream)
	e.source.set(nil, errNoIdentity)
	resp, err := stream.Recv()
	wantStatus(t, err, codes.PermissionDenied, "no_identity")
	if resp != nil {
		t.Fatal("a message came with the end")
	}
}

func TestEndOfAnOutageBudgetEndsTheStream(t *testing.T) { // NEG-59
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	stream := fetch(t, e.client(), withHeader(t))
	recv(t, stream)
	e.source.set(nil, errEnded)
	_, err := stream.Recv()
	wantStatus(t, err, codes.Unavailable, "svid_expired_server_unreachable")
}

func TestSuccessorOfARevokedSVIDIsWaitedFor(t *testing.T) {
	ca := newAuthority(t)
	pending := func(limit time.Duration) (*endpoint, svidStream) {
		e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, withTiming(func(w *timing) { w.pending = limit }))
		stream := fetch(t, e.client(), withHeader(t))
		recv(t, stream)
		e.source.set(nil, errPending)
		return e, stream
	}
	e, stream := pending(time.Hour)
	next := ca.snapshot(ca.svid("/b", ""))
	e.source.set(next, nil)
	wantResponse(t, recv(t, stream), next)
	_, stream = pending(100 * time.Millisecond)
	_, err := stream.Recv()
	wantStatus(t, err, codes.Unavailable, "svid_pending")
}

func TestCallerWithoutIdentityIsHeld(t *testing.T) { // WL-10, WL-11, WL-48
	for _, why := range []error{errNoIdentity, errNotSynced, errPending} {
		ca := newAuthority(t)
		e := serve(t, &source{err: why}, withTiming(func(w *timing) { w.hold = time.Minute }))
		stream := fetch(t, e.client(), withHeader(t))
		until(t, "held", func() bool { return e.value("assay_workload_held") == 1 })
		snap := ca.snapshot(ca.svid("/a", ""))
		snap.CommittedAt = time.Now()
		e.source.set(snap, nil)
		wantResponse(t, recv(t, stream), snap)
		if n := e.value("assay_workload_held"); n != 0 {
			t.Fatalf("%v still held", n)
		}
	}
}

func TestEndOfTheHoldSaysWhy(t *testing.T) { // WL-10, WL-11, WL-48, WL-50
	for _, tc := range []struct {
		why  error
		code codes.Code
	}{{errNoIdentity, codes.PermissionDenied}, {errNotSynced, codes.Unavailable}, {errPending, codes.Unavailable}, {errEnded, codes.Unavailable}} {
		e := serve(t, &source{err: tc.why}, withTiming(func(w *timing) { w.hold = 20 * time.Millisecond }))
		c := e.client()
		_, err := fetch(t, c, withHeader(t)).Recv()
		wantStatus(t, err, tc.code, fault.ReasonOf(tc.why))
		bundles, err := c.FetchX509Bundles(withHeader(t), &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = bundles.Recv()
		wantStatus(t, err, tc.code, fault.ReasonOf(tc.why))
		if n := e.value("assay_workload_denials_total", fault.ReasonOf(tc.why)); n != 2 {
			t.Fatalf("%v denials counted", n)
		}
	}
}

func TestAnswerChangesDuringTheHold(t *testing.T) {
	e := serve(t, &source{err: errNotSynced}, withTiming(func(w *timing) { w.hold = 2 * time.Second }))
	stream := fetch(t, e.client(), withHeader(t))
	until(t, "held", func() bool { return e.value("assay_workload_held") == 1 })
	e.source.set(nil, errNoIdentity) // the first sync brought no entry
	_, err := stream.Recv()
	wantStatus(t, err, codes.PermissionDenied, "no_identity")
}

// Time may be up for a caller in the moment in which there is something to send.
func TestWhoseTimeIsUpGetsWhatThereIs(t *testing.T) {
	ca := newAuthority(t)
	snap := ca.snapshot(ca.svid("/a", ""))
	e := serve(t, &source{err: errPending, unheard: snap}, withTiming(func(w *timing) { w.hold = time.Millisecond }))
	wantResponse(t, recv(t, fetch(t, e.client(), withHeader(t))), snap)
}

type streamWith struct {
	grpc.ServerStream
	ctx context.Context
}

func (s streamWith) Context() context.Context { return s.ctx }

func TestHoldTime(t *testing.T) {
	for _, tc := range []struct{ deadline, least, most time.Duration }{
		{0, 10 * time.Second, 10 * time.Second},
		{time.Hour, 2 * time.Second, 2 * time.Second},
		{3 * time.Second, 1400 * time.Millisecond, 1500 * time.Millisecond},
		{-time.Second, -time.Hour, 0},
	} {
		ctx := t.Context()
		if tc.deadline != 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, tc.deadline)
			defer cancel()
		}
		f := &follower{server: &Server{timing: defaultTiming}, stream: streamWith{ctx: ctx}}
		if got := f.holdTime(); got < tc.least || got > tc.most {
			t.Errorf("deadline %v: held for %v", tc.deadline, got)
		}
	}
}

func TestHeldCallersAreBounded(t *testing.T) {
	for name, limits := range map[string]Limits{"per user": {HeldPerUID: 1}, "in all": {Held: 1}} {
		t.Run(name, func(t *testing.T) {
			e := serve(t, &source{err: errNoIdentity}, withLimits(limits), withTiming(func(w *timing) { w.hold = time.Hour }))
			c := e.client()
			first := fetch(t, c, withHeader(t))
			until(t, "held", func() bool { return e.value("assay_workload_held") == 1 })
			_, err := fetch(t, c, withHeader(t)).Recv() // the same answer, at once
			wantStatus(t, err, codes.PermissionDenied, "no_identity")
			e.source.set(nil, errNotSynced)
			if e.value("assay_workload_held") != 1 {
				t.Fatal("the first is no longer held")
			}
			e.stop()
			_, err = first.Recv()
			wantStatus(t, err, codes.Unavailable, "shutting_down")
		})
	}
}

func TestShutdownEndsStreamsWithUnavailable(t *testing.T) { // WL-24, CODE-9, CODE-12
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, withTiming(func(w *timing) { w.grace = time.Minute }))
	c := e.client()
	stream := fetch(t, c, withHeader(t))
	recv(t, stream)
	bundles, err := c.FetchX509Bundles(withHeader(t), &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bundles.Recv(); err != nil {
		t.Fatal(err)
	}
	e.stop()
	_, err = stream.Recv()
	wantStatus(t, err, codes.Unavailable, "shutting_down")
	_, err = bundles.Recv()
	wantStatus(t, err, codes.Unavailable, "shutting_down")
}

func TestShutdownDoesNotWaitForTheSilent(t *testing.T) { // NEG-43
	e := serve(t, &source{err: errNoIdentity}, withTiming(func(w *timing) { w.grace = 50 * time.Millisecond }))
	c := e.dial() // never says a word
	until(t, "accepted", func() bool { return e.value("assay_workload_descriptors") > 0 })
	begun := time.Now()
	e.stop()
	if took := time.Since(begun); took > 5*time.Second {
		t.Fatalf("shutdown took %v", took)
	}
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Fatal(err)
	}
}

func TestClientThatLeavesIsNoError(t *testing.T) {
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	ctx, cancel := context.WithCancel(withHeader(t))
	recv(t, fetch(t, e.client(), ctx))
	cancel()
	until(t, "handler ended", func() bool { return e.source.open() == 0 && e.value("assay_workload_streams") == 0 })
	until(t, "counted", func() bool { return e.value("assay_rpc_requests_total", "OK") == 1 })
	if n := e.value("assay_workload_denials_total"); n != 0 {
		t.Fatalf("%v denials", n)
	}
}

// large makes a snapshot whose message fills a stream's window at once.
func large(t *testing.T, ca *authority, roots []byte) *cache.Snapshot {
	t.Helper()
	snap := ca.snapshot(ca.svid("/a", ""))
	for snap.BundleDER = nil; len(snap.BundleDER) < 80<<10; {
		snap.BundleDER = append(snap.BundleDER, roots...)
	}
	return snap
}

func TestStalledStreamIsClosed(t *testing.T) { // NEG-43
	ca := newAuthority(t)
	// Time enough for who reads, however busy the machine is.
	e := serve(t, &source{snap: large(t, ca, ca.root.Raw)}, withTiming(func(w *timing) { w.send = 2 * time.Second }))
	c := e.client()
	stalled := fetch(t, c, withHeader(t)) // never reads
	healthy := fetch(t, c, withHeader(t))
	recv(t, healthy)
	until(t, "both got the first", func() bool { return e.value("assay_workload_streams") == 2 })
	for e.value("assay_workload_denials_total", "stream_stalled") == 0 {
		snap := large(t, ca, ca.root.Raw)
		e.source.set(snap, nil)
		wantResponse(t, recv(t, healthy), snap)
	}
	for {
		if _, err := stalled.Recv(); err != nil {
			wantStatus(t, err, codes.Unavailable, "stream_stalled")
			break
		}
	}
	last := ca.snapshot(ca.svid("/last", ""))
	e.source.set(last, nil)
	wantResponse(t, recv(t, healthy), last)
}

func TestConnectionOfStalledStreamsIsClosed(t *testing.T) { // NEG-43
	ca := newAuthority(t)
	e := serve(t, &source{snap: large(t, ca, ca.root.Raw)}, withTiming(func(w *timing) { w.send = 20 * time.Millisecond }))
	c := e.client()
	for range maxStalls {
		fetch(t, c, withHeader(t))
	}
	until(t, "streams", func() bool { return e.value("assay_workload_streams") == maxStalls })
	until(t, "connection closed", func() bool {
		e.source.set(large(t, ca, ca.root.Raw), nil)
		return e.value("assay_workload_descriptors") == 0
	})
}

func TestShutdownWithAStalledStream(t *testing.T) {
	ca := newAuthority(t)
	e := serve(t, &source{snap: large(t, ca, ca.root.Raw)}, withTiming(func(w *timing) { w.grace = 50 * time.Millisecond }))
	window := grpc.WithStaticStreamWindowSize(64 << 10)
	fetch(t, e.client(window), withHeader(t)) // never reads
	until(t, "open", func() bool { return e.value("assay_workload_streams") == 1 })
	// What the client's window and the stream's quota take ahead, 64 KiB each,
	// is less than two of these messages: the second is the last to be sent.
	until(t, "first sent", func() bool { return len(e.source.allSent()) == 1 })
	second := large(t, ca, ca.root.Raw)
	e.source.set(second, nil)
	until(t, "second sent", func() bool { return e.source.wasSent(second) })
	blocked := large(t, ca, ca.root.Raw)
	e.source.set(blocked, nil)
	until(t, "third on its way", func() bool { return e.source.wasTaken(blocked) })
	e.stop() // ends, and the race detector and the count of subscriptions are content
	if e.source.wasSent(blocked) {
		t.Fatal("what could not be sent counts as delivered")
	}
}

func TestPropagationIsMeasuredForThoseWhoWaited(t *testing.T) {
	ca := newAuthority(t)
	stamped := func(path string, at time.Time) *cache.Snapshot {
		snap := ca.snapshot(ca.svid(path, ""))
		snap.CommittedAt = at
		return snap
	}
	count := func(e *endpoint) float64 { return e.value("assay_propagation_seconds") }
	e := serve(t, &source{snap: stamped("/old", time.Now().Add(-time.Minute))})
	stream := fetch(t, e.client(), withHeader(t))
	recv(t, stream)
	if count(e) != 0 {
		t.Fatal("an entry that was there before the stream was measured")
	}
	waits := 0
	for _, tc := range []struct {
		name string
		at   func() time.Time
		want float64
	}{
		{"renewal", func() time.Time { return time.Now().Add(-time.Hour) }, 0},
		{"unknown", func() time.Time { return time.Time{} }, 0},
		{"server's clock ahead", func() time.Time { return time.Now().Add(time.Minute) }, 0},
		{"new entry", time.Now, 1},
	} {
		until(t, "the stream waits", func() bool { return e.source.waited() > waits })
		waits = e.source.waited()
		snap := stamped("/x", tc.at())
		e.source.set(snap, nil)
		recv(t, stream)
		until(t, "delivery reported", func() bool { return e.source.wasSent(snap) })
		if got := count(e); got != tc.want {
			t.Fatalf("%s: %v measurements, want %v", tc.name, got, tc.want)
		}
	}
}

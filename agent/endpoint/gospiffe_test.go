package endpoint

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func reasonOf(err error) string { return fault.ReasonOf(fault.FromStatus(err)) }

// watcher notes what a go-spiffe watcher is told.
type watcher struct {
	mu      sync.Mutex
	svids   []*x509svid.SVID
	bundles *x509bundle.Set
	updates int
	errs    []error
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.svids, w.bundles = c.SVIDs, c.Bundles
	w.updates++
}

func (w *watcher) OnX509ContextWatchError(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.errs = append(w.errs, err)
}

func (w *watcher) state() (updates int, errs []error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.updates, w.errs
}

type atOnce struct{}

func (atOnce) NewBackoff() workloadapi.Backoff { return atOnce{} }
func (atOnce) Next() time.Duration             { return time.Millisecond }
func (atOnce) Reset()                          {}

func TestGoSPIFFEFollows(t *testing.T) { // WL-2, WL-7, WL-24, WL-28, WL-48, CODE-12, CLIENT-4, CLIENT-6, CLIENT-7, CLIENT-10
	ca := newAuthority(t)
	first := ca.snapshot(ca.svid("/default", "x"), ca.svid("/b", "y"))
	e := serve(t, &source{snap: first}, withTiming(func(w *timing) { w.hold = time.Millisecond }))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+e.path), workloadapi.WithBackoffStrategy(atOnce{}))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	w := &watcher{}
	ended := make(chan error, 1)
	go func() { ended <- client.WatchX509Context(ctx, w) }()
	until(t, "first update", func() bool { n, _ := w.state(); return n == 1 })
	if len(w.svids) != 2 || w.svids[0].ID.Path() != "/default" || w.svids[0].Hint != "x" {
		t.Fatalf("%d SVIDs", len(w.svids))
	}
	if b, err := w.bundles.GetX509BundleForTrustDomain(td); err != nil || len(b.X509Authorities()) != 1 {
		t.Fatal(err)
	}
	if _, _, err := x509svid.Verify(w.svids[0].Certificates, w.bundles); err != nil {
		t.Fatal(err)
	}
	e.source.set(nil, errNoIdentity)
	until(t, "told of the end", func() bool { _, errs := w.state(); return len(errs) > 0 })
	_, errs := w.state()
	wantStatus(t, errs[0], codes.PermissionDenied, "no_identity")
	e.source.set(ca.snapshot(ca.svid("/c", "")), nil)
	until(t, "served again by itself", func() bool { n, _ := w.state(); return n == 2 })
	e.stop()
	until(t, "told of the shutdown", func() bool {
		_, errs := w.state()
		return statusCode(errs[len(errs)-1]) == codes.Unavailable
	})
	select {
	case err := <-ended:
		t.Fatalf("the watcher stopped for good: %v", err)
	default:
	}
}

func TestGoSPIFFEOneShots(t *testing.T) { // CLIENT-8
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+e.path))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for range 20 {
		if _, err := client.FetchX509Context(t.Context()); err != nil {
			t.Fatal(err)
		}
		if set, err := client.FetchX509Bundles(t.Context()); err != nil || set.Len() != 1 {
			t.Fatal(err)
		}
	}
	until(t, "no stream left", func() bool { return e.value("assay_workload_streams") == 0 })
	if n := e.value("assay_workload_denials_total"); n != 0 {
		t.Fatalf("%v denials for clients that just left", n)
	}
}

// CLIENT-5, CLIENT-11, CLIENT-12, WL-35: a source waits for its first identity,
// gets it without asking again, and has the first one for default unless it is
// told how to choose. It costs one connection and one stream.
func TestGoSPIFFESource(t *testing.T) {
	ca := newAuthority(t)
	e := serve(t, &source{err: errNoIdentity}, withTiming(func(w *timing) { w.hold = time.Minute }))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	options := workloadapi.WithClientOptions(workloadapi.WithAddr("unix://" + e.path))
	type made struct {
		source *workloadapi.X509Source
		err    error
	}
	ready := make(chan made, 1)
	go func() {
		s, err := workloadapi.NewX509Source(ctx, options)
		ready <- made{s, err}
	}()
	until(t, "held", func() bool { return e.value("assay_workload_held") == 1 })
	e.source.set(ca.snapshot(ca.svid("/old", "x"), ca.svid("/new", "y")), nil)
	first := <-ready
	if first.err != nil {
		t.Fatal(first.err)
	}
	defer first.source.Close()
	if svid, err := first.source.GetX509SVID(); err != nil || svid.ID.Path() != "/old" {
		t.Errorf("default %v, %v", svid, err)
	}
	if n := e.value("assay_workload_streams"); n != 1 {
		t.Errorf("%v streams", n)
	}
	byHint := func(svids []*x509svid.SVID) *x509svid.SVID {
		for _, s := range svids {
			if s.Hint == "y" {
				return s
			}
		}
		return nil
	}
	second, err := workloadapi.NewX509Source(ctx, options, workloadapi.WithDefaultX509SVIDPicker(byHint))
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if svid, err := second.GetX509SVID(); err != nil || svid.ID.Path() != "/new" {
		t.Errorf("picked %v, %v", svid, err)
	}
	// Both are clients of one process, which costs one pidfd beside the
	// connections.
	if streams, files := e.value("assay_workload_streams"), e.value("assay_workload_descriptors"); streams != 2 || files > 4 {
		t.Errorf("%v streams, %v descriptors for two sources", streams, files)
	}
}

// CLIENT-3: a single call doesn't wait for an agent that is not there.
func TestGoSPIFFEWithoutAnAgent(t *testing.T) {
	_, err := workloadapi.FetchX509SVID(t.Context(), workloadapi.WithAddr("unix://"+t.TempDir()+"/none.sock"))
	if statusCode(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
}

// CLIENT-2: what a client takes for the server's name is nothing to us.
func TestAnyAuthorityIsAccepted(t *testing.T) {
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	for _, authority := range []string{"localhost", "agent.example:8443", "x"} {
		recv(t, fetch(t, e.client(grpc.WithAuthority(authority)), withHeader(t)))
	}
}

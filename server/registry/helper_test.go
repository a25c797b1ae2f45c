package registry_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/store"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// server is a running registry over a store that can be stopped and reopened.
type server struct {
	*registry.Registry
	dir  string
	kv   *store.Bolt
	reg  *prometheus.Registry
	stop func() error
}

func options(kv store.KV) registry.Options {
	return registry.Options{
		AgentSVIDTTL: 12 * time.Hour,
		TrustDomain:  td, ReservedPrefix: "/assay/", RejoinWindow: 7 * 24 * time.Hour, MaxX509SVIDTTL: time.Hour,
		Store: kv, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Registerer: prometheus.NewRegistry(),
	}
}

// start runs a registry over the store in dir until stop or the test's end.
func start(t testing.TB, dir string, change ...func(*registry.Options)) *server {
	t.Helper()
	kv := openStore(t, dir)
	o := options(kv)
	s := &server{dir: dir, kv: kv, reg: o.Registerer.(*prometheus.Registry)}
	for _, c := range change {
		c(&o)
	}
	s.Registry, s.stop = run(t, o)
	inner := s.stop
	s.stop = func() error { return errors.Join(inner(), kv.Close()) }
	return s
}

func openStore(t testing.TB, dir string) *store.Bolt {
	t.Helper()
	kv, err := store.OpenBolt(store.BoltConfig{Dir: dir, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kv.Close() })
	return kv
}

// run opens a registry and runs it until stop or the test's end.
func run(t testing.TB, o registry.Options) (*registry.Registry, func() error) {
	t.Helper()
	r, err := registry.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	var failed error
	go func() {
		defer close(done)
		failed = r.Run(ctx)
	}()
	stop := func() error {
		cancel()
		<-done
		return failed
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return r, stop
}

// restart stops s and starts a registry over the same store.
func (s *server) restart(t testing.TB, change ...func(*registry.Options)) *server {
	t.Helper()
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	return start(t, s.dir, change...)
}

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func node(n int) spiffeid.ID { return id(fmt.Sprintf("/assay/agent/join_token/%032x", n)) }

func selectors(texts ...string) selector.Set {
	var list []selector.Selector
	for _, text := range texts {
		s, err := selector.Parse(text)
		if err != nil {
			panic(err)
		}
		list = append(list, s)
	}
	return selector.NewSet(list...)
}

// web is an entry that breaks no rule.
func web(path string, parent spiffeid.ID) registry.Entry {
	return registry.Entry{SPIFFEID: id(path), ParentID: parent, Selectors: selectors("unix:uid:1000")}
}

// create stores entries and fails the test if one is refused.
func create(t testing.TB, r *registry.Registry, list ...registry.Entry) []registry.Entry {
	t.Helper()
	var made []registry.Entry
	for _, result := range r.CreateEntries(t.Context(), list) {
		if result.Err != nil {
			t.Fatal(result.Err)
		}
		made = append(made, result.Entry)
	}
	return made
}

func next(t testing.TB, f *registry.Feed) registry.Update {
	t.Helper()
	u, err := f.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func ids(list []registry.Entry) []string {
	var out []string
	for _, e := range list {
		out = append(out, e.ID)
	}
	slices.Sort(out)
	return out
}

// wantFault fails the test unless err is of this kind and reason.
func wantFault(t testing.TB, err error, kind fault.Kind, reason string) {
	t.Helper()
	if fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
		t.Fatalf("got %v, want %v %s", err, kind, reason)
	}
}

// key is the hash of a public key, as far as the registry is concerned.
func key(n int) string { return strings.Repeat(fmt.Sprintf("%02x", n), 32) }

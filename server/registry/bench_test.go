package registry_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/store"
)

// filled returns a store directory with n entries over the given number of
// parents, and closes the store.
func filled(b *testing.B, n, parents int) string {
	b.Helper()
	dir := b.TempDir()
	s := start(b, dir)
	const batch = 1000
	for from := 0; from < n; from += batch {
		list := make([]registry.Entry, min(batch, n-from))
		for i := range list {
			list[i] = web(fmt.Sprintf("/ns/team-%d/sa/workload-%d", (from+i)%50, from+i), node((from+i)%parents))
			list[i].Selectors = selectors(fmt.Sprintf("k8s:ns:team-%d", (from+i)%50), fmt.Sprintf("k8s:sa:workload-%d", from+i))
		}
		create(b, s.Registry, list...)
	}
	if err := s.stop(); err != nil {
		b.Fatal(err)
	}
	return dir
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkOpen loads 100 000 entries from the store into memory, under one
// parent and under as many as there are entries.
func BenchmarkOpen(b *testing.B) {
	for _, parents := range []int{1, 1000, 100_000} {
		b.Run(fmt.Sprintf("parents=%d", parents), func(b *testing.B) {
			const n = 100_000
			kv := openStore(b, filled(b, n, parents))
			var r *registry.Registry
			before := heap()
			for b.Loop() {
				var err error
				if r, err = registry.Open(b.Context(), options(kv)); err != nil {
					b.Fatal(err)
				}
			}
			after := heap()
			if got := r.CountEntries(registry.EntryFilter{}); got != n {
				b.Fatalf("%d entries", got)
			}
			b.ReportMetric(float64(after-before)/n, "B/entry")
		})
	}
}

// BenchmarkCreate makes entries in batches of 1000, with the syncs of a store
// that is in use.
func BenchmarkCreate(b *testing.B) {
	kv, err := store.OpenBolt(store.BoltConfig{Dir: b.TempDir(), Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = kv.Close() })
	r, _ := run(b, options(kv))
	n := 0
	for b.Loop() {
		list := make([]registry.Entry, 1000)
		for i := range list {
			n++
			list[i] = web(fmt.Sprintf("/w/%d", n), node(n%100))
		}
		create(b, r, list...)
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "entries/s")
}

// BenchmarkChange is the time from one new entry to its update on a feed. It
// ought to be the same whatever else there is.
func BenchmarkChange(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		for _, followers := range []int{1, 1000} {
			b.Run(fmt.Sprintf("entries=%d/followers=%d", n, followers), func(b *testing.B) { changes(b, n, followers) })
		}
	}
}

func changes(b *testing.B, n, followers int) {
	s := start(b, filled(b, n, 1000))
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	var woken atomic.Int64
	for i := range followers {
		f := s.Follow(node(i+1), "", 0)
		defer f.Close()
		next(b, f)
		if i == 0 {
			continue
		}
		go func() {
			if _, err := f.Next(ctx); err == nil {
				woken.Add(1)
			}
		}()
	}
	i := 0
	for b.Loop() {
		b.StopTimer() // a new feed, whose first change waits for no other
		f := s.Follow(node(0), s.Epoch(), s.Revision())
		next(b, f)
		b.StartTimer()
		i++
		create(b, s.Registry, web(fmt.Sprintf("/new/%d", i), node(0)))
		next(b, f)
		b.StopTimer()
		f.Close()
		b.StartTimer()
	}
	if woken.Load() > 0 {
		b.Fatal("others were woken")
	}
}

// BenchmarkAuthorize is what the server asks of the registry for one item of a
// signing request.
func BenchmarkAuthorize(b *testing.B) {
	s := start(b, filled(b, 10_000, 100))
	list, _ := s.ListEntries(registry.EntryFilter{ParentID: node(7)}, "", 0)
	agent := node(7)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			if _, err := s.EntryFor(agent, list[i%len(list)].ID); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkScrape is a look at the metrics of 10 000 agents.
func BenchmarkScrape(b *testing.B) {
	s := start(b, b.TempDir())
	for i := range 10_000 {
		token, err := s.CreateToken(b.Context(), "", 0)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := s.RedeemToken(b.Context(), token.Value, key(i%256)); err != nil {
			b.Fatal(err)
		}
	}
	var g prometheus.Gatherer = s.reg
	for b.Loop() {
		if _, err := g.Gather(); err != nil {
			b.Fatal(err)
		}
	}
}

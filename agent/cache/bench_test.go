package cache_test

import (
	"fmt"
	"testing"
	"time"

	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// BenchmarkFill10k measures an agent that comes up with 10 000 entries, against
// a server that signs with the standard library in the same process.
func BenchmarkFill10k(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		f := newFake()
		var list []*agentv1.Entry
		for i := range 10_000 {
			list = append(list, entry(fmt.Sprintf("%05d", i), fmt.Sprintf("w/%d", i), fmt.Sprintf("unix:uid:%d", i), "unix:gid:1"))
		}
		f.chunk = 1000
		f.set(list...)
		f.start()
		a := newAgent(&testing.T{}, f, b.TempDir())
		b.StartTimer()
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:9876", "unix:gid:1"))
		start := time.Now()
		for paths(s)[0][0] == '!' {
			<-s.Changed()
		}
		b.ReportMetric(float64(time.Since(start).Milliseconds()), "first-ms")
		tick := time.NewTicker(5 * time.Millisecond)
		for a.cache.Status().SVIDs < 10_000 {
			<-tick.C
		}
		tick.Stop()
		b.StopTimer()
		a.stop()
		f.stop()
		b.StartTimer()
	}
}

// BenchmarkNotify10k measures one entry's way to 10 000 open subscriptions of
// as many different callers.
func BenchmarkNotify10k(b *testing.B) {
	f := newFake()
	f.start()
	a := newAgent(&testing.T{}, f, b.TempDir())
	a.start()
	defer func() {
		a.stop()
		f.stop()
	}()
	for i := range 10_000 {
		s := a.cache.Subscribe(sel(fmt.Sprintf("unix:uid:%d", i), "unix:gid:1", fmt.Sprintf("unix:user:u%d", i), "k8s:ns:a", "k8s:sa:b"))
		defer s.Close()
		_ = paths(s)
	}
	one := a.cache.Subscribe(sel("unix:uid:77", "unix:gid:1", "unix:user:u77", "k8s:ns:a", "k8s:sa:b"))
	defer one.Close()
	n := 0
	for b.Loop() {
		n++
		f.set(entry(fmt.Sprint(n), fmt.Sprintf("w/%d", n), "unix:uid:77", "unix:gid:1"))
		for len(paths(one)) < n || paths(one)[0][0] == '!' {
			<-one.Changed()
		}
	}
}

// BenchmarkSubscribe measures what a caller costs that comes, asks and goes.
func BenchmarkSubscribe(b *testing.B) {
	f := newFake()
	f.set(entry("1", "web", "unix:uid:1"))
	f.start()
	a := newAgent(&testing.T{}, f, b.TempDir())
	a.start()
	defer func() {
		a.stop()
		f.stop()
	}()
	set := sel("unix:uid:1", "unix:gid:1", "unix:user:u", "unix:group:g", "unix:path:/bin/x")
	for s := a.cache.Subscribe(set); paths(s)[0][0] == '!'; {
		<-s.Changed()
	}
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			s := a.cache.Subscribe(set)
			snap, _ := s.Snapshot()
			s.Sent(snap)
			s.Close()
		}
	})
}

package store

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"go.etcd.io/bbolt"
)

func benchStore(b *testing.B, dir string) *Bolt {
	b.Helper()
	s, err := OpenBolt(BoltConfig{Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	return s
}

func writesOf(from, n int) []Write {
	writes := make([]Write, n)
	for i := range writes {
		// Spread like identifiers are: neighbours in time are none in the tree.
		writes[i] = Write{Key: fmt.Sprintf("entry/%016x", uint64(from+i)*0x9E3779B97F4A7C15), Value: make([]byte, 400)}
	}
	return writes
}

func commitBench(b *testing.B, perCommit int) {
	s := benchStore(b, b.TempDir())
	n := 0
	for b.Loop() {
		if _, err := s.Commit(context.Background(), nil, writesOf(n, perCommit)); err != nil {
			b.Fatal(err)
		}
		n += perCommit
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "records/s")
}

// BenchmarkLimit is what BenchmarkCommit is compared with: bbolt alone, one
// record in one transaction.
func BenchmarkLimit(b *testing.B) {
	s := benchStore(b, b.TempDir())
	n := 0
	for b.Loop() {
		w := writesOf(n, 1)[0]
		if err := s.db.Update(func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte(recordsBucket)).Put([]byte(w.Key), w.Value)
		}); err != nil {
			b.Fatal(err)
		}
		n++
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
}

func BenchmarkCommit(b *testing.B) {
	for _, n := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("records=%d", n), func(b *testing.B) { commitBench(b, n) })
	}
}

// BenchmarkCommitConcurrent has many callers, one record each.
func BenchmarkCommitConcurrent(b *testing.B) {
	s := benchStore(b, b.TempDir())
	var n atomic.Int64
	b.SetParallelism(16)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := s.Commit(context.Background(), nil, writesOf(int(n.Add(1)), 1)); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
}

// BenchmarkCommitWatched has watchers of another prefix, which each commit wakes.
func BenchmarkCommitWatched(b *testing.B) {
	for _, watchers := range []int{0, 10, 1000} {
		b.Run(fmt.Sprintf("watchers=%d", watchers), func(b *testing.B) {
			s := benchStore(b, b.TempDir())
			for range watchers {
				go func() {
					for _, err := range s.Watch(b.Context(), "other/", 1) {
						if err != nil {
							return // the benchmark is over
						}
					}
				}()
			}
			n := 0
			for b.Loop() {
				if _, err := s.Commit(context.Background(), nil, writesOf(n, 1)); err != nil {
					b.Fatal(err)
				}
				n++
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
		})
	}
}

// BenchmarkLarge measures what a start with 100 000 records costs.
func BenchmarkLarge(b *testing.B) {
	dir := b.TempDir()
	s, err := OpenBolt(BoltConfig{Dir: dir, NoSync: true})
	if err != nil {
		b.Fatal(err)
	}
	for n := 0; n < 100_000; n += MaxWrites {
		if _, err := s.Commit(b.Context(), nil, writesOf(n, MaxWrites)); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			s, err := OpenBolt(BoltConfig{Dir: dir})
			if err != nil {
				b.Fatal(err)
			}
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
	s = benchStore(b, dir)
	b.Run("list", func(b *testing.B) {
		for b.Loop() {
			if page, err := s.List(b.Context(), "", "", 0); err != nil || len(page.Records) != 100_000 {
				b.Fatal(len(page.Records), err)
			}
		}
	})
	b.Run("get", func(b *testing.B) {
		key := writesOf(777, 1)[0].Key
		for b.Loop() {
			if _, err := s.Get(b.Context(), key); err != nil {
				b.Fatal(err)
			}
		}
	})
}

package audit

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"
)

// BenchmarkRecord shows what a durable line costs alone and in company. Compare
// with BenchmarkSync of the same run: the disk's own limit.
func BenchmarkRecord(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			l := open(b, Config{Path: logPath(b)})
			line := fullLine()
			var wg sync.WaitGroup
			left := make(chan struct{}, callers)
			b.ReportAllocs()
			b.ResetTimer()
			for range callers {
				wg.Go(func() {
					for range left {
						if err := l.Record(context.Background(), line); err != nil {
							b.Error(err)
						}
					}
				})
			}
			for range b.N {
				left <- struct{}{}
			}
			close(left)
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "lines/s")
		})
	}
}

func BenchmarkSync(b *testing.B) {
	l := open(b, Config{Path: logPath(b)})
	p := make([]byte, 800)
	for i := range b.N {
		if _, err := l.disk.write(l.file, p, int64(i*len(p))); err != nil {
			b.Fatal(err)
		}
		if err := l.disk.sync(l.file); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	line := fullLine()
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf = appendHead(buf[:0], stamp{wall: time.Now()})
		buf = appendTail(appendLine(buf, &line), "build")
	}
	b.SetBytes(int64(len(buf)))
}

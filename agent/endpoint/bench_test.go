package endpoint

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

const loadEnv = "ASSAY_LOAD" // clients, connections, operations

func loadOf() (clients, conns, ops int) {
	_, _ = fmt.Sscan(os.Getenv(loadEnv), &clients, &conns, &ops)
	return clients, conns, ops
}

func dialMany(socket string, n int) ([]workload.SpiffeWorkloadAPIClient, error) {
	var list []workload.SpiffeWorkloadAPIClient
	for range n {
		cc, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithReadBufferSize(1<<10), grpc.WithWriteBufferSize(1<<10))
		if err != nil {
			return nil, err
		}
		list = append(list, workload.NewSpiffeWorkloadAPIClient(cc))
	}
	return list, nil
}

func fetchOnce(ctx context.Context, c workload.SpiffeWorkloadAPIClient, keep bool) error {
	ctx = metadata.AppendToOutgoingContext(ctx, headerKey, headerValue)
	if !keep {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
	}
	stream, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

// spread runs n calls of f on some goroutines.
func spread(goroutines, n int, f func(i int) error) error {
	var wg sync.WaitGroup
	var next atomic.Int64
	errs := make(chan error, goroutines)
	for range goroutines {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := f(i); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	return <-errs
}

// playLoad makes calls when it is told to.
func playLoad(socket string) error {
	clients, conns, ops := loadOf()
	list, err := dialMany(socket, conns)
	if err != nil {
		return err
	}
	run := func(i int) error { return fetchOnce(context.Background(), list[i%conns], false) }
	if err := spread(clients, 2*clients, run); err != nil {
		return err
	}
	fmt.Println("ready")
	if _, err := io.ReadFull(os.Stdin, make([]byte, 1)); err != nil {
		return err
	}
	if err := spread(clients, ops, run); err != nil {
		return err
	}
	fmt.Println("done")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}

// playIdle opens streams and keeps them.
func playIdle(socket string) error {
	_, conns, ops := loadOf()
	list, err := dialMany(socket, conns)
	if err != nil {
		return err
	}
	if err := spread(64, ops, func(i int) error { return fetchOnce(context.Background(), list[i%conns], true) }); err != nil {
		return err
	}
	fmt.Println("done")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}

func cpu() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func rss() int {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	pages, _ := strconv.Atoi(strings.Fields(string(data))[1])
	return pages * os.Getpagesize()
}

func withLoad(clients, conns, ops int) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d %d %d", loadEnv, clients, conns, ops))
	}
}

// BenchmarkFetchX509SVID opens a stream, takes the first message and leaves.
// The clients are a process of their own, so cpu-ms/op is the agent's alone.
// "empty" is the limit: gRPC without anything of ours behind it.
func BenchmarkFetchX509SVID(b *testing.B) {
	ca := newAuthority(b)
	for _, kind := range []string{"agent", "empty"} {
		for _, load := range [][2]int{{1, 1}, {64, 1}, {64, 64}} {
			b.Run(fmt.Sprintf("%s/clients=%d/conns=%d", kind, load[0], load[1]), func(b *testing.B) {
				snap := ca.snapshot(ca.svid("/a", ""))
				var path string
				if kind == "agent" {
					path = serve(b, &source{snap: snap}).path
				} else {
					path = serveEmpty(b, x509SVIDResponse(snap).(*workload.X509SVIDResponse))
				}
				c := startClient(b, "load", path, withLoad(load[0], load[1], b.N))
				c.await("ready")
				used := cpu()
				b.ResetTimer()
				c.tell("")
				c.await("done")
				b.StopTimer()
				b.ReportMetric(float64(cpu()-used)/float64(b.N)/1e6, "cpu-ms/op")
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "op/s")
			})
		}
	}
}

type empty struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	resp *workload.X509SVIDResponse
}

func (e empty) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := s.Send(e.resp); err != nil {
		return err
	}
	<-s.Context().Done()
	return nil
}

func serveEmpty(b *testing.B, resp *workload.X509SVIDResponse) string {
	b.Helper()
	dir, err := os.MkdirTemp("", "empty")
	if err != nil {
		b.Fatal(err)
	}
	lis, err := net.Listen("unix", dir+"/s")
	if err != nil {
		b.Fatal(err)
	}
	s := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(s, empty{resp: resp})
	go func() { _ = s.Serve(lis) }()
	b.Cleanup(func() {
		s.Stop()
		_ = os.RemoveAll(dir)
	})
	return dir + "/s"
}

// BenchmarkIdleStreams reports what an open stream costs while nothing happens.
func BenchmarkIdleStreams(b *testing.B) {
	ca := newAuthority(b)
	const streams = 10_000
	for _, kind := range []string{"agent", "empty"} {
		for _, conns := range []int{10, streams} {
			b.Run(fmt.Sprintf("%s/streams=%d/conns=%d", kind, streams, conns), func(b *testing.B) {
				for range b.N {
					snap := ca.snapshot(ca.svid("/a", ""))
					var path string
					if kind == "agent" {
						path = serve(b, &source{snap: snap}).path
					} else {
						path = serveEmpty(b, x509SVIDResponse(snap).(*workload.X509SVIDResponse))
					}
					debug.FreeOSMemory()
					before := rss()
					begun := time.Now()
					c := startClient(b, "idle", path, withLoad(0, conns, streams))
					c.await("done")
					b.ReportMetric(time.Since(begun).Seconds(), "s-to-serve-all")
					b.ReportMetric(float64(rss()-before)/streams, "rss-B/stream")
					runtime.GC()
					debug.FreeOSMemory()
					b.ReportMetric(float64(rss()-before)/streams, "rss-after-gc-B/stream")
					_ = c.end()
				}
			})
		}
	}
}

package main

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/test/harness"
)

// workloadClient speaks the Workload API without a library's help or delay.
type workloadClient struct {
	api workload.SpiffeWorkloadAPIClient
	ctx context.Context
}

func (b *bench) workload(endpoint string) *workloadClient {
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	b.must(err)
	b.Cleanup(func() { _ = conn.Close() })
	return clientOn(context.Background(), conn)
}

// clientOn uses a connection that its caller closes.
func clientOn(ctx context.Context, conn *grpc.ClientConn) *workloadClient {
	return &workloadClient{
		api: workload.NewSpiffeWorkloadAPIClient(conn),
		ctx: metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true"),
	}
}

// fetch opens a stream, takes the first message and closes it.
func (c *workloadClient) fetch() error {
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	stream, err := c.api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return err
	}
	resp, err := stream.Recv()
	if err == nil && len(resp.GetSvids()) == 0 {
		err = fmt.Errorf("empty answer")
	}
	return err
}

const (
	samples = 40
	// quiet is longer than the server gathers changes that follow each other.
	quiet = 30 * time.Millisecond
)

// propagation measures from the call that creates an entry to the SVID in the
// workload's hands.
func (b *bench) propagation(s *harness.Site, a *harness.Agent) {
	admin := b.admin(s)
	keep := admin.create(a.ID, "spiffe://example.org/kept")
	c := b.workload(a.Endpoint())
	ctx, cancel := context.WithTimeout(c.ctx, 2*time.Minute)
	defer cancel()
	stream, err := c.api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	b.must(err)
	await := func(n int) {
		for {
			resp, err := stream.Recv()
			b.must(err)
			if len(resp.GetSvids()) == n {
				return
			}
		}
	}
	await(1)
	var open []time.Duration
	for i := range samples {
		begin := time.Now()
		id := admin.create(a.ID, fmt.Sprintf("spiffe://example.org/p/%d", i))
		await(2)
		open = append(open, time.Since(begin))
		admin.remove(id)
		await(1)
		time.Sleep(quiet) // else each change follows another
	}
	admin.remove(keep)
	b.awaitDenied(c)
	b.add("new entry to SVID in an open stream, p50", ms(quantile(open, .5)), "", "", "<= 20 ms")
	b.add("new entry to SVID in an open stream, p99", ms(quantile(open, .99)), "", "", "<= 100 ms")

	var held []time.Duration
	for i := range samples / 2 {
		held = append(held, b.heldWatcher(a, admin, i))
	}
	b.add("new entry to SVID in a held go-spiffe watcher, p50", ms(quantile(held, .5)), "", "", "<= 50 ms")
}

func (b *bench) heldWatcher(a *harness.Agent, admin *adminClient, i int) time.Duration {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	arrived := make(chan time.Time, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = workloadapi.WatchX509Context(ctx, &firstUpdate{arrived}, workloadapi.WithAddr(a.Endpoint()))
	})
	time.Sleep(300 * time.Millisecond) // the watcher has to be held when the entry comes
	begin := time.Now()
	id := admin.create(a.ID, fmt.Sprintf("spiffe://example.org/h/%d", i))
	var took time.Duration
	select {
	case at := <-arrived:
		took = at.Sub(begin)
	case <-ctx.Done():
		b.Fatalf("the watcher got nothing")
	}
	cancel()
	wg.Wait()
	admin.remove(id)
	b.awaitDenied(b.workload(a.Endpoint()))
	return took
}

// awaitDenied returns when the agent knows that there is nothing for us.
func (b *bench) awaitDenied(c *workloadClient) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		ctx, cancel := context.WithTimeout(c.ctx, quiet)
		err := (&workloadClient{api: c.api, ctx: ctx}).fetch()
		cancel()
		if status.Code(err) == codes.PermissionDenied {
			return
		}
	}
	b.Fatalf("a removed entry is still served")
}

type firstUpdate struct{ arrived chan time.Time }

func (f *firstUpdate) OnX509ContextUpdate(*workloadapi.X509Context) {
	select {
	case f.arrived <- time.Now():
	default:
	}
}

func (f *firstUpdate) OnX509ContextWatchError(error) {}

// fetching compares the agent with a server that answers a constant.
func (b *bench) fetching(s *harness.Site, a *harness.Agent) {
	admin := b.admin(s)
	admin.create(a.ID, "spiffe://example.org/fetch")
	c := b.workload(a.Endpoint())
	a.Eventually(10*time.Second, "SVID", c.fetch)
	socket, limit, stop := b.limitServer(s)
	defer stop()
	l := b.workload("unix://" + socket)
	goals := map[int][2]string{1: {">= 4.5 k/s", "<= 0.14 ms"}, 64: {">= 23.6 k/s", "<= 0.06 ms"}}
	for _, clients := range []int{1, 64} {
		lr, lc := b.rate(l, clients, limit)
		r, c := b.rate(c, clients, a.PID())
		b.add(fmt.Sprintf("FetchX509SVID, %d clients on one connection", clients), fmt.Sprintf("%.0f/s", r), fmt.Sprintf("%.0f/s", lr),
			fmt.Sprintf("%.0f %%", 100*r/lr), goals[clients][0]+" there")
		b.add(fmt.Sprintf("  agent CPU each, %d clients", clients), fmt.Sprintf("%.3f ms", c), fmt.Sprintf("%.3f ms", lc),
			fmt.Sprintf("%.1fx", c/lc), goals[clients][1]+" there")
	}
}

// rate returns fetches per second and the server's CPU milliseconds for each.
func (b *bench) rate(c *workloadClient, clients, pid int) (perSecond, cpuEach float64) {
	var count atomic.Int64
	var wg sync.WaitGroup
	begin, used := time.Now(), cpu(pid)
	for range clients {
		wg.Go(func() {
			for time.Since(begin) < 4*time.Second {
				if err := c.fetch(); err != nil {
					b.Errorf("fetch: %v", err)
					return
				}
				count.Add(1)
			}
		})
	}
	wg.Wait()
	n := float64(count.Load())
	return n / time.Since(begin).Seconds(), (cpu(pid) - used).Seconds() * 1000 / n
}

// constant answers FetchX509SVID with the same bytes and waits, as an agent.
type constant struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
}

func (constant) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := stream.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId: "spiffe://example.org/fetch", X509Svid: make([]byte, 1000), X509SvidKey: make([]byte, 138), Bundle: make([]byte, 450),
	}}}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func serveConstant(socket string) error {
	lis, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	srv := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(srv, constant{})
	return srv.Serve(lis)
}

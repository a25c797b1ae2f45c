package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/seed-caa81108/assay/test/harness"
)

const (
	manyStreams = 10_000
	// perConn is how many streams share a connection: as many as the agent
	// takes on one.
	perConn = 100
	// dialers open streams at a time, as that many processes would.
	dialers = 64
)

// streams opens very many streams that stay, and reports what each costs the
// agent and how long it takes until all have their SVID.
func (b *bench) streams(s *harness.Site) {
	for _, c := range []struct {
		what   string
		each   int // streams of a connection
		memory string
		served string
	}{
		{"shared connections", perConn, "<= 14 KB there", "<= 1 s there"},
		{"own connections", 1, "<= 36 KB there", "<= 3 s there"},
	} {
		limitKB, limitTook := b.holdConstant(s, c.each)
		kb, took, refused := b.holdAgent(s, c.each)
		b.add(fmt.Sprintf("%d streams, %s: agent memory each", manyStreams, c.what), fmt.Sprintf("%.1f KB", kb),
			fmt.Sprintf("%.1f KB", limitKB), fmt.Sprintf("%.1fx", kb/limitKB), c.memory)
		b.add("  all served", fmt.Sprintf("%.2f s", took.Seconds()), fmt.Sprintf("%.2f s", limitTook.Seconds()),
			fmt.Sprintf("%.1fx", took.Seconds()/limitTook.Seconds()), c.served)
		b.add("  refused", fmt.Sprint(refused), "", "", "0")
	}
}

// holdConstant does it with the server that answers a constant.
func (b *bench) holdConstant(s *harness.Site, each int) (kb float64, took time.Duration) {
	socket, pid, stop := b.limitServer(s)
	defer stop()
	kb, took, refused := b.hold("unix://"+socket, each, pid)
	if refused > 0 {
		b.Fatalf("the limit itself refused %d streams", refused)
	}
	return kb, took
}

// holdAgent does it with an agent of its own, whose memory nothing else used.
func (b *bench) holdAgent(s *harness.Site, each int) (kb float64, took time.Duration, refused int) {
	a := s.NewAgent(fmt.Sprintf("holder%d", each))
	a.Start(a.Join())
	defer a.Stop(syscall.SIGTERM)
	s.CreateEntry(a.ID, "spiffe://example.org/held")
	a.Eventually(10*time.Second, "SVID", b.workload(a.Endpoint()).fetch)
	return b.hold(a.Endpoint(), each, a.PID())
}

// hold opens the streams, waits for the first message on each, and closes them.
func (b *bench) hold(endpoint string, each, pid int) (kb float64, took time.Duration, refused int) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	clients := make([]*workloadClient, manyStreams/each)
	for i := range clients {
		conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
		b.must(err)
		defer func() { _ = conn.Close() }()
		clients[i] = clientOn(ctx, conn)
	}
	before := rss(pid)
	begin := time.Now()
	failed := make([]int, dialers)
	var wg sync.WaitGroup
	for d := range dialers {
		wg.Go(func() {
			for i := d; i < manyStreams; i += dialers {
				if err := clients[i%len(clients)].open(); err != nil {
					failed[d]++
				}
			}
		})
	}
	wg.Wait()
	took = time.Since(begin)
	for _, n := range failed {
		refused += n
	}
	return float64(rss(pid)-before) / manyStreams / 1000, took, refused
}

// open opens a stream, takes its first message and leaves it open.
func (c *workloadClient) open() error {
	stream, err := c.api.FetchX509SVID(c.ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

// limitServer starts the server that answers a constant, in a process of its
// own.
func (b *bench) limitServer(s *harness.Site) (socket string, pid int, stop func()) {
	socket = s.File("limit.sock")
	p, err := os.StartProcess("/proc/self/exe", []string{"bench", "-limit-server", socket}, &os.ProcAttr{Files: []*os.File{nil, os.Stderr, os.Stderr}})
	b.must(err)
	stop = sync.OnceFunc(func() {
		_ = p.Signal(syscall.SIGKILL)
		_, _ = p.Wait()
		_ = os.Remove(socket)
	})
	b.Cleanup(stop)
	c := b.workload("unix://" + socket)
	for c.fetch() != nil {
		time.Sleep(10 * time.Millisecond) // until the child listens
	}
	return socket, p.Pid, stop
}

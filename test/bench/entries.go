package main

import (
	"context"
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/test/harness"
)

const (
	manyEntries  = 100_000
	createBatch  = 500
	createFlight = 8 // batches at a time
)

// entries fills a server with very many entries through its API, under
// one parent, many, and as many as there are entries, and starts it again.
func (b *bench) entries(*harness.Site) {
	for _, parents := range []int{1, 1000, manyEntries} {
		s := harness.NewSite(b, b.bins, "")
		s.StartServer()
		admin := b.admin(s)
		begin := time.Now()
		admin.fill(manyEntries, parents)
		took := time.Since(begin)
		used, most := cpu(s.Server.PID()), rss(s.Server.PID())
		quiet := b.settledRSS(s.Server.PID())
		s.Server.Stop(syscall.SIGTERM)
		begin = time.Now()
		s.StartServer()
		restart := time.Since(begin)
		if got := admin.count(); got != manyEntries {
			b.Fatalf("%d entries after the restart", got)
		}
		again := rss(s.Server.PID())
		s.Server.Stop(syscall.SIGTERM)
		b.add(fmt.Sprintf("%d entries, %d parents: created", manyEntries, parents), fmt.Sprintf("%.2f s", took.Seconds()), "", "", "<= 5 s there")
		b.add("  processor time of the server for that", fmt.Sprintf("%.2f s", used.Seconds()), "", "", "")
		b.add("  RSS of the server, once it is quiet", mb(quiet), "", "", "<= 200 MB")
		b.add("  RSS right then; right after a restart", mb(most)+"; "+mb(again), "", "", "")
		b.add("  restart, from exec to ready", fmt.Sprintf("%.2f s", restart.Seconds()), "", "", "<= 1 s there")
	}
}

// settledRSS waits until a server has given back what a burst needed, for at most
// 15 s.
func (b *bench) settledRSS(pid int) int64 {
	first := rss(pid)
	last := first
	for range 30 {
		time.Sleep(500 * time.Millisecond)
		now := rss(pid)
		if now < first*9/10 && now > last*99/100 {
			return now
		}
		last = now
	}
	return last
}

// fill creates n entries such as Kubernetes workloads have.
func (c *adminClient) fill(n, parents int) {
	var next atomic.Int64
	var g errgroup.Group
	for range createFlight {
		g.Go(func() error {
			for {
				from := int(next.Add(createBatch)) - createBatch
				if from >= n {
					return nil
				}
				if err := c.createBatch(from, min(from+createBatch, n), parents); err != nil {
					return err
				}
			}
		})
	}
	c.b.must(g.Wait())
}

func (c *adminClient) createBatch(from, to, parents int) error {
	req := &entryv1.BatchCreateEntryRequest{OutputMask: &types.EntryMask{}}
	for i := from; i < to; i++ {
		id := func(path string) *types.SPIFFEID {
			return &types.SPIFFEID{TrustDomain: harness.TrustDomain, Path: path}
		}
		req.Entries = append(req.Entries, &types.Entry{
			ParentId: id(fmt.Sprintf("/assay/agent/join_token/%032x", i%parents)),
			SpiffeId: id(fmt.Sprintf("/ns/team-%d/sa/workload-%d", i%50, i)),
			Selectors: []*types.Selector{
				{Type: "k8s", Value: fmt.Sprintf("ns:team-%d", i%50)}, {Type: "k8s", Value: fmt.Sprintf("sa:workload-%d", i)},
			},
		})
	}
	resp, err := c.entries.BatchCreateEntry(context.Background(), req)
	if err != nil {
		return err
	}
	for _, r := range resp.GetResults() {
		if r.GetStatus().GetCode() != 0 {
			return fmt.Errorf("create entry: %s", r.GetStatus().GetMessage())
		}
	}
	return nil
}

func (c *adminClient) count() int32 {
	resp, err := c.entries.CountEntries(context.Background(), &entryv1.CountEntriesRequest{})
	c.b.must(err)
	return resp.GetCount()
}

package kube

import (
	"context"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Change is what became of the pods of a node since the last one.
type Change struct {
	// Snapshot: Pods are all there are.
	Snapshot bool
	Pods     []*Pod
	Removed  []string // UIDs
}

// Feed follows the pods of one node. Next is for one goroutine.
type Feed struct {
	index *index
	node  string // UID
	wake  chan struct{}
	sent  map[string]*Pod // nil before the first
}

func (x *index) follow(nodeUID string) *Feed {
	f := &Feed{index: x, node: nodeUID, wake: make(chan struct{}, 1)}
	f.signal()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.feeds[nodeUID] == nil {
		x.feeds[nodeUID] = map[*Feed]struct{}{}
	}
	x.feeds[nodeUID][f] = struct{}{}
	return f
}

// Cluster is the name of the cluster whose node it is.
func (f *Feed) Cluster() string { return f.index.cluster }

// Close ends the feed.
func (f *Feed) Close() {
	f.index.mu.Lock()
	defer f.index.mu.Unlock()
	delete(f.index.feeds[f.node], f)
	if len(f.index.feeds[f.node]) == 0 {
		delete(f.index.feeds, f.node)
	}
}

func (f *Feed) signal() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// lingering is how often a feed looks for pods whose time is over.
const lingering = 15 * time.Second

// Next returns the next change. The first is a snapshot, and comes when the
// server knows the cluster's pods; later ones are never empty.
func (f *Feed) Next(ctx context.Context) (Change, error) {
	again := time.NewTicker(lingering)
	defer again.Stop()
	for {
		select {
		case <-f.wake:
		case <-again.C:
		case <-ctx.Done():
			return Change{}, fault.Wrap(fault.NotReady, ctx.Err(), "stream_ended", "the stream ended")
		}
		if c, ok := f.look(time.Now()); ok {
			return c, nil
		}
	}
}

// look compares what there is with what was sent.
func (f *Feed) look(now time.Time) (Change, bool) {
	f.index.mu.Lock()
	defer f.index.mu.Unlock()
	for _, w := range f.index.watch {
		if !w.synced {
			return Change{}, false
		}
	}
	c := Change{Snapshot: f.sent == nil}
	pods := f.index.podsOn(f.node, now)
	current := make(map[string]*Pod, len(pods))
	for _, p := range pods {
		current[p.UID] = p
		if was := f.sent[p.UID]; was == nil || !samePod(was, p) {
			c.Pods = append(c.Pods, p)
		}
	}
	for uid := range f.sent {
		if current[uid] == nil {
			c.Removed = append(c.Removed, uid)
		}
	}
	f.sent = current
	return c, c.Snapshot || len(c.Pods) > 0 || len(c.Removed) > 0
}

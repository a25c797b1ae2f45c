package registry

import (
	"context"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
)

// gather is how long followers of a change wait for each other.
const gather = 10 * time.Millisecond

// Update brings an agent's view of its entries to Revision.
type Update struct {
	Epoch    string
	Revision int64
	// CommittedAt is when the newest change was made; zero in a snapshot.
	CommittedAt time.Time
	// Snapshot: Entries replaces the whole view. Otherwise Entries were added
	// or changed and Removed are gone, known to the agent or not.
	Snapshot bool
	Entries  []Entry
	Removed  []string
}

// Feed follows the entries of one parent ID. It remembers a position in the
// change log and nothing else, so a slow reader costs no memory: when what it
// has not read is forgotten, it gets a snapshot. Next is for one goroutine.
type Feed struct {
	mirror  *mirror
	epoch   string
	parent  *parent
	wake    chan struct{}
	started bool
	resume  int64     // revision to resume from, before started
	at      uint64    // position of the first change not delivered
	sent    time.Time // when the last change was delivered
}

// Follow returns a feed of agent's entries. An agent that has applied an
// update of epoch and revision since gets what changed after it, if that is
// still known, else the whole view. The feed must be closed.
func (r *Registry) Follow(agent spiffeid.ID, epoch string, since int64) *Feed {
	f := &Feed{mirror: r.mirror, epoch: r.epoch, wake: make(chan struct{}, 1)}
	if epoch == r.epoch {
		f.resume = since
	}
	m := r.mirror
	m.mu.Lock()
	defer m.mu.Unlock()
	f.parent = m.parent(agent)
	f.parent.feeds = append(f.parent.feeds, f)
	return f
}

// Close ends the feed. It may not run at the same time as Next.
func (f *Feed) Close() {
	m := f.mirror
	m.mu.Lock()
	defer m.mu.Unlock()
	f.parent.feeds = slices.DeleteFunc(f.parent.feeds, func(g *Feed) bool { return g == f })
	m.release(f.parent.id)
}

// Next returns the next update. The first comes at once, be it empty. Later
// ones wait for a change: one after a quiet time is delivered at once, those
// that follow it together, 10 ms after the last delivery.
func (f *Feed) Next(ctx context.Context) (Update, error) {
	if !f.started {
		f.started = true
		return f.begin(), nil
	}
	for !f.behind() {
		select {
		case <-f.wake:
		case <-ctx.Done():
			return Update{}, ended(ctx)
		}
	}
	if wait := time.Until(f.sent.Add(gather)); wait > 0 {
		if err := schedule.Sleep(ctx, wait); err != nil {
			return Update{}, ended(ctx)
		}
	}
	u := f.take()
	f.sent = time.Now()
	return u, nil
}

// signal is called with the mirror's lock held, after every change.
func (f *Feed) signal() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// begin answers the first call: what changed since the revision to resume
// from, or a snapshot.
func (f *Feed) begin() Update {
	m := f.mirror
	m.mu.RLock()
	defer m.mu.RUnlock()
	if f.resume > 0 && f.resume <= m.revision {
		if at, ok := f.parent.log.since(f.resume); ok {
			f.at = at
			return f.delta()
		}
	}
	return f.snapshot()
}

func (f *Feed) behind() bool {
	f.mirror.mu.RLock()
	defer f.mirror.mu.RUnlock()
	return f.at < f.parent.log.end()
}

func (f *Feed) take() Update {
	f.mirror.mu.RLock()
	defer f.mirror.mu.RUnlock()
	return f.delta()
}

// delta and snapshot need the mirror's lock, for reading.

func (f *Feed) delta() Update {
	changes, ok := f.parent.log.from(f.at)
	if !ok {
		return f.snapshot()
	}
	f.at = f.parent.log.end()
	u := Update{Epoch: f.epoch, Revision: f.mirror.revision}
	seen := make(map[string]bool, len(changes))
	for _, c := range changes {
		if c.at.After(u.CommittedAt) {
			u.CommittedAt = c.at
		}
		if seen[c.id] {
			continue
		}
		seen[c.id] = true
		if it := f.mirror.entries[c.id]; it != nil && it.live && it.ParentID == f.parent.id {
			u.Entries = append(u.Entries, it.Entry)
		} else {
			u.Removed = append(u.Removed, c.id)
		}
	}
	return u
}

func (f *Feed) snapshot() Update {
	f.at = f.parent.log.end()
	u := Update{Epoch: f.epoch, Revision: f.mirror.revision, Snapshot: true}
	u.Entries = make([]Entry, 0, f.parent.view.count)
	for it := range f.parent.view.after(nil) {
		u.Entries = append(u.Entries, it.Entry)
	}
	return u
}

func ended(ctx context.Context) error {
	return fault.Wrap(fault.NotReady, context.Cause(ctx), "request_ended", "the request ended before its answer")
}

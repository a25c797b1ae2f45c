package registry

import (
	"context"
	"iter"
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

// Feed follows the entries of one agent: those whose parent is its own ID or an
// alias of it. It remembers positions in the change log and nothing else, so a
// slow reader costs no memory: when what it has not read is forgotten, it gets
// a snapshot. So it does when the agent's aliases change. Next is for one
// goroutine.
type Feed struct {
	mirror  *mirror
	epoch   string
	parent  *parent // the agent's own
	wake    chan struct{}
	started bool
	resume  int64     // revision to resume from, before started
	cursors []cursor  // of its parent and of every alias
	sent    time.Time // when the last change was delivered
	told    int64     // newest revision that was delivered
	asked   int64     // revision that somebody waits for; the mirror's lock guards it
}

// cursor is the position of the first change of a parent that was not delivered.
type cursor struct {
	parent *parent
	at     uint64
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
// ones wait for a change, or for somebody who waits for a revision: one after a
// quiet time is delivered at once, those that follow it together, 10 ms after
// the last delivery.
func (f *Feed) Next(ctx context.Context) (Update, error) {
	if !f.started {
		f.started = true
		u := f.begin()
		f.told = u.Revision
		return u, nil
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
	f.sent, f.told = time.Now(), u.Revision
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
	if f.resume > 0 && f.resume <= m.revision && f.seek(f.resume) {
		return f.delta()
	}
	return f.snapshot()
}

func (f *Feed) behind() bool {
	f.mirror.mu.RLock()
	defer f.mirror.mu.RUnlock()
	return f.told < f.asked || slices.ContainsFunc(f.cursors, func(c cursor) bool { return c.at < c.parent.log.end() })
}

func (f *Feed) take() Update {
	f.mirror.mu.RLock()
	defer f.mirror.mu.RUnlock()
	return f.delta()
}

// What follows needs the mirror's lock, for reading.

// seek moves to the first changes that an agent at revision may not have. It
// says false when some of those are forgotten. That the aliases are others by
// now is a change of its own, and delta finds it.
func (f *Feed) seek(revision int64) bool {
	f.cursors = f.cursors[:0]
	for p := range f.parent.sources() {
		at, ok := p.log.since(revision)
		if !ok {
			return false
		}
		f.cursors = append(f.cursors, cursor{p, at})
	}
	return true
}

// sources yields the parents whose entries the agent of this one has.
func (p *parent) sources() iter.Seq[*parent] {
	return func(yield func(*parent) bool) {
		if !yield(p) {
			return
		}
		for alias := range p.aliases {
			if !yield(alias) {
				return
			}
		}
	}
}

func (f *Feed) delta() Update {
	u := Update{Epoch: f.epoch, Revision: f.mirror.revision}
	seen := map[string]bool{}
	for i := range f.cursors {
		c := &f.cursors[i]
		changes, ok := c.parent.log.from(c.at)
		if !ok {
			return f.snapshot()
		}
		for _, one := range changes {
			if one.relinked {
				return f.snapshot()
			}
			if one.at.After(u.CommittedAt) {
				u.CommittedAt = one.at
			}
			if !seen[one.id] {
				seen[one.id] = true
				f.add(&u, one.id)
			}
		}
		c.at = c.parent.log.end()
	}
	return u
}

// add puts into u what has become of an entry for this agent.
func (f *Feed) add(u *Update, id string) {
	it := f.mirror.entries[id]
	if it != nil && it.live {
		from := f.mirror.parents[it.ParentID.String()]
		if _, alias := f.parent.aliases[from]; alias || from == f.parent {
			u.Entries = append(u.Entries, it.Entry)
			return
		}
	}
	u.Removed = append(u.Removed, id)
}

func (f *Feed) snapshot() Update {
	u := Update{Epoch: f.epoch, Revision: f.mirror.revision, Snapshot: true}
	total := 0
	for p := range f.parent.sources() {
		total += p.view.count
	}
	u.Entries = make([]Entry, 0, total)
	f.cursors = f.cursors[:0]
	for p := range f.parent.sources() {
		f.cursors = append(f.cursors, cursor{p, p.log.end()})
		for it := range p.view.after(nil) {
			u.Entries = append(u.Entries, it.Entry)
		}
	}
	return u
}

func ended(ctx context.Context) error {
	return fault.Wrap(fault.NotReady, context.Cause(ctx), "request_ended", "the request ended before its answer")
}

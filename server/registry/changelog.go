package registry

import (
	"sort"
	"time"
)

// change says that the entry id came to, left, or changed in a parent's view.
type change struct {
	revision int64
	at       time.Time
	id       string
	// relinked: instead, the agent of this parent gained or lost an alias. Its
	// view has to be sent anew; changes of the parents' logs don't add up to it.
	relinked bool
	// uncommitted marks an expiry: it happened after revision and before the
	// next, so an agent that has revision may or may not know.
	uncommitted bool
}

// changeLog remembers the newest changes of all parents, limit in all. Each is
// kept with its parent; the log itself only knows whose turn to forget is next.
type changeLog struct {
	limit int
	queue []*parent // a ring once it is full: oldest first from head on
	head  int
	// floor is the oldest revision to which parents without a log of their
	// own can be resumed.
	floor int64
}

// parentLog is what changeLog remembers of one parent. A position in it counts
// all changes that the parent ever had.
type parentLog struct {
	recent    []change
	forgotten uint64 // how many changes came before recent
	lost      int64  // oldest revision from which recent is complete
}

// add notes c for p. It returns the parent that forgot a change for it, if any.
func (l *changeLog) add(p *parent, c change) (evicted *parent) {
	p.log.recent = append(p.log.recent, c)
	if len(l.queue) < l.limit {
		l.queue = append(l.queue, p)
		return nil
	}
	evicted, l.queue[l.head] = l.queue[l.head], p
	l.head = (l.head + 1) % len(l.queue)
	evicted.log.forget()
	return evicted
}

// forget drops the oldest change.
func (l *parentLog) forget() {
	c := l.recent[0]
	l.recent = l.recent[1:]
	if len(l.recent) == 0 {
		l.recent = nil
	}
	l.forgotten++
	l.lost = max(l.lost, c.revision)
	if c.uncommitted {
		l.lost = max(l.lost, c.revision+1)
	}
}

// end is the position after the newest change.
func (l *parentLog) end() uint64 { return l.forgotten + uint64(len(l.recent)) }

// since returns the position of the first change that an agent at revision may
// not have, and false when that is no longer known.
func (l *parentLog) since(revision int64) (uint64, bool) {
	if revision < l.lost {
		return 0, false
	}
	first := sort.Search(len(l.recent), func(i int) bool {
		c := l.recent[i]
		return c.revision > revision || c.revision == revision && c.uncommitted
	})
	return l.forgotten + uint64(first), true
}

// from returns the changes from position on, and false when some of them are
// forgotten.
func (l *parentLog) from(position uint64) ([]change, bool) {
	if position < l.forgotten {
		return nil, false
	}
	return l.recent[position-l.forgotten:], true
}

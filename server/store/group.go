package store

import (
	"context"
	"errors"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Bounds of what shares a transaction, and with it the syncs to the disk. Several
// groups have to fit into the history, else a watcher would lose its place.
const (
	maxGroup      = 128
	maxGroupBytes = 1 << 20
)

// pending is one call of Commit on its way through a transaction.
type pending struct {
	ifs    []Precondition
	writes []Write

	refused error // why its preconditions want nothing written
	batch   Batch

	done     chan struct{} // closed when the answer is there
	revision int64
	err      error
}

func (p *pending) size() int {
	n := 0
	for _, w := range p.writes {
		n += len(w.Key) + len(w.Value)
	}
	return n
}

func (p *pending) answer(revision int64, err error) {
	p.revision, p.err = revision, err
	close(p.done)
}

// queue has the commits that wait for their turn, in the order in which they
// came.
type queue struct {
	mu      sync.Mutex
	waiting []*pending
}

func (q *queue) join(p *pending) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = append(q.waiting, p)
}

// leave takes p out and says whether it was still there: if not, its commit has
// begun.
func (q *queue) leave(p *pending) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, other := range q.waiting {
		if other == p {
			q.waiting = append(q.waiting[:i:i], q.waiting[i+1:]...)
			return true
		}
	}
	return false
}

// take returns those whose turn it is.
func (q *queue) take() []*pending {
	q.mu.Lock()
	defer q.mu.Unlock()
	n, size := 0, 0
	for n < min(len(q.waiting), maxGroup) {
		if size += q.waiting[n].size(); size > maxGroupBytes && n > 0 {
			break
		}
		n++
	}
	group := q.waiting[:n:n]
	if q.waiting = q.waiting[n:]; len(q.waiting) == 0 {
		q.waiting = nil
	}
	return group
}

// Commit waits for its turn and then makes one bbolt transaction together with
// those that wait by then: they share the syncs. Each keeps its preconditions,
// its revision and its answer.
func (b *Bolt) Commit(ctx context.Context, ifs []Precondition, writes []Write) (int64, error) {
	if err := checkLimits(ifs, writes); err != nil {
		return 0, err
	}
	if ctx.Err() != nil {
		return 0, busy(ctx)
	}
	p := &pending{ifs: ifs, writes: writes, done: make(chan struct{})}
	b.queue.join(p)
	for {
		select {
		case b.writer <- struct{}{}:
			b.commitNext()
			<-b.writer
			continue // somebody may have done p before, and a group may be full
		case <-p.done:
			return p.revision, p.err
		case <-b.ended:
			if b.queue.leave(p) {
				return 0, b.Err()
			}
		case <-ctx.Done():
			if b.queue.leave(p) {
				return 0, busy(ctx)
			}
		}
		<-p.done // it has begun
		return p.revision, p.err
	}
}

// commitNext commits those whose turn it is. Its caller has the writer's token.
func (b *Bolt) commitNext() {
	if group := b.queue.take(); len(group) > 0 {
		b.commitGroup(group)
	}
}

func (b *Bolt) commitGroup(group []*pending) {
	if err := b.Err(); err != nil {
		for _, p := range group {
			p.answer(0, err)
		}
		return
	}
	t := transaction{group: group, now: time.Now().Round(0)}
	if err := guard(func() error { return b.update(t.apply) }); err != nil {
		b.settle(&t, err)
		return
	}
	// In this order: who reads a revision must be able to watch from it.
	for _, p := range group {
		if p.refused == nil {
			b.history.add(p.batch)
		}
	}
	b.durable.Store(int64(t.id))
	for _, p := range group {
		p.answer(p.batch.Revision, explain(b.path, p.refused))
	}
}

// transaction is a group of commits in one bbolt transaction.
type transaction struct {
	group []*pending
	now   time.Time

	id      int   // bbolt's; 0 if it did not begin
	nothing bool  // all were refused
	broken  error // why one could not be written, so that none was
}

var errNothing = errors.New("all commits were refused")

// apply runs inside the transaction: for each commit its preconditions, against
// what those before it wrote, then its writes; last the new head.
func (t *transaction) apply(tx *bbolt.Tx) error {
	t.id = tx.ID()
	meta, records := tx.Bucket([]byte(metaBucket)), tx.Bucket([]byte(recordsBucket))
	// Most records are made in the order of their keys: at the default of a half,
	// pages that are split would stay half empty.
	records.FillPercent = 0.7
	h, err := decodeHead(meta.Get([]byte(headKey)))
	if err != nil {
		t.broken = err
		return err
	}
	before := h.revision
	h.time = t.now
	for _, p := range t.group {
		if p.refused = p.check(records); p.refused != nil {
			continue
		}
		if t.broken = p.apply(records, &h); t.broken != nil {
			return t.broken
		}
	}
	if t.nothing = h.revision == before; t.nothing {
		return errNothing
	}
	return meta.Put([]byte(headKey), h.encode())
}

// settle answers a group whose transaction failed. Where it is certain that
// nothing was written, each gets an answer of its own, from a transaction of its
// own: one that can't be written is no reason against the others, and a
// conflict with one that was not written is none.
func (b *Bolt) settle(t *transaction, err error) {
	_, crashed := errors.AsType[*crash](err)
	certain := !crashed && (t.nothing || t.broken != nil || b.full(t, err))
	switch {
	case certain && t.nothing:
		for _, p := range t.group {
			p.answer(0, explain(b.path, p.refused))
		}
	case certain && len(t.group) > 1:
		for i := range t.group {
			t.group[i].refused = nil
			b.commitGroup(t.group[i : i+1])
		}
	case certain && t.broken != nil:
		t.group[0].answer(0, explain(b.path, t.broken))
	case certain:
		t.group[0].answer(0, storeFull(b.path, err))
	default:
		unknown := b.unknown(err)
		for _, p := range t.group {
			p.answer(0, unknown)
		}
	}
}

func busy(ctx context.Context) error {
	return fault.Wrap(fault.NotReady, ctx.Err(), "store_busy",
		"the request ended before it was its turn in the store; nothing was written: retry")
}

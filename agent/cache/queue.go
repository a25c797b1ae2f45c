package cache

import (
	"container/heap"
	"time"
)

// class is how urgent signing an entry is.
type class int

const (
	waiting  class = iota // a workload waits for it
	renewal               // replaces an SVID; the one that ends first goes first
	prefetch              // nobody asked yet
)

// queue is a heap of entries that know their place in it.
type queue struct {
	items []*entry
	less  func(a, b *entry) bool
}

func (q *queue) Len() int           { return len(q.items) }
func (q *queue) Less(i, j int) bool { return q.less(q.items[i], q.items[j]) }

func (q *queue) Swap(i, j int) {
	q.items[i], q.items[j] = q.items[j], q.items[i]
	q.items[i].position, q.items[j].position = i, j
}

// Push implements heap.Interface.
func (q *queue) Push(x any) {
	e := x.(*entry)
	e.in, e.position = q, len(q.items)
	q.items = append(q.items, e)
}

// Pop implements heap.Interface.
func (q *queue) Pop() any {
	e := q.items[len(q.items)-1]
	q.items[len(q.items)-1] = nil
	q.items = q.items[:len(q.items)-1]
	e.in = nil
	return e
}

func (q *queue) first() *entry {
	if len(q.items) == 0 {
		return nil
	}
	return q.items[0]
}

func (q *queue) add(e *entry)    { heap.Push(q, e) }
func (q *queue) take() *entry    { return heap.Pop(q).(*entry) }
func (q *queue) fix(e *entry)    { heap.Fix(q, e.position) }
func (q *queue) remove(e *entry) { heap.Remove(q, e.position) }

func byUrgency(a, b *entry) bool {
	if a.class != b.class {
		return a.class < b.class
	}
	if a.class == renewal && a.svid != nil && b.svid != nil && !a.svid.NotAfter.Equal(b.svid.NotAfter) {
		return a.svid.NotAfter.Before(b.svid.NotAfter)
	}
	return a.sequence < b.sequence
}

func byTime(a, b *entry) bool { return a.at.Before(b.at) }

// enqueue asks for an SVID for e as soon as possible. While it is being signed
// that is already so; settle looks whether the outcome will do.
func (c *Cache) enqueue(e *entry) {
	if e.signing {
		return
	}
	if e.in != nil {
		e.in.remove(e)
	}
	if !c.runs(e) {
		c.park(e)
		return
	}
	delete(c.parked, e)
	e.class = prefetch
	switch {
	case e.svid != nil && e.servable(c.now()):
		e.class = renewal
	case e.awaited():
		e.class = waiting
	case e.svid != nil:
		e.class = renewal
	}
	c.sequence++
	e.sequence = c.sequence
	c.ready.add(e)
	c.kick()
}

// awaited says whether a subscriber is there for e.
func (e *entry) awaited() bool {
	for g := range e.groups {
		if len(g.subs) > 0 {
			return true
		}
	}
	return false
}

// postpone asks for an SVID for e at the given time.
func (c *Cache) postpone(e *entry, at time.Time) {
	if e.in != nil {
		e.in.remove(e)
	}
	e.at = at
	c.timed.add(e)
}

// promote moves the entries whose time has come.
func (c *Cache) promote(at time.Time) {
	for first := c.timed.first(); first != nil && !at.Before(first.at); first = c.timed.first() {
		c.enqueue(c.timed.take())
	}
}

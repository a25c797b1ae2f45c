package api

import (
	"container/heap"
	"context"
	"runtime"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// kind of work, in the order in which it is done when there is more of it than
// can be done at once.
type kind int

const (
	agentRenewal kind = iota // without it, a node loses everything
	svidRenewal              // the one that ends first goes first
	newSVID
	attestation
)

// Work is weighed in certificates. What writes to the store waits for the disk
// and weighs more.
const (
	weightPerCore  = 1024 // about a fifth of a second
	storeWeight    = 16
	bytesPerWeight = 1024
	// maxWaiting bounds what waits, and with it the memory of the messages: each
	// has at most bytesPerWeight per weight.
	maxWaiting = 64 * 1024
	// patience is how long a call waits. Agents give up after twice that.
	patience = 10 * time.Second
	// overloadPause is what those are told who waited, or could not even wait.
	overloadPause = 2 * time.Second
)

// work is what agents make the server do at a time. It decides who goes first:
// renewals before new SVIDs before attestation, and of the new ones each agent
// in its turn. The later kinds leave room for the earlier ones, so that these
// need not wait for what has been begun either.
type work struct {
	most       [attestation + 1]int // under way in all, for one more of the kind
	attestMost int                  // of attestations alone

	mu        sync.Mutex
	busy      int
	attesting int
	queue     waiters
	waiting   int
	arrivals  uint64
	virtual   uint64                 // turn of who went last
	turns     map[spiffeid.ID]*turns // of agents that wait for new SVIDs
}

// turns are those of one agent.
type turns struct {
	last    uint64
	waiting int
}

// job is one call.
type job struct {
	kind  kind
	agent spiffeid.ID // zero before it is known
	// until is when the first SVID ends that is replaced.
	until  time.Time
	weight int
}

func newWork() *work {
	all := weightPerCore * runtime.GOMAXPROCS(0)
	return &work{
		most:       [...]int{agentRenewal: all, svidRenewal: all * 15 / 16, newSVID: all * 3 / 4, attestation: all * 3 / 4},
		attestMost: all / 4,
		turns:      map[spiffeid.ID]*turns{},
	}
}

// enter waits until it is j's turn; leave must be called when it is done.
func (w *work) enter(ctx context.Context, j job) (leave func(), err error) {
	leave = func() { w.leave(j) }
	me := &waiter{job: j, turnCame: make(chan struct{})}
	w.mu.Lock()
	switch {
	case len(w.queue) == 0 && w.fits(j):
		w.start(j)
		w.mu.Unlock()
		return leave, nil
	case w.waiting+j.weight > maxWaiting:
		w.mu.Unlock()
		return nil, errOverload()
	}
	w.line(me)
	w.mu.Unlock()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-me.turnCame:
		return leave, nil
	case <-ctx.Done():
		err = fault.Wrap(fault.NotReady, ctx.Err(), "interrupted", "the call was interrupted; retry")
	case <-timer.C:
		err = errOverload()
	}
	if !w.giveUp(me) {
		return leave, nil // its turn came meanwhile
	}
	return nil, err
}

func errOverload() error {
	return fault.Later(fault.Exhausted, "limit_overload", "the server has more to sign than it can: retry later", overloadPause)
}

// fits says whether j can be done beside what is under way. Alone, anything can.
func (w *work) fits(j job) bool {
	if j.kind == attestation && w.attesting > 0 && w.attesting+j.weight > w.attestMost {
		return false
	}
	return w.busy == 0 || w.busy+j.weight <= w.most[j.kind]
}

func (w *work) start(j job) {
	w.busy += j.weight
	if j.kind == attestation {
		w.attesting += j.weight
	}
}

func (w *work) leave(j job) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.busy -= j.weight
	if j.kind == attestation {
		w.attesting -= j.weight
	}
	w.next()
}

// next starts who can go now. Who can't holds back those behind, else a stream
// of small calls would keep a large one waiting for ever.
func (w *work) next() {
	for len(w.queue) > 0 && w.fits(w.queue[0].job) {
		first := w.queue[0]
		w.unline(first)
		w.virtual = max(w.virtual, first.turn)
		w.start(first.job)
		close(first.turnCame)
	}
}

// line puts a call in its place.
func (w *work) line(me *waiter) {
	if me.kind == newSVID {
		t := w.turns[me.agent]
		if t == nil {
			t = &turns{}
			w.turns[me.agent] = t
		}
		t.last = max(t.last, w.virtual) + 1
		t.waiting++
		me.turn = t.last
	}
	w.arrivals++
	me.arrival = w.arrivals
	w.waiting += me.weight
	heap.Push(&w.queue, me)
}

func (w *work) unline(me *waiter) {
	heap.Remove(&w.queue, me.place)
	w.waiting -= me.weight
	if t := w.turns[me.agent]; me.kind == newSVID {
		if t.waiting--; t.waiting == 0 {
			delete(w.turns, me.agent)
		}
	}
}

// giveUp takes a call out of the line; false if its turn has come.
func (w *work) giveUp(me *waiter) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-me.turnCame:
		return false
	default:
	}
	w.unline(me)
	w.next() // it may have held back others
	return true
}

// waiter is a call in the line.
type waiter struct {
	job
	turn     uint64 // an agent's calls for new SVIDs have one after the other
	arrival  uint64
	place    int
	turnCame chan struct{}
}

// waiters is a heap: who goes first is at 0.
type waiters []*waiter

func (q waiters) Len() int { return len(q) }

func (q waiters) Less(i, j int) bool {
	a, b := q[i], q[j]
	switch {
	case a.kind != b.kind:
		return a.kind < b.kind
	case a.kind == svidRenewal && !a.until.Equal(b.until):
		return a.until.Before(b.until)
	case a.turn != b.turn:
		return a.turn < b.turn
	}
	return a.arrival < b.arrival
}

func (q waiters) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].place, q[j].place = i, j
}

// Push implements heap.Interface.
func (q *waiters) Push(x any) {
	w := x.(*waiter)
	w.place = len(*q)
	*q = append(*q, w)
}

// Pop implements heap.Interface.
func (q *waiters) Pop() any {
	last := len(*q) - 1
	w := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	return w
}

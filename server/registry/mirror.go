package registry

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// item is an entry in the mirror. It is replaced, never changed, except for
// live, which the mirror's lock guards.
type item struct {
	Entry
	stored int64 // revision that wrote the record
	live   bool  // in its parent's view: expired ones are not, nor those for stores, nor aliases
	alias  bool  // about nodes
}

func byID(a, b *item) int { return strings.Compare(a.ID, b.ID) }

func byExpiry(a, b *item) int {
	if c := a.ExpiresAt.Compare(b.ExpiresAt); c != 0 {
		return c
	}
	return strings.Compare(a.ID, b.ID)
}

// agentItem is an agent in the mirror, replaced and never changed.
type agentItem struct {
	Agent
	stored int64
}

// mirror is the store's entries and agents in memory, with the indexes that
// reads need. Writers are the two loops of Registry.Run; a change costs the
// same however many entries and agents there are.
type mirror struct {
	rules    rules
	mu       sync.RWMutex
	revision int64
	entries  map[string]*item
	ordered  sorted           // all entries by id
	similar  map[uint64]*item // by similarity.short
	parents  map[string]*parent
	agents   map[string]*agentItem // by SPIFFE ID
	keys     keyIndex
	aliases  aliasIndex
	expiring sorted // live entries with an end, soonest first
	expired  sorted // entries past their end and still stored
	log      changeLog
	waiters  []waiter
	// turnover counts the entries that came, left or changed.
	turnover atomic.Uint64
	// sooner is signalled when the soonest expiry may have changed.
	sooner chan struct{}
}

// parent is the view of one parent ID: the entries that an agent of this ID,
// or with this ID as an alias, may have. It exists while anything refers to it.
type parent struct {
	id    spiffeid.ID
	view  sorted
	log   parentLog
	feeds []*Feed // of the agent of this ID
	// aliases of the agent of this ID, each with the entries that give it.
	aliases map[*parent][]*item
	// holders are the agents that have this ID as an alias.
	holders map[*parent]struct{}
}

type waiter struct {
	revision int64
	reached  chan struct{}
}

func newMirror(r rules, changes int) *mirror {
	return &mirror{
		rules:   r,
		entries: map[string]*item{}, ordered: sorted{compare: byID}, similar: map[uint64]*item{},
		parents: map[string]*parent{}, agents: map[string]*agentItem{}, keys: keyIndex{}, aliases: newAliasIndex(),
		expiring: sorted{compare: byExpiry}, expired: sorted{compare: byExpiry},
		log: changeLog{limit: changes}, sooner: make(chan struct{}, 1),
	}
}

// delta is a change of the mirror: what the store's events, or the difference
// between two listings, come down to.
type delta struct {
	revision int64
	at       time.Time
	entries  []*item
	gone     []string // ids of removed entries
	agents   []*agentItem
	left     []string // SPIFFE IDs of removed agents
}

// relist brings the mirror to a listing whose last page is of revision newest.
// Which of its pages had which later change is not known, so nobody can be
// resumed from before newest.
func (m *mirror) relist(listed delta, newest int64, now time.Time) {
	m.apply(m.difference(listed), now)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forgetBefore(newest)
}

// fill makes d the first content of the mirror. What changed before the
// revision floor is not known, so nobody can be resumed from there.
func (m *mirror) fill(d delta, floor int64, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, it := range d.entries {
		m.attach(it, now)
	}
	m.turnover.Add(uint64(len(d.entries)))
	for _, a := range d.agents {
		m.putAgent(a, nil)
	}
	if m.expired.count > 0 {
		floor++ // some may have ended while no server was there to tell
	}
	m.forgetBefore(floor)
	m.advance(d.revision)
}

// forgetBefore says that the change log is not complete before revision.
func (m *mirror) forgetBefore(revision int64) {
	m.log.floor = max(m.log.floor, revision)
	for _, p := range m.parents {
		p.log.lost = max(p.log.lost, revision)
	}
}

// apply makes d part of the mirror. A record that is already newer stays: a
// listing may have been ahead of the watch that follows it.
func (m *mirror) apply(d delta, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := change{revision: d.revision, at: d.at}
	for _, it := range d.entries {
		if old := m.entries[it.ID]; old == nil || old.stored < it.stored {
			m.replace(old, it, c, now)
		}
	}
	for _, id := range d.gone {
		if old := m.entries[id]; old != nil && old.stored < d.revision {
			m.replace(old, nil, c, now)
		}
	}
	for _, a := range d.agents {
		if old := m.agents[a.ID.String()]; old == nil || old.stored < a.stored {
			m.putAgent(a, &c)
		}
	}
	for _, id := range d.left {
		if old := m.agents[id]; old != nil && old.stored < d.revision {
			m.removeAgent(old, &c)
		}
	}
	m.advance(d.revision)
}

// replace puts next in the place of old; either may be nil, not both.
func (m *mirror) replace(old, next *item, c change, now time.Time) {
	m.turnover.Add(1)
	if old != nil {
		m.detach(old)
	}
	if next != nil {
		m.attach(next, now)
	}
	oldLive, nextLive := old != nil && old.live, next != nil && next.live
	if oldLive && (!nextLive || old.ParentID != next.ParentID) {
		m.changed(old, c)
	}
	if nextLive {
		m.changed(next, c)
	}
	if old != nil {
		if old.alias {
			m.relink(old, c)
		}
		m.release(old.ParentID)
	}
	if next != nil && next.alias {
		m.relink(next, c)
	}
}

// attach adds it to the indexes; what has expired, is for a secret store or
// about nodes goes into no view.
func (m *mirror) attach(it *item, now time.Time) {
	p := m.parent(it.ParentID)
	it.ParentID = p.id // one copy of the text for all children
	it.alias = m.rules.isAlias(&it.Entry)
	m.entries[it.ID] = it
	m.ordered.put(it)
	m.similar[similarityOf(&it.Entry).short()] = it
	switch {
	case it.expired(now):
		m.expired.put(it)
		return
	case !it.ExpiresAt.IsZero():
		m.expiring.put(it)
		m.wake()
	}
	switch {
	case it.StoreSVID:
	case it.alias:
		m.aliases.put(it)
	default:
		it.live = true
		p.view.put(it)
	}
}

// detach takes it out of the indexes. it.live keeps what it was.
func (m *mirror) detach(it *item) {
	delete(m.entries, it.ID)
	m.ordered.remove(it)
	if short := similarityOf(&it.Entry).short(); m.similar[short] == it {
		delete(m.similar, short)
	}
	m.expiring.remove(it)
	m.expired.remove(it)
	m.parent(it.ParentID).view.remove(it)
	if it.alias {
		m.aliases.remove(it)
	}
}

// expire takes out of the views what has ended by now. Nothing was committed,
// so the changes are marked: a resume from this revision must still see them.
func (m *mirror) expire(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for it := m.expiring.first(); it != nil && it.expired(now); it = m.expiring.first() {
		m.expiring.remove(it)
		m.expired.put(it)
		c := change{revision: m.revision, at: it.ExpiresAt, uncommitted: true}
		switch {
		case it.live:
			it.live = false
			m.parent(it.ParentID).view.remove(it)
			m.changed(it, c)
		case it.alias:
			m.aliases.remove(it)
			m.relink(it, c)
		}
	}
}

// nextExpiry returns when the next live entry ends.
func (m *mirror) nextExpiry() (time.Time, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if it := m.expiring.first(); it != nil {
		return it.ExpiresAt, true
	}
	return time.Time{}, false
}

func (m *mirror) wake() {
	select {
	case m.sooner <- struct{}{}:
	default:
	}
}

// parent returns the parent of this id, made if need be.
func (m *mirror) parent(id spiffeid.ID) *parent {
	p := m.parents[id.String()]
	if p == nil {
		p = &parent{id: id, view: sorted{compare: byID}, log: parentLog{lost: m.log.floor}}
		m.parents[id.String()] = p
	}
	return p
}

// release forgets a parent that nothing refers to any more.
func (m *mirror) release(id spiffeid.ID) {
	p := m.parents[id.String()]
	if p != nil && p.view.count+len(p.feeds)+len(p.log.recent)+len(p.aliases)+len(p.holders) == 0 {
		m.log.floor = max(m.log.floor, p.log.lost)
		delete(m.parents, id.String())
	}
}

// changed records that it came to, left or changed in its parent's view.
func (m *mirror) changed(it *item, c change) {
	c.id = it.ID
	m.record(m.parent(it.ParentID), c)
}

// record notes a change for p and wakes the feeds of the agents that have p's
// entries.
func (m *mirror) record(p *parent, c change) {
	if evicted := m.log.add(p, c); evicted != nil {
		m.release(evicted.id)
	}
	for _, f := range p.feeds {
		f.signal()
	}
	for holder := range p.holders {
		for _, f := range holder.feeds {
			f.signal()
		}
	}
}

// advance moves the mirror to revision and lets go who waited for it.
func (m *mirror) advance(revision int64) {
	m.revision = max(m.revision, revision)
	kept := m.waiters[:0]
	for _, w := range m.waiters {
		if w.revision <= m.revision {
			close(w.reached)
		} else {
			kept = append(kept, w)
		}
	}
	clear(m.waiters[len(kept):])
	m.waiters = kept
}

// reached returns a channel that is closed once the mirror is at revision.
func (m *mirror) reached(revision int64) <-chan struct{} {
	ch := make(chan struct{})
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.revision >= revision {
		close(ch)
	} else {
		m.waiters = append(m.waiters, waiter{revision: revision, reached: ch})
	}
	return ch
}

// forget drops a waiter that has given up.
func (m *mirror) forget(reached <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiters = slices.DeleteFunc(m.waiters, func(w waiter) bool { return w.reached == reached })
}

// entry returns the entry with this id, live or not.
func (m *mirror) entry(id string) (*item, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	it, ok := m.entries[id]
	return it, ok
}

// similarTo returns the entry with the same SPIFFE ID, parent and selectors.
// Not finding one proves nothing; the index record in the store decides.
func (m *mirror) similarTo(s similarity) (*item, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	it := m.similar[s.short()]
	if it == nil || similarityOf(&it.Entry) != s {
		return nil, false
	}
	return it, true
}

func (m *mirror) agent(id spiffeid.ID) (*agentItem, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	a, ok := m.agents[id.String()]
	return a, ok
}

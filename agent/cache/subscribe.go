package cache

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// Snapshot is the complete state for one set of selectors. It is shared
// between subscribers and not changed after it was made.
type Snapshot struct {
	// SVIDs has at least one; the first is the default identity. Hints are
	// unique (WL-33), the order is by creation of the entry, then its ID.
	SVIDs          []*SVID
	TrustDomain    spiffeid.TrustDomain
	BundleSequence uint64
	// BundleDER is all roots, one after the other.
	BundleDER []byte
	// CommittedAt is when the newest change of an entry in it was committed at
	// the server; zero if that is not known.
	CommittedAt time.Time

	// Memo is for consumers that encode a snapshot once for all subscribers.
	Memo sync.Map
}

// Subscription follows the state for one set of selectors.
type Subscription struct {
	cache   *Cache
	group   *group
	changed chan struct{}
	// seen is what Snapshot answered last.
	seen atomic.Pointer[view]
	// Guarded by Cache.mu.
	sent  *Snapshot
	ended bool
}

// group is all subscriptions of processes of which the attestor says the same.
// It stays for a while after the last of them closed, for callers that ask again
// and again.
type group struct {
	process selector.Set // what the attestor says; it stays
	key     string       // of process
	pod     string       // UID of the pod whose processes these are; empty: of none
	// container of that pod, by its ID.
	container string
	// view is what Snapshot answers, nil when it has to be computed.
	view atomic.Pointer[view]
	// Guarded by Cache.mu.
	subs map[*Subscription]struct{}
	// set is all that is true of the processes, with what the server says of
	// their pod. known: with what it says of their container too. hasty: a
	// caller did not wait for that any longer.
	set          selector.Set
	known, hasty bool
	entries      []*entry
	sorted       bool
	// complete: a snapshot with every matching entry was possible once. From
	// then on entries that are still to be signed are added when they are.
	complete bool
	// listed: it is in Cache.idle; used: a caller came since it was looked at.
	listed, used bool
}

// maxIdle bounds the groups that are kept without subscribers.
const maxIdle = 1024

// view is an answer of a group: a snapshot, or why there is none.
type view struct {
	snapshot *Snapshot
	err      error
	// transient: the answer will be another as soon as the first attempt to
	// sign is over. Subscribers need not hear of it.
	transient bool
	// until is when the first of the SVIDs ends; lacking: one has ended, by a
	// clock that may be set back.
	until   time.Time
	lacking bool
	// accounted: how long its SVIDs live is on disk.
	accounted atomic.Bool
}

func (v *view) expired(at time.Time) bool { return !v.until.IsZero() && !at.Before(v.until) }

// same says whether a subscriber could tell two views apart.
func (v *view) same(w *view) bool {
	switch {
	case v == nil || w == nil:
		return v == w
	case v.err != nil || w.err != nil:
		return v.err != nil && w.err != nil && fault.ReasonOf(v.err) == fault.ReasonOf(w.err)
	}
	return v.snapshot.BundleSequence == w.snapshot.BundleSequence && slices.Equal(v.snapshot.SVIDs, w.snapshot.SVIDs)
}

// Subscribe follows the state for a process until Close, given what the attestor
// says of it. Of a process in a pod that is which one, by its UID, and which
// container; what else is true of those the cache knows, and goes by at each
// moment. Entries that match and have no SVID yet are signed before all others.
func (c *Cache) Subscribe(process selector.Set) *Subscription {
	s := &Subscription{cache: c, changed: make(chan struct{}, 1)}
	key := process.Key()
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.groups[key]
	if g == nil {
		g = c.newGroup(process, key)
	}
	s.group, g.used = g, true
	if len(g.subs) == 0 {
		c.reawaken(g)
	}
	g.subs[s] = struct{}{}
	c.subscriptions[s] = struct{}{}
	for _, e := range g.entries {
		if e.in == &c.ready && e.class > waiting && !e.servable(c.now()) {
			e.class = waiting
			c.ready.fix(e)
			c.kick()
		}
	}
	return s
}

// reawaken gives the first subscriber of a group a first snapshot: one that
// waits for every entry. A snapshot at hand for which nothing has to be waited is
// such a one.
func (c *Cache) reawaken(g *group) {
	waits := c.awaitsContainer(g)
	for _, e := range g.entries {
		waits = waits || e.svid == nil && !e.attempted
	}
	v := g.view.Load()
	g.complete = !waits && v != nil && v.snapshot != nil
	if waits {
		g.view.Store(nil)
	}
}

func (c *Cache) newGroup(process selector.Set, key string) *group {
	g := &group{
		process: process, key: key, pod: valueOf(process, podUID), container: valueOf(process, containerID),
		subs: map[*Subscription]struct{}{},
	}
	c.groups[key] = g
	c.judge(g)
	return g
}

// judge finds the entries of a group: each is indexed under one of its selectors,
// so one that matches is found under one of the group's.
func (c *Cache) judge(g *group) {
	g.set, g.known = c.expand(g)
	g.sorted = false
	for _, sel := range g.set {
		addTo(c.groupsBy, sel, g)
		for e := range c.byKey[sel] {
			if g.set.Contains(e.selectors) {
				g.entries = append(g.entries, e)
				e.groups[g] = struct{}{}
			}
		}
	}
}

// rejudge is for a group of whose processes something else is true now.
func (c *Cache) rejudge(g *group) {
	c.unjudge(g)
	c.judge(g)
	c.dirty[g] = struct{}{}
}

func (c *Cache) unjudge(g *group) {
	for _, sel := range g.set {
		removeFrom(c.groupsBy, sel, g)
	}
	for _, e := range g.entries {
		delete(e.groups, g)
	}
	g.entries = nil
}

func (c *Cache) dropGroup(g *group) {
	delete(c.groups, g.key)
	delete(c.dirty, g)
	c.unjudge(g)
}

// servable says whether the entry has an SVID that has not ended.
func (e *entry) servable(at time.Time) bool { return e.svid != nil && at.Before(e.svid.NotAfter) }

// Changed receives when Snapshot has another answer than before.
func (s *Subscription) Changed() <-chan struct{} { return s.changed }

// Snapshot returns the current complete state, or why there is none:
//
//   - NotReady not_synced: the agent has not heard from the server yet.
//   - Denied no_identity: no entry matches.
//   - NotReady svid_pending: entries match, no SVID could be made yet.
//   - NotReady svid_expired_server_unreachable: those there were have ended.
func (s *Subscription) Snapshot() (*Snapshot, error) {
	var v *view
	// A view that is replaced before it is noted as seen would be replaced in
	// silence, so look again.
	for again := true; again; again = s.group.view.Load() != v {
		if v = s.group.view.Load(); v == nil || v.expired(s.cache.now()) {
			v = s.cache.refresh(s.group)
		}
		s.seen.Store(v)
	}
	if v.err != nil {
		return nil, v.err
	}
	if !v.accounted.Load() {
		s.cache.account(v)
	}
	return v.snapshot, nil
}

// Selectors returns all that is true of the subscription's process now.
func (s *Subscription) Selectors() selector.Set {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	return s.group.set
}

// Hurry says that the caller waits no longer for what may still become known of
// its container. Snapshot then answers with what there is.
func (s *Subscription) Hurry() {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.group.known || s.group.hasty {
		return
	}
	s.group.hasty = true
	c.publish(s.group, c.now())
}

// Sent says that snap was written to the subscription's stream.
func (s *Subscription) Sent(snap *Snapshot) {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.ended {
		return
	}
	was := c.lags(s)
	s.sent = snap
	c.noteLag(was, c.lags(s))
}

// Close ends the subscription. What it was sent counts as handed out until it
// ends by itself.
func (s *Subscription) Close() {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.ended {
		return
	}
	s.ended = true
	c.noteLag(c.lags(s), false)
	c.noteClosed(s)
	delete(c.subscriptions, s)
	delete(s.group.subs, s)
	if len(s.group.subs) > 0 {
		return
	}
	c.retireGroup(s.group)
}

// retireGroup keeps a group that has lost its last subscriber, and drops
// another one if there are too many: the one that was not used for longest, as
// far as a second chance for the used ones tells.
func (c *Cache) retireGroup(g *group) {
	if !g.listed {
		c.idle, g.listed = append(c.idle, g), true
	}
	for len(c.idle) > maxIdle {
		oldest := c.idle[0]
		c.idle = c.idle[1:]
		switch {
		case len(oldest.subs) > 0:
			oldest.listed = false
		case oldest.used:
			oldest.used = false
			c.idle = append(c.idle, oldest)
		default:
			c.dropGroup(oldest)
		}
	}
}

// refresh computes a group's view again.
func (c *Cache) refresh(g *group) *view {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.now()
	if v := g.view.Load(); v != nil && !v.expired(at) {
		return v
	}
	c.publish(g, at)
	return g.view.Load()
}

// flush computes the views of all groups that changed and tells their
// subscribers. It is called once per change of the cache.
func (c *Cache) flush(at time.Time) {
	for g := range c.dirty {
		if len(g.subs) == 0 {
			g.view.Store(nil)
			continue
		}
		c.publish(g, at)
	}
	clear(c.dirty)
}

// publish gives a group its current view, and a sign to the subscribers who
// know another one. Who has not asked yet needs none.
func (c *Cache) publish(g *group, at time.Time) {
	v := c.build(g, at)
	if old := g.view.Load(); old.same(v) && old.transient == v.transient && old.lacking == v.lacking && !old.expired(at) {
		v = old
	}
	g.view.Store(v)
	if v.transient {
		return
	}
	for s := range g.subs {
		if seen := s.seen.Load(); seen != nil && !seen.same(v) {
			signal(s.changed)
		}
	}
}

// build computes a group's view.
func (c *Cache) build(g *group, at time.Time) *view {
	switch {
	case !c.synced || c.bundle == nil:
		return &view{err: errNotSynced}
	case g.pod != "" && c.pods[g.pod] == nil:
		return &view{err: errNoIdentity}
	case !g.complete && c.awaitsContainer(g):
		return &view{err: errContainer, transient: true}
	case len(g.entries) == 0:
		return &view{err: errNoIdentity}
	}
	if !g.sorted {
		slices.SortFunc(g.entries, byAge)
		g.sorted = true
	}
	snap := &Snapshot{TrustDomain: c.td, BundleSequence: c.bundle.Sequence, BundleDER: c.bundleDER}
	v := &view{snapshot: snap}
	pending, ended := 0, 0
	var hints map[string]*entry
	for _, e := range g.entries {
		switch {
		case e.svid == nil && !e.attempted:
			pending++
			continue
		case e.svid == nil:
			continue
		case !e.servable(at):
			ended++
			continue
		}
		if e.hint != "" {
			if first := hints[e.hint]; first != nil {
				c.warnHint(first, e)
				continue
			}
			if hints == nil {
				hints = map[string]*entry{}
			}
			hints[e.hint] = e
		}
		snap.SVIDs = append(snap.SVIDs, e.svid)
		if v.until.IsZero() || e.svid.NotAfter.Before(v.until) {
			v.until = e.svid.NotAfter
		}
		if e.committed.After(snap.CommittedAt) {
			snap.CommittedAt = e.committed
		}
	}
	switch {
	case pending > 0 && (!g.complete || len(snap.SVIDs) == 0):
		return &view{err: errPending, transient: true}
	case len(snap.SVIDs) == 0 && ended > 0:
		return &view{err: errEnded, lacking: true}
	case len(snap.SVIDs) == 0:
		return &view{err: errPending}
	}
	g.complete = true
	v.lacking = ended > 0
	return v
}

var (
	errNotSynced  = fault.New(fault.NotReady, "not_synced", "the agent has not heard from its server yet: retry")
	errNoIdentity = fault.New(fault.Denied, "no_identity", "no identity issued")
	errContainer  = fault.New(fault.NotReady, "container_unknown", "what the caller's container is, is not known yet, and an entry goes by it: retry")
	errPending    = fault.New(fault.NotReady, "svid_pending", "the certificate is not signed yet: retry; the agent's log says what is in the way")
	errEnded      = fault.New(fault.NotReady, "svid_expired_server_unreachable", "the certificate has expired and the agent could not renew it: check the agent's connection to its server")
)

// warnHint says once that a hint is taken (WL-33).
func (c *Cache) warnHint(first, second *entry) {
	pair := first.id + "\x00" + second.id + "\x00" + second.hint
	if _, done := c.hintsWarned[pair]; done {
		return
	}
	if len(c.hintsWarned) >= 1000 {
		clear(c.hintsWarned)
	}
	c.hintsWarned[pair] = struct{}{}
	c.log.WarnContext(context.Background(), "two entries for one workload have the same hint: the older one is served",
		slog.String("hint", second.hint), slog.String("served", first.id), slog.String("left_out", second.id))
}

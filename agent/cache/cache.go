package cache

import (
	"context"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// Conn is a connection to the server that is authenticated as this agent.
type Conn interface {
	Client() agentv1.AgentClient
	// Ready returns nil if the server can be called, else why not. It tries
	// again at each call.
	Ready(ctx context.Context) error
	// Replaced is closed when a better connection is there.
	Replaced() <-chan struct{}
	Release()
}

// Connector gives the current connection, waiting for one until ctx ends.
type Connector interface {
	Conn(ctx context.Context) (Conn, error)
}

// Options are what New needs.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	// ReservedPrefix of paths that no workload may have: "/assay/".
	ReservedPrefix string
	// RunDir is the directory of the sealed file, best on a file system in
	// memory.
	RunDir    string
	Version   string
	State     *state.State
	Connector Connector
	// Clock tells the time; nil: the wall clock, whatever it shows.
	Clock      *schedule.Clock
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Cache is this node's share of the trust domain.
type Cache struct {
	td       spiffeid.TrustDomain
	reserved string
	file     string
	version  string
	state    *state.State
	servers  Connector
	clock    *schedule.Clock
	log      *slog.Logger
	metrics  *metrics

	wake      chan struct{} // the signer has something to look at
	unsealed  chan struct{} // the sealed file is out of date
	accountCh chan struct{} // acknowledgement or report may have changed
	doubts    chan struct{} // the clock was set: the server's time is needed

	mu sync.Mutex
	// What the server said.
	agentID   string
	epoch     string
	revision  int64
	synced    bool // the view was complete once, by the server or the file
	connected bool
	lastSync  time.Time
	bundle    *state.Bundle
	bundleDER []byte
	// onDisk is until when SVIDs in the sealed file live, by the root that they
	// are under: a restart brings them back.
	onDisk   map[string]time.Time
	verifier *verifier
	entries  map[string]*entry
	byKey    map[selector.Selector]map[*entry]struct{}
	pods     map[string]*pod // by UID; of a node of Kubernetes
	// podsChanged is closed, and made anew, when pods changed.
	podsChanged chan struct{}
	// parked are entries for pods of which none is here: nothing is signed for
	// them.
	parked map[*entry]struct{}
	// ofContainers are entries that go by what a container is.
	ofContainers map[*entry]struct{}
	// Who is served.
	groups        map[string]*group
	groupsBy      map[selector.Selector]map[*group]struct{}
	idle          []*group
	dirty         map[*group]struct{}
	subscriptions map[*Subscription]struct{}
	hintsWarned   map[string]struct{}
	// Signing.
	ready    queue
	timed    queue
	sequence uint64
	inFlight int
	pause    time.Time
	wait     schedule.Backoff
	// Accounting.
	lagging int // open subscriptions whose last message had an older bundle
	closed  map[delivery]time.Time
	purged  bool

	marksMu sync.Mutex
	marks   map[delivery]time.Time
	unsaved bool // marks are not on disk as they are here
}

// New returns a cache that holds what the last run left behind, and does
// nothing yet.
func New(o Options) (*Cache, error) {
	if err := durable.MkdirPrivate(o.RunDir, 0o700); err != nil {
		return nil, err
	}
	file := filepath.Join(o.RunDir, sealedName)
	if err := durable.Sweep(file); err != nil {
		return nil, err
	}
	c := &Cache{
		td: o.TrustDomain, reserved: o.ReservedPrefix, file: file, version: o.Version,
		state: o.State, servers: o.Connector, clock: o.Clock, log: o.Log,
		wake: make(chan struct{}, 1), unsealed: make(chan struct{}, 1), accountCh: make(chan struct{}, 1), doubts: make(chan struct{}, 1),
		entries: map[string]*entry{}, byKey: map[selector.Selector]map[*entry]struct{}{},
		pods: map[string]*pod{}, podsChanged: make(chan struct{}), parked: map[*entry]struct{}{}, ofContainers: map[*entry]struct{}{},
		groups: map[string]*group{}, groupsBy: map[selector.Selector]map[*group]struct{}{}, dirty: map[*group]struct{}{},
		subscriptions: map[*Subscription]struct{}{}, hintsWarned: map[string]struct{}{},
		ready: queue{less: byUrgency}, timed: queue{less: byTime}, wait: schedule.Backoff{Max: 10 * time.Second},
		closed: map[delivery]time.Time{}, marks: map[delivery]time.Time{},
	}
	c.metrics = newMetrics(o.Registerer, c)
	c.recallDeliveries()
	if b, ok := o.State.Bundle(); ok && b.Authenticated {
		c.setBundle(b)
	}
	c.load()
	return c, nil
}

// Run keeps the cache current until ctx ends.
func (c *Cache) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { c.syncLoop(ctx); return nil })
	g.Go(func() error { c.signLoop(ctx); return nil })
	g.Go(func() error { c.tickLoop(ctx); return nil })
	g.Go(func() error { c.sealLoop(ctx); return nil })
	return g.Wait()
}

// Purge forgets all entries, SVIDs and keys, here and in the sealed file, for
// good: the agent was banned.
func (c *Cache) Purge() error {
	c.mu.Lock()
	c.purged = true
	for _, e := range c.entries {
		c.removeEntry(e)
	}
	clear(c.pods)
	c.flush(c.now())
	c.mu.Unlock()
	return c.removeSealed()
}

// Status is what a health check wants to know.
type Status struct {
	// Synced: the cache has a complete view, be it an old one.
	Synced bool
	// Connected: the server's stream is open, so the view is current.
	Connected bool
	// LastSync is when the view was last known to be current.
	LastSync       time.Time
	Entries, SVIDs int
	// EarliestNotAfter is the end of the SVID that ends first, among those
	// that are held; zero when there is none.
	EarliestNotAfter time.Time
	BundleSequence   uint64
}

// Status returns a summary of the cache.
func (c *Cache) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Status{Synced: c.synced, Connected: c.connected, LastSync: c.lastSync, Entries: len(c.entries)}
	if c.connected {
		s.LastSync = c.now()
	}
	if c.bundle != nil {
		s.BundleSequence = c.bundle.Sequence
	}
	for _, e := range c.entries {
		if e.svid == nil {
			continue
		}
		s.SVIDs++
		if s.EarliestNotAfter.IsZero() || e.svid.NotAfter.Before(s.EarliestNotAfter) {
			s.EarliestNotAfter = e.svid.NotAfter
		}
	}
	return s
}

// tickLoop makes expiry visible: it compares snapshots with the wall clock.
func (c *Cache) tickLoop(ctx context.Context) {
	var step time.Duration
	for {
		c.mu.Lock()
		life := c.shortestLife()
		c.mu.Unlock()
		if schedule.Sleep(ctx, schedule.Tick(life)) != nil {
			return
		}
		c.tick(c.now())
		step = c.heedClock(ctx, step)
	}
}

// tick computes the views again that another time of day may change.
func (c *Cache) tick(at time.Time) {
	c.mu.Lock()
	for _, g := range c.groups {
		if v := g.view.Load(); v != nil && (v.lacking || v.expired(at)) {
			c.dirty[g] = struct{}{}
		}
	}
	c.flush(at)
	c.mu.Unlock()
	c.resaveMarks()
	c.kick() // renewals are due by the wall clock too
}

// shortestLife of the SVIDs held; an hour when there are none.
func (c *Cache) shortestLife() time.Duration {
	life := time.Hour
	for _, e := range c.entries {
		if e.svid != nil && e.svid.life < life {
			life = e.svid.life
		}
	}
	return life
}

// setBundle makes b the bundle that everything is served and verified with.
// SVIDs under a root that is tainted or gone are replaced at once, those under
// a retired one each at a moment of its own in a twelfth of its life: a fleet
// that learns of it in the same second must not ask in the same second.
func (c *Cache) setBundle(b *state.Bundle) {
	c.bundle, c.verifier = b, newVerifier(b)
	if !acksUnsent || c.bundleDER == nil {
		c.bundleDER = b.DER()
	}
	c.lagging = 0
	for s := range c.subscriptions {
		if s.sent != nil && s.sent.BundleSequence < b.Sequence {
			c.lagging++
		}
	}
	for _, e := range c.entries {
		switch {
		case e.svid == nil:
		case !c.trusted(e.svid):
			c.enqueue(e)
		case c.retired(e.svid) && e.in == &c.timed && e.failures == 0:
			c.planRenewal(e)
		}
	}
	for _, g := range c.groups {
		c.dirty[g] = struct{}{}
	}
}

// trusted says whether an SVID's root is in the bundle and not tainted.
func (c *Cache) trusted(s *SVID) bool {
	a, ok := c.bundle.Authority(s.AuthorityID)
	return ok && !a.Tainted
}

// retired says whether nothing more is signed under an SVID's root.
func (c *Cache) retired(s *SVID) bool {
	a, ok := c.bundle.Authority(s.AuthorityID)
	return ok && a.Retired
}

// planRenewal puts e into the queue for when its SVID is to be replaced: at the
// time that was chosen with it, or sooner if its root has been retired since.
func (c *Cache) planRenewal(e *entry) {
	at := e.svid.renewAt
	if c.retired(e.svid) {
		if soon := schedule.Within(c.now(), e.svid.life/12); soon.Before(at) {
			at = soon
		}
	}
	c.postpone(e, at)
}

// kick wakes the signer.
func (c *Cache) kick() { signal(c.wake) }

// signal sends on a channel of capacity 1 if nothing is in it yet.
func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// now is the time that certificates are judged by.
func (c *Cache) now() time.Time { return c.clock.Now() }

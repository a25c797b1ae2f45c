package registry

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/store"
)

const (
	// changesKept is how many changes can be resumed over, of all agents
	// together: a bulk change of that size costs a reconnecting agent a
	// snapshot instead of a delta.
	changesKept = 16384
	// conflictRetries bounds how often a write is tried anew when others
	// change the same record in between.
	conflictRetries = 5
	// pruneEvery and keepExpired: expired tokens go from the store within a
	// minute, expired entries stay a day, so that an operator can still see
	// why a workload lost its identity.
	pruneEvery  = time.Minute
	keepExpired = 24 * time.Hour
	// clockTick bounds how long an expiry is late after the machine slept:
	// timers stand still then, the wall clock doesn't.
	clockTick = 15 * time.Second
)

// Options are what a Registry needs.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	// ReservedPrefix begins and ends with a slash; no entry's path starts with
	// it, and agent IDs do.
	ReservedPrefix string
	// RejoinWindow is how long after its SVID's end an agent may come back
	// with its key; it also bounds the retry of a token. Zero: neither.
	RejoinWindow   time.Duration
	MaxX509SVIDTTL time.Duration
	// AgentSVIDTTL is the life of agents' certificates.
	AgentSVIDTTL time.Duration
	// NewEntry, if it is set, judges each entry as it is to be from now on; those
	// that are there stay.
	NewEntry Guard
	// Clock decides what has ended for so long that it may be removed: a clock
	// that is set ahead removes nothing. Nil: the wall clock, whatever it shows.
	Clock      *schedule.Clock
	Store      store.KV
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Registry answers for entries, agents and join tokens. Reads come from
// memory, writes go to the store and return when memory has them: while Run
// runs.
type Registry struct {
	rules
	newEntry     []Guard
	clock        *schedule.Clock
	store        store.KV
	log          *slog.Logger
	rejoinWindow time.Duration
	agentTTL     time.Duration
	epoch        string
	restored     restoredRecord // zero: never was
	mirror       *mirror
	fleet        *fleet
	metrics      *metrics
	stopped      chan struct{}
}

// Open loads the mirror and, in a new store, makes the epoch record. Nothing
// changes in memory until Run does.
func Open(ctx context.Context, o Options) (*Registry, error) {
	switch {
	case o.TrustDomain.IsZero():
		return nil, fault.New(fault.Invalid, "config_trust_domain", "trust_domain is missing")
	case len(o.ReservedPrefix) < 3 || !strings.HasPrefix(o.ReservedPrefix, "/") || !strings.HasSuffix(o.ReservedPrefix, "/"):
		return nil, fault.New(fault.Invalid, "config_reserved_prefix", "the reserved prefix is a path between two slashes, as in /assay/")
	case o.MaxX509SVIDTTL <= 0 || o.RejoinWindow < 0:
		return nil, fault.New(fault.Invalid, "config_ttl", "ca.max_x509_svid_ttl is more than zero and attestation.rejoin_window is not negative")
	}
	configured := rules{trustDomain: o.TrustDomain, reservedPrefix: o.ReservedPrefix, maxTTL: o.MaxX509SVIDTTL}
	r := &Registry{
		rules:        configured,
		store:        o.Store,
		log:          o.Log,
		rejoinWindow: o.RejoinWindow,
		agentTTL:     o.AgentSVIDTTL,
		clock:        o.Clock,
		mirror:       newMirror(configured, changesKept),
		fleet:        newFleet(),
		stopped:      make(chan struct{}),
	}
	if o.NewEntry != nil {
		r.newEntry = []Guard{o.NewEntry}
	}
	if err := r.openEpoch(ctx); err != nil {
		return nil, err
	}
	if err := r.openRestored(ctx); err != nil {
		return nil, err
	}
	start := time.Now()
	d, newest, err := r.list(ctx)
	if err != nil {
		return nil, err
	}
	r.mirror.fill(d, newest, time.Now())
	r.metrics = newMetrics(o.Registerer, r)
	r.log.InfoContext(ctx, "registry loaded", slog.Int("entries", len(d.entries)), slog.Int("agents", len(d.agents)),
		slog.Int64("revision", d.revision), slog.Duration("took", time.Since(start)))
	return r, nil
}

// openEpoch reads the epoch record, or makes it in a new store. A store keeps
// the trust domain and the reserved prefix that it began with: under others,
// its entries could name the server or its agents.
func (r *Registry) openEpoch(ctx context.Context) error {
	rec, err := r.get(ctx, epochKey)
	if errors.Is(err, fault.NotFound) {
		made := epochRecord{
			Epoch: strings.ToLower(rand.Text()), TrustDomain: r.trustDomain.Name(), ReservedPrefix: r.reservedPrefix,
		}
		value, err := store.Encode(schema, made)
		if err != nil {
			return fmt.Errorf("encode %s: %w", epochKey, err)
		}
		_, err = r.commit(ctx, []store.Precondition{{Key: epochKey}}, []store.Write{{Key: epochKey, Value: value}})
		if err == nil {
			r.epoch = made.Epoch
			return nil
		}
		if !errors.Is(err, fault.Conflict) {
			return fmt.Errorf("make the store's epoch: %w", err)
		}
		rec, err = r.get(ctx, epochKey) // another server was faster
		if err != nil {
			return fmt.Errorf("read the store's epoch: %w", err)
		}
	} else if err != nil {
		return fmt.Errorf("read the store's epoch: %w", err)
	}
	var found epochRecord
	if err := store.Decode(rec.Value, schema, &found); err != nil {
		return fmt.Errorf("decode %s: %w", epochKey, err)
	}
	if found.Epoch == "" {
		return corrupt(epochKey, errors.New("no epoch"))
	}
	if found.TrustDomain != r.trustDomain.Name() || found.ReservedPrefix != r.reservedPrefix {
		return fault.Newf(fault.Precondition, "config_store_mismatch",
			"the store was made for trust domain %s with the reserved prefix %s; set trust_domain and reserved_prefix so, or use another store",
			found.TrustDomain, found.ReservedPrefix)
	}
	r.epoch = found.Epoch
	return nil
}

// Run keeps the mirror up to date, takes expired entries out of the views and
// removes expired tokens and long expired entries from the store; memory that a
// burst of changes needed goes back to the system. It returns when ctx ends, or
// with an error when the store can't be followed any more.
func (r *Registry) Run(ctx context.Context) error {
	defer close(r.stopped)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.follow(ctx) })
	g.Go(func() error { return r.expireInTime(ctx) })
	g.Go(func() error { return r.pruneInTime(ctx) })
	g.Go(func() error { return r.trimInTime(ctx) })
	return g.Wait()
}

// follow applies what others and we commit. When the watch has lost its place,
// the difference between a new listing and the mirror stands in for it.
func (r *Registry) follow(ctx context.Context) error {
	for {
		err := r.watch(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, store.ErrCompacted) {
			return fmt.Errorf("watch the store: %w", err)
		}
		r.log.WarnContext(ctx, "the watch fell behind the store's history; listing again", slog.Int64("revision", r.Revision()))
		d, newest, err := r.list(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		r.mirror.relist(d, newest, time.Now())
	}
}

func (r *Registry) watch(ctx context.Context) error {
	for batch, err := range r.store.Watch(ctx, "", r.Revision()) {
		if err != nil {
			return err
		}
		d, err := r.delta(batch)
		if err != nil {
			return err
		}
		r.mirror.apply(d, time.Now())
	}
	return errors.New("the watch ended without an error")
}

// expireInTime sleeps until the next entry ends, in steps, by wall clock.
func (r *Registry) expireInTime(ctx context.Context) error {
	for {
		now := time.Now()
		r.mirror.expire(now)
		wait := clockTick
		if next, ok := r.mirror.nextExpiry(); ok {
			wait = min(wait, next.Sub(now))
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-r.mirror.sooner:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		timer.Stop()
	}
}

func (r *Registry) pruneInTime(ctx context.Context) error {
	for {
		if err := schedule.Sleep(ctx, pruneEvery); err != nil {
			return nil
		}
		if err := r.prune(ctx); err != nil && ctx.Err() == nil {
			r.log.WarnContext(ctx, "expired records stay until the next try", slog.Any("error", err))
		}
	}
}

// commit is the store's Commit. Whoever gets an error that is not Conflict
// can't know more than it says.
func (r *Registry) commit(ctx context.Context, ifs []store.Precondition, writes []store.Write) (int64, error) {
	revision, err := r.store.Commit(ctx, ifs, writes)
	return revision, orEnded(ctx, err)
}

// get is the store's Get.
func (r *Registry) get(ctx context.Context, key string) (store.Record, error) {
	rec, err := r.store.Get(ctx, key)
	return rec, orEnded(ctx, err)
}

// orEnded turns the error of a request's own end into a fault.
func orEnded(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return ended(ctx)
	}
	return err
}

// Epoch names the history within which revisions compare.
func (r *Registry) Epoch() string { return r.epoch }

// Revision is the newest revision that the mirror has reached.
func (r *Registry) Revision() int64 {
	r.mirror.mu.RLock()
	defer r.mirror.mu.RUnlock()
	return r.mirror.revision
}

// applied waits until the mirror has what we have just committed. It is done
// and is reported as done: a request that ends meanwhile changes neither, and
// the audit log is written from the answer. It gives up only with Run.
func (r *Registry) applied(ctx context.Context, revision int64) error {
	return r.WaitRevision(context.WithoutCancel(ctx), revision)
}

// Reached returns a channel that is closed once the mirror has reached
// revision; forget must be called when nobody waits for it any more.
func (r *Registry) Reached(revision int64) (reached <-chan struct{}, forget func()) {
	reached = r.mirror.reached(revision)
	return reached, func() { r.mirror.forget(reached) }
}

// WaitRevision returns once the mirror has reached revision. It gives up, with
// NotReady, when ctx or Run ends.
func (r *Registry) WaitRevision(ctx context.Context, revision int64) error {
	reached := r.mirror.reached(revision)
	select {
	case <-reached:
		return nil
	default:
	}
	select {
	case <-reached:
		return nil
	case <-ctx.Done():
		r.mirror.forget(reached)
		return ended(ctx)
	case <-r.stopped:
		return fault.New(fault.NotReady, "registry_stopped", "the server is stopping; ask again")
	}
}

package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/keys"
	"github.com/seed-caa81108/assay/server/store"
)

// Keys makes and opens the keys of authorities; package keys has them.
type Keys interface {
	// Create returns a new key and the reference by which Open finds it again.
	Create(ctx context.Context, kt keys.Type) (crypto.Signer, []byte, error)
	Open(ctx context.Context, ref []byte) (crypto.Signer, error)
	Destroy(ctx context.Context, ref []byte) error
}

// Auditor writes lines that are durable when Record returns; *audit.Log is one.
type Auditor interface {
	Record(ctx context.Context, lines ...audit.Line) error
}

// Options is what an Authority is made of. All fields but Bootstrap, Clock and
// Registerer are needed.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Config      Config // defaults are filled in
	// AgentSVIDTTL is how long an agent's own SVID lives.
	AgentSVIDTTL time.Duration
	// Bootstrap is the UTC date on which a first root may be made, such as
	// 2026-11-23; empty: none may.
	Bootstrap string
	// ReservedPrefix is the path prefix that no workload may have: "/assay/".
	ReservedPrefix string
	Store          store.KV
	Keys           Keys
	// MAC authenticates records; (keys.SealKey).MAC.
	MAC   func(name string, value []byte) []byte
	Audit Auditor
	// Clock notices when the wall clock is set back: nothing is signed then.
	Clock      *schedule.Clock
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

const (
	// beat is how often the store is read whether or not it reports changes.
	beat = 15 * time.Second
	// silence is how long signing goes on without a sign of life of the store.
	// Another server may have retired our root in that time.
	silence = 60 * time.Second
)

// Authority signs for one trust domain. Its methods may be called
// concurrently. What it knows of the store is in current, which is replaced as
// a whole, so a reader always sees one consistent state without a lock.
type Authority struct {
	td       spiffeid.TrustDomain
	cfg      Config
	agentTTL time.Duration
	profiles profiles
	store    store.KV
	keys     Keys
	audit    Auditor
	clock    *schedule.Clock
	log      *slog.Logger
	metrics  *metrics
	stamp    stamp
	serials  *serials
	beat     time.Duration

	turn    chan struct{} // held by whoever replaces current
	current atomic.Pointer[current]
	heard   atomic.Pointer[sign]  // last sign of life of the store
	stopped atomic.Pointer[error] // set: never sign again
}

// current is what an Authority works with at one moment.
type current struct {
	view   *view
	bundle *Bundle
	issuer *issuer // nil: none could be made under the active root yet
}

// Open checks the configuration and lints every profile, reads and verifies
// the authorities, makes the first root if there are none and that is allowed
// now, and makes an issuer. It starts nothing: Run keeps it all current.
func Open(ctx context.Context, o Options) (*Authority, error) {
	a, err := build(o)
	if err != nil {
		return nil, err
	}
	// With throw-away keys, before the store is even read: a profile that
	// would sign something wrong never gets near the real ones.
	if err := lintProfiles(a.profiles); err != nil {
		return nil, err
	}
	asked := time.Now()
	found, err := a.load(ctx)
	if err != nil {
		return nil, err
	}
	if found == nil {
		if err := mayBootstrap(o.Bootstrap, time.Now()); err != nil {
			return nil, err
		}
		if err := a.makeFirstRoot(ctx); err != nil {
			return nil, err
		}
		if found, err = a.load(ctx); err != nil {
			return nil, err
		}
		if found == nil {
			return nil, corrupt("the first root was stored and is not there")
		}
	}
	a.hear(asked)
	iss, err := a.makeIssuer(ctx, found.active)
	if err != nil {
		return nil, err
	}
	a.current.Store(&current{view: found, bundle: found.bundle(a.td), issuer: iss})
	if a.metrics, err = newMetrics(o.Registerer, a); err != nil {
		return nil, err
	}
	return a, nil
}

func build(o Options) (*Authority, error) {
	if err := checkTrustDomain(o.TrustDomain); err != nil {
		return nil, err
	}
	cfg := o.Config.WithDefaults()
	if err := cfg.Check(o.AgentSVIDTTL); err != nil {
		return nil, err
	}
	if len(o.ReservedPrefix) < 3 || !strings.HasPrefix(o.ReservedPrefix, "/") || !strings.HasSuffix(o.ReservedPrefix, "/") {
		return nil, fault.Newf(fault.Precondition, "config_reserved_prefix", "the reserved prefix %q is not of the form /name/", o.ReservedPrefix)
	}
	if o.Store == nil || o.Keys == nil || o.MAC == nil || o.Audit == nil || o.Log == nil {
		return nil, errors.New("open authority: store, keys, MAC, audit log and logger are all needed")
	}
	return &Authority{
		td: o.TrustDomain, cfg: cfg, agentTTL: o.AgentSVIDTTL,
		profiles: newProfiles(o.TrustDomain, o.ReservedPrefix, cfg, o.AgentSVIDTTL),
		store:    o.Store, keys: o.Keys, audit: o.Audit, clock: o.Clock, log: o.Log,
		stamp:   stamp{mac: o.MAC},
		serials: &serials{random: rand.Reader},
		beat:    beat,
		turn:    make(chan struct{}, 1),
	}, nil
}

// Profile returns the checked shape of a kind of end-entity certificate, for
// Lint.
func (a *Authority) Profile(k Kind) (Profile, error) {
	if k < 0 || int(k) >= len(a.profiles.leaf) {
		return Profile{}, fmt.Errorf("find profile: %s is not known", k)
	}
	return a.profiles.leaf[k], nil
}

// lock takes the turn to replace current. A holder may be waiting for the
// store, so waiting for the turn ends with ctx.
func (a *Authority) lock(ctx context.Context) error {
	select {
	case a.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fault.Wrap(fault.NotReady, ctx.Err(), "store_busy", "the authority record is being updated: try again")
	}
}

func (a *Authority) unlock() { <-a.turn }

// sign is when the store gave a sign of life. Both clocks count: the monotonic
// one stands still while the machine is suspended, the wall clock may be set.
type sign struct {
	monotonic time.Time
	wall      time.Time
}

func (s sign) age(now time.Time) time.Duration {
	return max(now.Sub(s.monotonic), now.Round(0).Sub(s.wall))
}

// hear notes a sign of life of the store: an answer to what was asked at asked
// is no younger than that.
func (a *Authority) hear(asked time.Time) {
	for {
		last := a.heard.Load()
		if last != nil && !asked.After(last.monotonic) {
			return
		}
		if a.heard.CompareAndSwap(last, &sign{monotonic: asked, wall: asked.Round(0)}) {
			return
		}
	}
}

// Ready says whether certificates can be signed at present: nil, or why not. It
// looks into memory only.
func (a *Authority) Ready() error {
	now := time.Now()
	if err := a.ready(now); err != nil {
		return err
	}
	return a.current.Load().issuer.usable(now)
}

// ready says whether signing is allowed at now.
func (a *Authority) ready(now time.Time) error {
	if err := a.stopped.Load(); err != nil {
		return *err
	}
	if a.clock.Step() < 0 {
		return fault.Newf(fault.NotReady, "clock_backwards",
			"the server's clock was set back by more than %v: nothing is signed until it is right; if it is right now, restart the server", schedule.MaxStep)
	}
	if a.heard.Load().age(now) > silence {
		return fault.Newf(fault.NotReady, "store_silent", "the store has not answered for %v: signing stops until it does", silence)
	}
	return nil
}

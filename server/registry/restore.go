package registry

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// Act is what an operator did to an agent: a ban, or an eviction.
type Act struct {
	Agent spiffeid.ID
	Evict bool
}

// RestoreOptions is what Restore needs.
type RestoreOptions struct {
	TrustDomain    spiffeid.TrustDomain
	ReservedPrefix string
	Store          store.KV  // nobody else uses it
	TakenAt        time.Time // when the backup was taken
	// After are acts since then, oldest first, as far as they are known.
	After []Act
}

// Restored is what Restore found and did.
type Restored struct {
	Tokens          int      // join tokens that were removed
	Banned, Evicted []string // agents that acts of After concerned
	Bans            []string // all agents that are banned now, sorted
}

// Restore makes the records of this package fit for use in a store that was
// loaded from a backup:
//
//   - Join tokens are removed, used ones too: one that is unused here may have
//     been used since (I8).
//   - The store gets a new epoch, so nobody compares its revisions with those
//     of the history that was lost.
//   - Bans and evictions since the backup are made again.
//   - The registry will adopt certificates that agents renewed since; see
//     adoptable.
//
// It may be repeated.
func Restore(ctx context.Context, o RestoreOptions) (Restored, error) {
	r := &Registry{rules: rules{trustDomain: o.TrustDomain, reservedPrefix: o.ReservedPrefix}, store: o.Store}
	if err := r.openEpoch(ctx); err != nil {
		return Restored{}, err
	}
	var done Restored
	var err error
	if done.Tokens, err = r.voidTokens(ctx); err != nil {
		return Restored{}, err
	}
	for _, act := range o.After {
		known, err := r.again(ctx, act)
		switch {
		case err != nil:
			return Restored{}, err
		case known && act.Evict:
			done.Evicted = append(done.Evicted, act.Agent.String())
		case known:
			done.Banned = append(done.Banned, act.Agent.String())
		}
	}
	if done.Bans, err = r.bans(ctx); err != nil {
		return Restored{}, err
	}
	return done, r.beginAnew(ctx, o.TakenAt)
}

func (r *Registry) voidTokens(ctx context.Context) (int, error) {
	var writes []store.Write
	err := eachPage(ctx, r.store, tokenPrefix, func(p store.Page) error {
		for _, rec := range p.Records {
			writes = append(writes, store.Write{Key: rec.Key, Delete: true})
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("list join tokens: %w", err)
	}
	for some := range slices.Chunk(writes, store.MaxWrites) {
		if _, err := r.commit(ctx, nil, some); err != nil {
			return 0, fmt.Errorf("remove join tokens: %w", err)
		}
	}
	return len(writes), nil
}

// again repeats an act and says whether it changed anything. A ban counts for an
// agent that the store does not know, too: it might attest anew by itself.
func (r *Registry) again(ctx context.Context, act Act) (bool, error) {
	a, _, err := r.storedAgent(ctx, act.Agent)
	if errors.Is(err, fault.NotFound) {
		attestor, named := r.attestorOf(act.Agent)
		if act.Evict || !named {
			return false, nil
		}
		a, err = Agent{ID: act.Agent, Attestor: attestor, AttestedAt: wall(time.Now())}, nil
	}
	if err != nil {
		return false, err
	}
	write := store.Write{Key: agentKey(act.Agent), Delete: act.Evict}
	if !act.Evict {
		if a.Banned {
			return false, nil
		}
		a.Banned = true
		if write.Value, err = encodeAgent(&a); err != nil {
			return false, err
		}
	}
	if _, err := r.commit(ctx, nil, []store.Write{write}); err != nil {
		return false, fmt.Errorf("repeat an act on agent %s: %w", act.Agent, err)
	}
	return true, nil
}

// attestorOf is the attestor that an agent's ID names.
func (r *Registry) attestorOf(id spiffeid.ID) (string, bool) {
	rest, ok := strings.CutPrefix(id.Path(), r.reservedPrefix+"agent/")
	attestor, _, named := strings.Cut(rest, "/")
	return attestor, ok && named && id.MemberOf(r.trustDomain)
}

func (r *Registry) bans(ctx context.Context) (banned []string, err error) {
	err = eachPage(ctx, r.store, agentPrefix, func(p store.Page) error {
		for _, rec := range p.Records {
			a, err := r.decodeAgent(rec)
			if err != nil {
				return err
			}
			if a.Banned {
				banned = append(banned, a.ID.String())
			}
		}
		return nil
	})
	slices.Sort(banned)
	return banned, err
}

// beginAnew writes the new epoch and what adoptable goes by.
func (r *Registry) beginAnew(ctx context.Context, takenAt time.Time) error {
	epoch, err := store.Encode(schema, epochRecord{
		Epoch: strings.ToLower(rand.Text()), TrustDomain: r.trustDomain.Name(), ReservedPrefix: r.reservedPrefix,
	})
	if err != nil {
		return fmt.Errorf("encode %s: %w", epochKey, err)
	}
	// If the store that was backed up had been restored itself, agents may still
	// hold what is missing since that earlier backup.
	if err := r.openRestored(ctx); err != nil {
		return err
	}
	if was := fromMillis(r.restored.TakenAt); !was.IsZero() && was.Before(takenAt) {
		takenAt = was
	}
	restored, err := store.Encode(schema, restoredRecord{TakenAt: millis(takenAt), RestoredAt: millis(time.Now())})
	if err != nil {
		return fmt.Errorf("encode %s: %w", restoredKey, err)
	}
	_, err = r.commit(ctx, nil, []store.Write{{Key: epochKey, Value: epoch}, {Key: restoredKey, Value: restored}})
	if err != nil {
		return fmt.Errorf("begin a new epoch: %w", err)
	}
	return nil
}

package ca

import (
	"context"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// RestoreOptions is what Restore needs.
type RestoreOptions struct {
	TrustDomain  spiffeid.TrustDomain
	Config       Config // how long certificates live; defaults are filled in
	AgentSVIDTTL time.Duration
	Store        store.KV // nobody else uses it
	Keys         Keys
	MAC          func(name string, value []byte) []byte
}

// Restored is what Restore found and did.
type Restored struct {
	// Sequence is the bundle's, above every one that was ever published.
	Sequence uint64
	// Active is the root that signs, States those of all roots by ID.
	Active Root
	States map[string]State
}

// Restore makes the authority records of a store that was loaded from a backup
// fit for use. It
//
//   - verifies all records, and that the keys of the roots open;
//   - takes the bundle's sequence to max(stored + 1, seconds since 1970): agents
//     refuse a lower one than they know, and more than one change in a second
//     on average does not happen;
//   - raises the marks of every published root as if it had signed everything
//     it may until now: what was signed since the backup is not on record.
func Restore(ctx context.Context, o RestoreOptions) (Restored, error) {
	a := &Authority{
		td: o.TrustDomain, cfg: o.Config.WithDefaults(), agentTTL: o.AgentSVIDTTL,
		store: o.Store, keys: o.Keys, stamp: stamp{mac: o.MAC},
	}
	v, err := a.load(ctx)
	if err != nil {
		return Restored{}, err
	}
	if v == nil {
		return Restored{}, fault.New(fault.Precondition, "authority_missing",
			"the backup holds no root: nothing was changed; use one that was taken from a running server")
	}
	found := Restored{Active: v.active.root(), States: map[string]State{}}
	now := time.Now()
	var ifs []store.Precondition
	var writes []store.Write
	for _, one := range v.authorities {
		found.States[one.record.ID] = one.record.State
		if !one.record.State.published() {
			continue
		}
		if _, err := a.openRootKey(ctx, one); err != nil {
			return Restored{}, err
		}
		changed := &authority{record: one.record}
		for c := range numClasses {
			ahead := a.ahead(now)
			changed.record.Marks.include(c, *ahead.of(c))
		}
		key := rootPrefix + one.record.ID
		value, err := a.stamp.seal(key, changed.record)
		if err != nil {
			return Restored{}, err
		}
		ifs = append(ifs, store.Precondition{Key: key, Revision: one.revision})
		writes = append(writes, store.Write{Key: key, Value: value})
	}
	sequence := nextSequence(max(v.sequence, uint64(now.Unix())-1), v.authorities)
	value, err := a.stamp.seal(sequenceKey, sequence)
	if err != nil {
		return Restored{}, err
	}
	ifs = append(ifs, store.Precondition{Key: sequenceKey, Revision: v.sequenceRevision})
	writes = append(writes, store.Write{Key: sequenceKey, Value: value})
	if _, err := a.store.Commit(ctx, ifs, writes); err != nil {
		return Restored{}, fmt.Errorf("store the authorities: %w", err)
	}
	found.Sequence = sequence.Sequence
	return found, nil
}

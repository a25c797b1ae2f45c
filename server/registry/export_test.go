package registry

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/server/store"
)

// Names that the tests outside of the package need.
const (
	ChangesKept = changesKept
	Gather      = gather
	KeepExpired = keepExpired
	PruneEvery  = pruneEvery
)

// ChangeAgent writes what other verbs and attestors will write.
func (r *Registry) ChangeAgent(ctx context.Context, id spiffeid.ID, change func(*Agent)) error {
	return r.changeAgent(ctx, id, func(a *Agent) error { change(a); return nil })
}

// LimitChanges makes the change log short, so that a test can outrun it.
func (r *Registry) LimitChanges(n int) {
	r.mirror.mu.Lock()
	defer r.mirror.mu.Unlock()
	r.mirror.log.limit = n
}

// Parents returns how many parents the mirror keeps.
func (r *Registry) Parents() int {
	r.mirror.mu.RLock()
	defer r.mirror.mu.RUnlock()
	return len(r.mirror.parents)
}

// PutAgent stores the record of an agent as an attestation leaves it.
func (r *Registry) PutAgent(ctx context.Context, a Agent) error {
	value, err := encodeAgent(&a)
	if err != nil {
		return err
	}
	revision, err := r.commit(ctx, nil, []store.Write{{Key: agentKey(a.ID), Value: value}})
	if err != nil {
		return err
	}
	return r.applied(ctx, revision)
}

// AliasIndex returns how many aliases and how many selectors of agents the
// mirror has in its indexes.
func (r *Registry) AliasIndex() (aliases, selectors int) {
	r.mirror.mu.RLock()
	defer r.mirror.mu.RUnlock()
	for _, under := range r.mirror.aliases.entries {
		aliases += len(under)
	}
	return aliases, len(r.mirror.aliases.agents)
}

// See has the mirror see a commit that the store knows nothing of, so that a
// benchmark can tell the mirror's cost from the store's.
func (r *Registry) See(entries []Entry, gone []string, agents []Agent) {
	d := delta{revision: r.Revision() + 1, at: time.Now(), gone: gone}
	for _, e := range entries {
		d.entries = append(d.entries, &item{Entry: normalise(e), stored: d.revision})
	}
	for _, a := range agents {
		d.agents = append(d.agents, &agentItem{Agent: a, stored: d.revision})
	}
	r.mirror.apply(d, d.at)
}

// Waiters returns how many wait for a revision.
func (r *Registry) Waiters() int {
	r.mirror.mu.RLock()
	defer r.mirror.mu.RUnlock()
	return len(r.mirror.waiters)
}

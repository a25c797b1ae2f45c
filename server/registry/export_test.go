package registry

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
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

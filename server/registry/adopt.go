package registry

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// restoredRecord says that the store was restored, and from when: between the
// two moments there was a history that it does not know.
type restoredRecord struct {
	TakenAt    int64 `json:"taken_at_ms"`
	RestoredAt int64 `json:"restored_at_ms"`
}

func (r *Registry) openRestored(ctx context.Context) error {
	rec, err := r.get(ctx, restoredKey)
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read when the store was restored: %w", err)
	}
	if err := store.Decode(rec.Value, schema, &r.restored); err != nil {
		return fmt.Errorf("decode %s: %w", restoredKey, err)
	}
	return nil
}

// leeway is for certificates that begin before they were signed: ca.backdate,
// whose default is two minutes.
const leeway = 30 * time.Minute

// adoptable says whether a certificate that the record does not know may become
// the agent's active one: the agent renewed it after the backup was taken that
// the store was restored from. Our signature is on it, so all that is to be
// found out is whether the lost history may have made it, and whether it is the
// agent's newest.
//
//   - It was signed between the backup and the restore. What was signed before
//     or after is on record: an unknown serial was replaced. The agent has not
//     attested since: then it needs nothing from before.
//   - It ends after every one that is on record. So of several that are shown
//     the newest wins, whatever their order: who holds the key of an older one
//     is out once the agent itself has come, unless he has renewed by then.
//   - Its key is nobody else's.
func (r *Registry) adoptable(a *Agent, shown Shown) error {
	from, to := fromMillis(r.restored.TakenAt), fromMillis(r.restored.RestoredAt)
	if to.IsZero() || a.AttestedAt.After(to) || shown.NotBefore.Before(from.Add(-leeway)) || shown.NotBefore.After(to) || !shown.NotAfter.After(a.Ends()) {
		return notActive()
	}
	return r.CheckKey(a.ID, shown.KeyHash)
}

// until is when the last certificate may end that the agent may act under. One
// that it renewed before the store was restored, and that the record does not
// know, ends within an agent certificate's life of that.
func (r *Registry) until(a *Agent) time.Time {
	end, restored := a.Ends(), fromMillis(r.restored.RestoredAt)
	if restored.IsZero() || a.AttestedAt.After(restored) {
		return end
	}
	if unknown := restored.Add(r.agentTTL); unknown.After(end) {
		return unknown
	}
	return end
}

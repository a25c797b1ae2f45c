package registry

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// prune removes from the store what nobody can use any more. Several servers
// may do it at once: what another one changed is left for the next time.
func (r *Registry) prune(ctx context.Context) error {
	now := r.clock.Now()
	return errors.Join(r.pruneTokens(ctx, now), r.pruneEntries(ctx, now.Add(-keepExpired)))
}

// pruneTokens removes tokens that expired unused, and used ones whose time to
// repeat the answer is over.
func (r *Registry) pruneTokens(ctx context.Context, now time.Time) error {
	var failed error
	var old []store.Record
	err := eachPage(ctx, r.store, tokenPrefix, func(p store.Page) error {
		for _, rec := range p.Records {
			token, err := decodeToken(rec)
			if err != nil {
				failed = errors.Join(failed, err)
				continue
			}
			end := fromMillis(token.ExpiresAt)
			if token.RedeemedAt != 0 {
				end = fromMillis(token.RedeemedAt).Add(r.retryWindow())
			}
			if now.After(end) {
				old = append(old, rec)
			}
		}
		return nil
	})
	if err != nil {
		return errors.Join(failed, err)
	}
	for from := 0; from < len(old); from += store.MaxWrites {
		var ifs []store.Precondition
		var writes []store.Write
		for _, rec := range old[from:min(from+store.MaxWrites, len(old))] {
			ifs = append(ifs, store.Precondition{Key: rec.Key, Revision: rec.Revision})
			writes = append(writes, store.Write{Key: rec.Key, Delete: true})
		}
		if _, err := r.commit(ctx, ifs, writes); err != nil && !errors.Is(err, fault.Conflict) {
			return errors.Join(failed, fmt.Errorf("remove expired tokens: %w", err))
		}
	}
	return failed
}

// pruneEntries removes entries that ended before the given moment.
func (r *Registry) pruneEntries(ctx context.Context, before time.Time) error {
	list := r.mirror.endedBefore(before)
	for from := 0; from < len(list); from += store.MaxWrites / 2 {
		_, err := r.deleteTogether(ctx, list[from:min(from+store.MaxWrites/2, len(list))])
		if err != nil && !errors.Is(err, fault.Conflict) {
			return fmt.Errorf("remove expired entries: %w", err)
		}
	}
	return nil
}

func (m *mirror) endedBefore(moment time.Time) []doomed {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var list []doomed
	for it := range m.expired.after(nil) {
		if !it.ExpiresAt.Before(moment) {
			break
		}
		list = append(list, doomed{entry: it.Entry, stored: it.stored})
	}
	return list
}

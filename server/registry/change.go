package registry

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// Guard says whether an entry may be written, beyond what holds for everybody.
type Guard func(*Entry) error

func pass(guards []Guard, entries ...*Entry) error {
	for _, guard := range guards {
		for _, e := range entries {
			if err := guard(e); err != nil {
				return err
			}
		}
	}
	return nil
}

// UpdateEntry applies change to the entry with this id and stores it; it may
// be called more than once. Id, creation time and revision are not its to set.
// When UpdateEntry returns without an error, the mirror has the new entry. The
// guards see the entry as it was and as it would be.
func (r *Registry) UpdateEntry(ctx context.Context, id string, change func(*Entry), guards ...Guard) (Entry, error) {
	for try := range conflictRetries {
		old, stored, err := r.newest(ctx, id, try == 0)
		if errors.Is(err, fault.NotFound) {
			return Entry{}, entryUnknown()
		}
		if err != nil {
			return Entry{}, err
		}
		next := old
		change(&next)
		next = normalise(next)
		next.ID, next.CreatedAt, next.Revision = old.ID, old.CreatedAt, old.Revision+1
		if err := r.check(&next); err != nil {
			return Entry{}, err
		}
		if err := errors.Join(pass(r.newEntry, &next), pass(guards, &old, &next)); err != nil {
			return Entry{}, err
		}
		if next.expired(time.Now()) {
			return Entry{}, expiresInPast()
		}
		revision, err := r.commitUpdate(ctx, old, next, stored)
		if err == nil {
			failpoint.Hit("entry_written")
			return next, r.applied(ctx, revision)
		}
		if !errors.Is(err, fault.Conflict) {
			return Entry{}, err
		}
		there, err := r.indexed(ctx, similarityOf(&next))
		if err == nil && there.ID != id {
			return Entry{}, exists(there).Err
		}
	}
	return Entry{}, busy()
}

// newest returns the entry with the revision of its record: at first as the
// mirror has it, since the commit's precondition tells if that is old.
func (r *Registry) newest(ctx context.Context, id string, first bool) (Entry, int64, error) {
	if it, ok := r.mirror.entry(id); ok && first {
		return it.Entry, it.stored, nil
	}
	return r.stored(ctx, id)
}

// commitUpdate replaces old, whose record is of revision stored, with next and
// moves the index record if next is another identity.
func (r *Registry) commitUpdate(ctx context.Context, old, next Entry, stored int64) (int64, error) {
	value, err := encodeEntry(&next)
	if err != nil {
		return 0, err
	}
	ifs := []store.Precondition{{Key: entryKey(old.ID), Revision: stored}}
	writes := []store.Write{{Key: entryKey(old.ID), Value: value}}
	if from, to := similarityOf(&old), similarityOf(&next); from != to {
		index, err := store.Encode(schema, indexRecord{EntryID: old.ID})
		if err != nil {
			return 0, fmt.Errorf("encode index: %w", err)
		}
		ifs = append(ifs, store.Precondition{Key: to.key()})
		writes = append(writes, store.Write{Key: from.key(), Delete: true}, store.Write{Key: to.key(), Value: index})
	}
	return r.commit(ctx, ifs, writes)
}

// doomed is an entry on its way out of the store.
type doomed struct {
	entry  Entry
	stored int64
	guards []Guard
	err    *error
}

// DeleteEntries removes entries, each by itself; errors keep the order of ids.
// When it returns, no mirror read and no view has what was removed.
func (r *Registry) DeleteEntries(ctx context.Context, ids []string, guards ...Guard) []error {
	errs := make([]error, len(ids))
	var list []doomed
	seen := map[string]bool{}
	for i, id := range ids {
		it, ok := r.mirror.entry(id)
		if !ok || seen[id] {
			errs[i] = entryUnknown()
			continue
		}
		seen[id] = true
		if errs[i] = pass(guards, &it.Entry); errs[i] != nil {
			continue
		}
		list = append(list, doomed{entry: it.Entry, stored: it.stored, guards: guards, err: &errs[i]})
	}
	newest := int64(0)
	for from := 0; from < len(list); from += store.MaxWrites / 2 {
		revision := r.commitDeletes(ctx, list[from:min(from+store.MaxWrites/2, len(list))])
		newest = max(newest, revision)
	}
	if err := r.applied(ctx, newest); err != nil {
		for i := range errs {
			if errs[i] == nil {
				errs[i] = err
			}
		}
	}
	return errs
}

// commitDeletes removes list in one commit or, where others changed one of
// them, one by one as the store has it now.
func (r *Registry) commitDeletes(ctx context.Context, list []doomed) int64 {
	revision, err := r.deleteTogether(ctx, list)
	if errors.Is(err, fault.Conflict) {
		for _, d := range list {
			made, err := r.deleteOne(ctx, d)
			*d.err = err
			revision = max(revision, made)
		}
		return revision
	}
	for _, d := range list {
		*d.err = err
	}
	return revision
}

func (r *Registry) deleteOne(ctx context.Context, d doomed) (int64, error) {
	for range conflictRetries {
		var err error
		d.entry, d.stored, err = r.stored(ctx, d.entry.ID)
		if errors.Is(err, fault.NotFound) {
			return 0, entryUnknown()
		}
		if err != nil {
			return 0, err
		}
		if err := pass(d.guards, &d.entry); err != nil {
			return 0, err
		}
		revision, err := r.deleteTogether(ctx, []doomed{d})
		if !errors.Is(err, fault.Conflict) {
			return revision, err
		}
	}
	return 0, busy()
}

// deleteTogether removes entries with their index records.
func (r *Registry) deleteTogether(ctx context.Context, list []doomed) (int64, error) {
	if ctx.Err() != nil {
		return 0, ended(ctx)
	}
	var ifs []store.Precondition
	var writes []store.Write
	for _, d := range list {
		ifs = append(ifs, store.Precondition{Key: entryKey(d.entry.ID), Revision: d.stored})
		writes = append(writes,
			store.Write{Key: entryKey(d.entry.ID), Delete: true},
			store.Write{Key: similarityOf(&d.entry).key(), Delete: true})
	}
	return r.commit(ctx, ifs, writes)
}

func entryUnknown() error {
	return fault.New(fault.NotFound, "entry_unknown", "no entry has this id")
}

package registry

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// commitsInFlight is how many commits of one batch wait for the store at a time:
// it writes them together.
const commitsInFlight = 16

// commitBytes leaves room below the store's limit for what a driver adds.
const commitBytes = store.MaxCommitBytes - 64<<10

// EntryResult is what became of one entry of a batch. With fault.Exists, Entry
// is the entry that is there already.
type EntryResult struct {
	Entry Entry
	Err   error
}

// draft is an entry on its way into the store.
type draft struct {
	entry   Entry
	value   []byte
	similar similarity
	result  *EntryResult
}

func (d *draft) size() int { return len(d.value) + 2*MaxEntryID }

// CreateEntries stores entries, each by itself: some may fail while others are
// made. Results keep the order of list. An entry with the same SPIFFE ID,
// parent and selectors as another, or with its id, fails with fault.Exists.
// When it returns, the mirror has everything that was made.
func (r *Registry) CreateEntries(ctx context.Context, list []Entry, guards ...Guard) []EntryResult {
	results := make([]EntryResult, len(list))
	drafts, repeats := r.drafts(list, results, guards)
	if err := r.applied(ctx, r.commitAll(ctx, drafts)); err != nil {
		for i := range results {
			if results[i].Err == nil {
				results[i].Err = err
			}
		}
	}
	for repeat, of := range repeats {
		results[repeat] = repeated(results[of])
	}
	return results
}

// commitAll commits drafts, several commits at a time, and returns the newest
// revision made. Once the store takes nothing, no more is tried.
func (r *Registry) commitAll(ctx context.Context, drafts []*draft) (newest int64) {
	var mu sync.Mutex
	var stop error
	var g errgroup.Group
	g.SetLimit(commitsInFlight)
	for len(drafts) > 0 {
		n := chunk(drafts)
		together := drafts[:n]
		drafts = drafts[n:]
		g.Go(func() error {
			mu.Lock()
			err := stop
			mu.Unlock()
			if err != nil {
				for _, d := range together {
					d.result.Err = err
				}
				return nil
			}
			revision, err := r.commitDrafts(ctx, together)
			mu.Lock()
			defer mu.Unlock()
			newest = max(newest, revision)
			if stop == nil {
				stop = err
			}
			return nil
		})
	}
	_ = g.Wait() // each draft has its own error
	return newest
}

// drafts checks the entries and prepares those that can be tried. repeats maps
// an entry to an earlier one of the list that is similar or has its id.
func (r *Registry) drafts(list []Entry, results []EntryResult, guards []Guard) (drafts []*draft, repeats map[int]int) {
	repeats = map[int]int{}
	ids, similar := map[string]int{}, map[similarity]int{}
	now := time.Now()
	for i, e := range list {
		d, err := r.draft(e, now, guards)
		if err != nil {
			results[i].Err = err
			continue
		}
		if there, ok := r.mirror.similarTo(d.similar); ok {
			results[i] = exists(there.Entry)
			continue
		}
		if there, ok := r.mirror.entry(d.entry.ID); ok {
			results[i] = idTaken(there.Entry)
			continue
		}
		if of, ok := similar[d.similar]; ok {
			repeats[i] = of
			continue
		}
		if of, ok := ids[d.entry.ID]; ok {
			repeats[i] = of
			continue
		}
		ids[d.entry.ID], similar[d.similar] = i, i
		d.result = &results[i]
		drafts = append(drafts, d)
	}
	return drafts, repeats
}

func (r *Registry) draft(e Entry, now time.Time, guards []Guard) (*draft, error) {
	e = normalise(e)
	e.CreatedAt, e.Revision = wall(now), 0
	if e.ID == "" {
		e.ID = newEntryID(now)
	}
	if err := r.check(&e); err != nil {
		return nil, err
	}
	if err := errors.Join(pass(r.newEntry, &e), pass(guards, &e)); err != nil {
		return nil, err
	}
	if e.expired(now) {
		return nil, expiresInPast()
	}
	value, err := encodeEntry(&e)
	if err != nil {
		return nil, err
	}
	return &draft{entry: e, value: value, similar: similarityOf(&e)}, nil
}

// newEntryID returns an id of 80 random bits that sorts after those made
// in earlier milliseconds: what is made together lies together in the store,
// so that a commit of many touches few of its pages.
func newEntryID(now time.Time) string {
	const digits = "234567abcdefghijklmnopqrstuvwxyz"
	var id [10]byte
	for i, ms := len(id)-1, now.UnixMilli(); i >= 0; i, ms = i-1, ms>>5 {
		id[i] = digits[ms&31]
	}
	return string(id[:]) + strings.ToLower(rand.Text()[:16])
}

// chunk returns how many of the drafts go into one commit.
func chunk(drafts []*draft) int {
	n, size := 0, 0
	for n < len(drafts) && n < store.MaxWrites/2 {
		if size += drafts[n].size(); size > commitBytes && n > 0 {
			break
		}
		n++
	}
	return n
}

// commitDrafts commits drafts together, or, where one is in the way, in halves.
// It returns the newest revision made and, if the store takes nothing now, why.
func (r *Registry) commitDrafts(ctx context.Context, drafts []*draft) (int64, error) {
	revision, err := r.commitTogether(ctx, drafts)
	switch {
	case err == nil:
		failpoint.Hit("entry_written")
		for _, d := range drafts {
			d.result.Entry = d.entry
		}
		return revision, nil
	case !errors.Is(err, fault.Conflict):
		for _, d := range drafts {
			d.result.Err = err
		}
		return 0, err
	case len(drafts) == 1:
		*drafts[0].result = r.whoIsThere(ctx, drafts[0])
		return 0, nil
	}
	half := len(drafts) / 2
	first, err := r.commitDrafts(ctx, drafts[:half])
	if err != nil {
		for _, d := range drafts[half:] {
			d.result.Err = err
		}
		return first, err
	}
	second, err := r.commitDrafts(ctx, drafts[half:])
	return max(first, second), err
}

func (r *Registry) commitTogether(ctx context.Context, drafts []*draft) (int64, error) {
	if ctx.Err() != nil {
		return 0, ended(ctx)
	}
	var ifs []store.Precondition
	var writes []store.Write
	for _, d := range drafts {
		if err := d.commit(&ifs, &writes); err != nil {
			return 0, err
		}
	}
	return r.commit(ctx, ifs, writes)
}

// commit adds what it takes to store d, if nothing is in its way.
func (d *draft) commit(ifs *[]store.Precondition, writes *[]store.Write) error {
	index, err := store.Encode(schema, indexRecord{EntryID: d.entry.ID})
	if err != nil {
		return fmt.Errorf("encode index: %w", err)
	}
	*ifs = append(*ifs, store.Precondition{Key: entryKey(d.entry.ID)}, store.Precondition{Key: d.similar.key()})
	*writes = append(*writes, store.Write{Key: entryKey(d.entry.ID), Value: d.value}, store.Write{Key: d.similar.key(), Value: index})
	return nil
}

// whoIsThere finds the entry that was in the way of d. The mirror may not have
// it yet, so the store is asked.
func (r *Registry) whoIsThere(ctx context.Context, d *draft) EntryResult {
	there, err := r.indexed(ctx, d.similar)
	if err == nil {
		return exists(there)
	}
	if errors.Is(err, fault.NotFound) {
		there, _, err = r.stored(ctx, d.entry.ID)
		if err == nil {
			return idTaken(there)
		}
	}
	if errors.Is(err, fault.NotFound) {
		err = busy()
	}
	return EntryResult{Err: err}
}

// indexed returns the entry that the index has under s.
func (r *Registry) indexed(ctx context.Context, s similarity) (Entry, error) {
	rec, err := r.get(ctx, s.key())
	if err != nil {
		return Entry{}, fmt.Errorf("read index: %w", err)
	}
	var index indexRecord
	if err := store.Decode(rec.Value, schema, &index); err != nil {
		return Entry{}, fmt.Errorf("decode %s: %w", rec.Key, err)
	}
	e, _, err := r.stored(ctx, index.EntryID)
	return e, err
}

// stored reads an entry from the store, with the revision of its record.
func (r *Registry) stored(ctx context.Context, id string) (Entry, int64, error) {
	rec, err := r.get(ctx, entryKey(id))
	if err != nil {
		return Entry{}, 0, fmt.Errorf("read entry: %w", err)
	}
	e, err := r.decodeEntry(rec)
	return e, rec.Revision, err
}

// repeated is the result of an entry that an earlier one of its batch repeats.
func repeated(first EntryResult) EntryResult {
	if first.Err == nil || errors.Is(first.Err, fault.Exists) {
		return exists(first.Entry)
	}
	return EntryResult{Err: first.Err}
}

func exists(there Entry) EntryResult {
	return EntryResult{Entry: there, Err: fault.New(fault.Exists, "entry_exists",
		"an entry with this SPIFFE ID, parent and selectors, or with this id, is there already")}
}

func idTaken(there Entry) EntryResult {
	return EntryResult{Entry: there, Err: fault.New(fault.Exists, "entry_id_taken",
		"another entry has this id; choose another, or leave it out to have one made")}
}

func expiresInPast() error {
	return fault.New(fault.Invalid, "expires_at_past", "expires_at is over already; delete the entry, or give it a later end")
}

func busy() error {
	return fault.New(fault.Conflict, "entry_busy", "the entry is being changed by others; ask again")
}

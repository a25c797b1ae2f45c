package registry

import (
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// Match says how the selectors of an entry relate to those of a filter.
type Match int

// The ways to match, as in SPIRE's SelectorMatch.
const (
	MatchExact    Match = iota // the same selectors
	MatchSubset                // no selector that the filter has not
	MatchSuperset              // at least the filter's selectors
	MatchAny                   // at least one of the filter's selectors
)

// EntryFilter selects entries; zero fields select all.
type EntryFilter struct {
	SPIFFEID  spiffeid.ID
	ParentID  spiffeid.ID
	Selectors selector.Set // empty: any
	Match     Match        // for Selectors
	Hint      *string
}

func (f *EntryFilter) matches(e *Entry) bool {
	return (f.SPIFFEID.IsZero() || f.SPIFFEID == e.SPIFFEID) &&
		(f.ParentID.IsZero() || f.ParentID == e.ParentID) &&
		(f.Hint == nil || *f.Hint == e.Hint) &&
		(len(f.Selectors) == 0 || f.matchesSelectors(e.Selectors))
}

func (f *EntryFilter) matchesSelectors(have selector.Set) bool {
	switch f.Match {
	case MatchSubset:
		return f.Selectors.Contains(have)
	case MatchSuperset:
		return have.Contains(f.Selectors)
	case MatchAny:
		return slices.ContainsFunc(f.Selectors, func(s selector.Selector) bool {
			return have.Contains(selector.Set{s})
		})
	default:
		return slices.Equal(have, f.Selectors)
	}
}

// Entry returns the entry with this id, also if it has expired.
func (r *Registry) Entry(id string) (Entry, bool) {
	it, ok := r.mirror.entry(id)
	if !ok {
		return Entry{}, false
	}
	return it.Entry, true
}

// ListEntries returns up to limit entries (all if limit <= 0) in the order of
// their ids, from the one after the id after on. If there are more, next is
// the last id returned: pass it as after. Entries that come or go between two
// pages don't make others appear twice or not at all.
func (r *Registry) ListEntries(f EntryFilter, after string, limit int) (list []Entry, next string) {
	r.mirror.eachEntry(&f, after, func(e *Entry) bool {
		if limit > 0 && len(list) == limit {
			next = list[limit-1].ID
			return false
		}
		list = append(list, *e)
		return true
	})
	return list, next
}

// CountEntries returns how many entries f selects.
func (r *Registry) CountEntries(f EntryFilter) int {
	count := 0
	r.mirror.eachEntry(&f, "", func(*Entry) bool {
		count++
		return true
	})
	return count
}

// scanStep is how many entries are looked at under one hold of the lock.
const scanStep = 1024

// eachEntry calls do for the entries that f selects, in the order of their
// ids, until it returns false. do may not call the mirror.
func (m *mirror) eachEntry(f *EntryFilter, after string, do func(*Entry) bool) {
	var last *item
	if after != "" {
		last = &item{Entry: Entry{ID: after}}
	}
	for more := true; more; {
		last, more = m.scan(f, last, do)
	}
}

// scan does a step of eachEntry and returns where the next one begins.
func (m *mirror) scan(f *EntryFilter, from *item, do func(*Entry) bool) (last *item, more bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	seen := 0
	for it := range m.ordered.after(from) {
		if f.matches(&it.Entry) && !do(&it.Entry) {
			return nil, false
		}
		if seen++; seen == scanStep {
			return it, true
		}
	}
	return nil, false
}

// EntryFor returns the entry if agent may have SVIDs signed for it now: its
// parent is the agent's own ID or an alias of it. The answer is the same for an
// entry of another agent, one that has expired, one for a secret store, one
// about nodes and one that does not exist.
func (r *Registry) EntryFor(agent spiffeid.ID, entryID string) (Entry, error) {
	it, ok := r.mirror.authorized(agent, entryID, time.Now())
	if !ok {
		return Entry{}, fault.New(fault.NotFound, agentv1.ReasonEntryNotAuthorized, "this agent has no such entry")
	}
	return it.Entry, nil
}

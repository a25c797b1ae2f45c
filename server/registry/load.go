package registry

import (
	"context"
	"fmt"
	"runtime"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/server/store"
)

// loadPage is how many records are read from the store at a time: little
// enough that a load leaves little garbage.
const loadPage = 4096

// list reads all entries and agents. The delta has the revision of the first
// page, from which a watch has to follow; newest is that of the last page.
func (r *Registry) list(ctx context.Context) (d delta, newest int64, err error) {
	first := int64(-1)
	seen := func(revision int64) {
		if first < 0 {
			first = revision
		}
		newest = max(newest, revision)
	}
	err = eachPage(ctx, r.store, entryPrefix, func(p store.Page) error {
		seen(p.Revision)
		decoded, err := decodeAll(p.Records, r.decodeEntryItem)
		d.entries = append(d.entries, decoded...)
		return err
	})
	if err != nil {
		return delta{}, 0, err
	}
	err = eachPage(ctx, r.store, agentPrefix, func(p store.Page) error {
		seen(p.Revision)
		decoded, err := decodeAll(p.Records, r.decodeAgentItem)
		d.agents = append(d.agents, decoded...)
		return err
	})
	if err != nil {
		return delta{}, 0, err
	}
	d.revision = first
	return d, newest, nil
}

// eachPage lists prefix page by page.
func eachPage(ctx context.Context, kv store.KV, prefix string, do func(store.Page) error) error {
	after := ""
	for {
		p, err := kv.List(ctx, prefix, after, loadPage)
		if err != nil {
			return fmt.Errorf("list %s: %w", prefix, err)
		}
		if err := do(p); err != nil {
			return err
		}
		if !p.More || len(p.Records) == 0 {
			return nil
		}
		after = p.Records[len(p.Records)-1].Key
	}
}

// decodeAll decodes records on all cores, keeping their order.
func decodeAll[T any](records []store.Record, decode func(store.Record) (T, error)) ([]T, error) {
	decoded := make([]T, len(records))
	var g errgroup.Group
	share := (len(records) + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0)
	for from := 0; from < len(records); from += share {
		to := min(from+share, len(records))
		g.Go(func() error {
			for i := from; i < to; i++ {
				var err error
				if decoded[i], err = decode(records[i]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return decoded, g.Wait()
}

func (r *Registry) decodeEntryItem(rec store.Record) (*item, error) {
	e, err := r.decodeEntry(rec)
	if err != nil {
		return nil, err
	}
	return &item{Entry: e, stored: rec.Revision}, nil
}

func (r *Registry) decodeAgentItem(rec store.Record) (*agentItem, error) {
	a, err := r.decodeAgent(rec)
	if err != nil {
		return nil, err
	}
	return &agentItem{Agent: a, stored: rec.Revision}, nil
}

// delta reads what a commit did to entries and agents. Others' records pass by
// and only move the revision.
func (r *Registry) delta(b store.Batch) (delta, error) {
	d := delta{revision: b.Revision, at: b.Time}
	for _, ev := range b.Events {
		switch {
		case strings.HasPrefix(ev.Key, entryPrefix) && ev.Deleted:
			d.gone = append(d.gone, strings.TrimPrefix(ev.Key, entryPrefix))
		case strings.HasPrefix(ev.Key, entryPrefix):
			it, err := r.decodeEntryItem(ev.Record)
			if err != nil {
				return delta{}, err
			}
			d.entries = append(d.entries, it)
		case strings.HasPrefix(ev.Key, agentPrefix) && ev.Deleted:
			d.left = append(d.left, r.trustDomain.IDString()+"/"+strings.TrimPrefix(ev.Key, agentPrefix))
		case strings.HasPrefix(ev.Key, agentPrefix):
			a, err := r.decodeAgentItem(ev.Record)
			if err != nil {
				return delta{}, err
			}
			d.agents = append(d.agents, a)
		}
	}
	return d, nil
}

// difference completes a listing with what the mirror has and it has not, so
// that applying it brings the mirror to the listing.
func (m *mirror) difference(listed delta) delta {
	m.mu.RLock()
	defer m.mu.RUnlock()
	entries := make(map[string]bool, len(listed.entries))
	for _, it := range listed.entries {
		entries[it.ID] = true
	}
	for id := range m.entries {
		if !entries[id] {
			listed.gone = append(listed.gone, id)
		}
	}
	agents := make(map[string]bool, len(listed.agents))
	for _, a := range listed.agents {
		agents[a.ID.String()] = true
	}
	for id := range m.agents {
		if !agents[id] {
			listed.left = append(listed.left, id)
		}
	}
	return listed
}

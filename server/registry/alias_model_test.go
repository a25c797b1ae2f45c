package registry_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/registry"
)

// byTheRules is an agent's view as docs/adr/0007 words it: from the records
// alone, without an index.
func byTheRules(r *registry.Registry, agent spiffeid.ID) map[string]registry.Entry {
	all, _ := r.ListEntries(registry.EntryFilter{}, "", 0)
	now := time.Now()
	own := selector.Selector{Type: "spiffe_id", Value: agent.String()}
	aboutNodes := func(e *registry.Entry) bool {
		return e.ParentID == serverID || len(e.Selectors) == 1 && e.Selectors[0].String() == "spiffe_id:"+e.ParentID.String()
	}
	counts := func(e *registry.Entry) bool { return !e.StoreSVID && (e.ExpiresAt.IsZero() || now.Before(e.ExpiresAt)) }
	parents := map[spiffeid.ID]bool{agent: true}
	if record, known := r.Agent(agent); known {
		has := selector.NewSet(append(selector.Set{own}, record.Selectors...)...)
		for i := range all {
			if aboutNodes(&all[i]) && counts(&all[i]) && has.Contains(all[i].Selectors) {
				parents[all[i].SPIFFEID] = true
			}
		}
	}
	view := map[string]registry.Entry{}
	for i, e := range all {
		if parents[e.ParentID] && counts(&all[i]) && !aboutNodes(&all[i]) {
			view[e.ID] = e
		}
	}
	return view
}

// Whatever happens to entries, aliases, agents and servers, in whatever order:
// a follower that has caught up has the view that the rules give its agent, and
// its agent may sign for that and nothing else.
func TestViewsWithAliasesFollowTheRules(t *testing.T) {
	for seed := range uint64(16) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &aliasWorld{T: t, Rand: rand.New(rand.NewPCG(seed, 11)), server: start(t, t.TempDir())}
				w.LimitChanges(60)
				for i := range 8 {
					w.followers = append(w.followers, &follower{agent: node(i % agentsInWorld), view: map[string]registry.Entry{}})
				}
				for range 400 {
					w.step()
				}
				w.check()
			})
		})
	}
}

const agentsInWorld = 4

type aliasWorld struct {
	*testing.T
	*rand.Rand
	*server
	followers []*follower
	made      int
}

func (w *aliasWorld) step() {
	switch w.IntN(20) {
	case 0, 1, 2, 3, 4:
		w.create()
	case 5, 6, 7:
		w.DeleteEntries(w.Context(), []string{w.someEntry(), w.someEntry()})
	case 8, 9, 10:
		w.update()
	case 11, 12:
		w.changeAgent()
	case 13:
		w.followers[w.IntN(len(w.followers))].disconnect()
	case 14, 15, 16:
		w.followers[w.IntN(len(w.followers))].catchUp(w.T, w.Registry)
	case 17:
		time.Sleep(time.Duration(w.IntN(8000)) * time.Millisecond)
	case 18:
		w.check()
	case 19:
		if w.IntN(3) > 0 {
			return
		}
		for _, f := range w.followers {
			f.disconnect()
		}
		w.server = w.restart(w.T)
		w.LimitChanges(60)
	}
}

func (w *aliasWorld) create() {
	var batch []registry.Entry
	for range 1 + w.IntN(4) {
		w.made++
		e := web(fmt.Sprintf("/w/%d", w.made), w.someParent())
		if w.IntN(3) == 0 {
			e = registry.Entry{SPIFFEID: w.someAlias(), ParentID: serverID, Selectors: w.someNodeSelectors(1)}
		} else if w.IntN(4) == 0 { // a token's
			e = registry.Entry{SPIFFEID: w.someAlias(), ParentID: node(w.IntN(agentsInWorld))}
			e.Selectors = selectors("spiffe_id:" + e.ParentID.String())
		}
		e.ExpiresAt, e.StoreSVID = w.someEnd(), w.IntN(10) == 0
		batch = append(batch, e)
	}
	for _, result := range w.CreateEntries(w.Context(), batch) {
		if result.Err != nil && !errors.Is(result.Err, fault.Exists) {
			w.Fatal(result.Err)
		}
	}
}

// update moves an entry, changes what an alias is about, or makes one of the
// two kinds of entry the other.
func (w *aliasWorld) update() {
	parent, name, ends, about := w.someParent(), w.someAlias(), w.someEnd(), w.someNodeSelectors(1)
	how := w.IntN(4)
	_, err := w.UpdateEntry(w.Context(), w.someEntry(), func(e *registry.Entry) {
		e.ExpiresAt = ends
		switch how {
		case 1:
			e.ParentID = parent
		case 2:
			e.ParentID, e.Selectors = serverID, about
		case 3:
			e.SPIFFEID = name
		}
	})
	if err != nil && !errors.Is(err, fault.NotFound) && !errors.Is(err, fault.Exists) {
		w.Fatal(err)
	}
}

func (w *aliasWorld) changeAgent() {
	agent := node(w.IntN(agentsInWorld))
	if _, known := w.Agent(agent); known && w.IntN(3) == 0 {
		if err := w.Evict(w.Context(), agent); err != nil {
			w.Fatal(err)
		}
		return
	}
	err := w.PutAgent(w.Context(), registry.Agent{ID: agent, Attestor: "test", Selectors: w.someNodeSelectors(0), AttestedAt: time.Now()})
	if err != nil {
		w.Fatal(err)
	}
}

// check has everybody catch up, and compares.
func (w *aliasWorld) check() {
	for i, f := range w.followers {
		f.catchUp(w.T, w.Registry)
		want := byTheRules(w.Registry, f.agent)
		for entry, e := range want {
			if got, ok := f.view[entry]; !ok || got.Revision != e.Revision || got.ParentID != e.ParentID {
				w.Errorf("follower %d has %+v, want %+v", i, got, e)
			}
		}
		if may := direct(w.Registry, f.agent); len(f.view) != len(want) || len(may) != len(want) {
			w.Fatalf("follower %d has %d entries and may sign for %d, want %d", i, len(f.view), len(may), len(want))
		}
	}
	if w.IntN(2) == 0 {
		for _, f := range w.followers {
			f.disconnect()
		}
	}
}

func (w *aliasWorld) someEntry() string {
	list, _ := w.ListEntries(registry.EntryFilter{}, "", 0)
	if len(list) == 0 {
		return "none"
	}
	return list[w.IntN(len(list))].ID
}

func (w *aliasWorld) someAlias() spiffeid.ID { return id(fmt.Sprintf("/alias/%d", w.IntN(3))) }

func (w *aliasWorld) someParent() spiffeid.ID {
	if w.IntN(2) == 0 {
		return node(w.IntN(agentsInWorld))
	}
	return w.someAlias()
}

func (w *aliasWorld) someEnd() time.Time {
	if w.IntN(4) > 0 {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(w.IntN(20000)+1) * time.Millisecond)
}

// someNodeSelectors are at least so many.
func (w *aliasWorld) someNodeSelectors(least int) selector.Set {
	pool := []string{"x509pop:role:web", "x509pop:role:db", "x509pop:zone:a", "x509pop:zone:b"}
	w.Shuffle(len(pool), func(i, j int) { pool[i], pool[j] = pool[j], pool[i] })
	return selectors(pool[:least+w.IntN(3)]...)
}

package registry_test

import (
	"fmt"
	"testing"

	"github.com/seed-caa81108/assay/server/registry"
)

// BenchmarkAlias is what changes around node aliases cost the mirror, until the
// feed of an agent that they concern has its update. But for those that concern
// all agents, they ought to cost the same in a small fleet and in a large one.
func BenchmarkAlias(b *testing.B) {
	for _, size := range []struct{ entries, agents int }{{1000, 100}, {100_000, 10_000}} {
		s := fleetOf(b, size.entries, size.agents)
		one := func(texts ...string) []registry.Agent {
			return []registry.Agent{{ID: node(1), Selectors: selectors(texts...)}}
		}
		named := func(e registry.Entry) []registry.Entry {
			e.ID = "new"
			return []registry.Entry{e}
		}
		gone := []string{"new"}
		kinds := map[string][2]func(){
			"entry": {
				func() { s.See(named(web("/new", id("/node/1"))), nil, nil) },
				func() { s.See(nil, gone, nil) },
			},
			"alias": {
				func() { s.See(named(alias("/more", "k8s_psat:cluster:c", "k8s_psat:agent_node_uid:1")), nil, nil) },
				func() { s.See(nil, gone, nil) },
			},
			"selectors": {
				func() { s.See(nil, nil, one("k8s_psat:cluster:c")) },
				func() { s.See(nil, nil, one("k8s_psat:cluster:c", "k8s_psat:agent_node_uid:1")) },
			},
			"entry-of-all": {
				func() { s.See(named(web("/new", id("/all"))), nil, nil) },
				func() { s.See(nil, gone, nil) },
			},
			"alias-of-all": {
				func() { s.See(named(alias("/too", "k8s_psat:cluster:c")), nil, nil) },
				func() { s.See(nil, gone, nil) },
			},
		}
		for _, kind := range []string{"entry", "alias", "selectors", "entry-of-all", "alias-of-all"} {
			b.Run(fmt.Sprintf("%s/entries=%d/agents=%d", kind, size.entries, size.agents), func(b *testing.B) {
				for b.Loop() {
					for _, change := range kinds[kind] {
						heard(b, s.Registry, change)
					}
				}
			})
		}
	}
}

// heard makes a change and waits until agent 1 hears of it, on a feed whose
// first change waits for no other.
func heard(b *testing.B, r *registry.Registry, change func()) {
	f := r.Follow(node(1), r.Epoch(), r.Revision())
	defer f.Close()
	next(b, f)
	change()
	next(b, f)
}

// fleetOf is a server with agents that each have an alias of their own and one
// that all have, and with entries whose parents are those aliases.
func fleetOf(b *testing.B, entries, agents int) *server {
	b.Helper()
	s := start(b, b.TempDir())
	nodes := make([]registry.Agent, agents)
	list := []registry.Entry{alias("/all", "k8s_psat:cluster:c")}
	list[0].ID = "all"
	for i := range nodes {
		facts := []string{"k8s_psat:cluster:c", fmt.Sprintf("k8s_psat:agent_node_uid:%d", i)}
		nodes[i] = registry.Agent{ID: node(i), Selectors: selectors(facts...)}
		a := alias(fmt.Sprintf("/node/%d", i), facts...)
		a.ID = fmt.Sprintf("alias-%d", i)
		list = append(list, a)
	}
	for i := range entries {
		e := web(fmt.Sprintf("/w/%d", i), id(fmt.Sprintf("/node/%d", i%agents)))
		e.ID = fmt.Sprintf("e-%d", i)
		list = append(list, e)
	}
	s.See(list, nil, nodes)
	return s
}

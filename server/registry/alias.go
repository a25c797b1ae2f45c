package registry

import (
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/selector"
)

// A node alias is an entry about nodes, not workloads: each agent that has all
// of its selectors has the entry's SPIFFE ID as an alias, and with it the
// entries whose parent is that ID. Such an entry is one whose parent is the
// server's ID, or one whose parent is an agent and whose only selector is that
// agent's own ID, as tools made for SPIRE write it for a join token.
//
// An alias gives entries and nothing else: no agent and no workload gets its
// ID in a certificate, and an alias of an alias or of a workload is none
// (docs/adr/0007).

// spiffeIDType is the type of the selector that every agent has besides those
// of its record: its own ID.
const spiffeIDType = "spiffe_id"

func ownSelector(agent spiffeid.ID) selector.Selector {
	return selector.Selector{Type: spiffeIDType, Value: agent.String()}
}

// isAlias says whether e is about nodes.
func (r rules) isAlias(e *Entry) bool {
	return e.ParentID.Path() == r.reservedPrefix+"server" ||
		len(e.Selectors) == 1 && e.Selectors[0] == ownSelector(e.ParentID)
}

// has says whether need holds for the agent: by its own ID and by what its
// attestation found. No attestation can find that a node is another one.
func (a *agentItem) has(need selector.Set) bool {
	own := ownSelector(a.ID)
	return !slices.ContainsFunc(need, func(s selector.Selector) bool {
		return s != own && (s.Type == spiffeIDType || !a.Selectors.Contains(selector.Set{s}))
	})
}

// aliasIndex finds the aliases that an agent may have, and the agents that may
// have an alias, by one selector.
type aliasIndex struct {
	// entries has each alias under the one of its selectors that had the
	// fewest when it came: one that a whole cluster shares is no key.
	entries map[selector.Selector]map[*item]struct{}
	agents  map[selector.Selector]map[string]struct{} // SPIFFE IDs
}

func newAliasIndex() aliasIndex {
	return aliasIndex{entries: map[selector.Selector]map[*item]struct{}{}, agents: map[selector.Selector]map[string]struct{}{}}
}

func (x *aliasIndex) put(it *item) {
	file(x.entries, slices.MinFunc(it.Selectors, func(a, b selector.Selector) int {
		return len(x.entries[a]) - len(x.entries[b])
	}), it)
}

func (x *aliasIndex) remove(it *item) {
	for _, s := range it.Selectors {
		unfile(x.entries, s, it)
	}
}

func (x *aliasIndex) putAgent(a *agentItem) {
	for _, s := range a.Selectors {
		file(x.agents, s, a.ID.String())
	}
}

func (x *aliasIndex) removeAgent(a *agentItem) {
	for _, s := range a.Selectors {
		unfile(x.agents, s, a.ID.String())
	}
}

// candidates returns the IDs of agents among which are all those that have
// need: the one that need names, or those of its rarest selector.
func (x *aliasIndex) candidates(need selector.Set) map[string]struct{} {
	var rarest map[string]struct{}
	for i, s := range need {
		if s.Type == spiffeIDType {
			return map[string]struct{}{s.Value: {}}
		}
		if set := x.agents[s]; i == 0 || len(set) < len(rarest) {
			rarest = set
		}
	}
	return rarest
}

func file[T comparable](index map[selector.Selector]map[T]struct{}, under selector.Selector, what T) {
	if index[under] == nil {
		index[under] = map[T]struct{}{}
	}
	index[under][what] = struct{}{}
}

func unfile[T comparable](index map[selector.Selector]map[T]struct{}, under selector.Selector, what T) {
	delete(index[under], what)
	if len(index[under]) == 0 {
		delete(index, under)
	}
}

// putAgent makes a the record of its agent; c is nil while the mirror is
// loaded. Most changes of a record are of its certificates, and cost nothing
// here.
func (m *mirror) putAgent(a *agentItem, c *change) {
	old := m.agents[a.ID.String()]
	m.agents[a.ID.String()] = a
	if old != nil {
		m.keys.remove(old)
	}
	m.keys.put(a)
	if old != nil {
		if slices.Equal(old.Selectors, a.Selectors) {
			return
		}
		m.aliases.removeAgent(old)
	}
	m.aliases.putAgent(a)
	m.link(a.ID, c)
}

func (m *mirror) removeAgent(a *agentItem, c *change) {
	delete(m.agents, a.ID.String())
	m.keys.remove(a)
	m.aliases.removeAgent(a)
	m.link(a.ID, c)
}

// relink brings the agents that have or had an alias up to date.
func (m *mirror) relink(alias *item, c change) {
	for id := range m.aliases.candidates(alias.Selectors) {
		if a := m.agents[id]; a != nil {
			m.link(a.ID, &c)
		}
	}
}

// link brings an agent's aliases to what its record and the entries give it.
// If it gains or loses one, its whole view is another.
func (m *mirror) link(agent spiffeid.ID, c *change) {
	after := m.aliasesOf(agent)
	if len(after) == 0 && m.parents[agent.String()] == nil {
		return
	}
	own := m.parent(agent)
	before := own.aliases
	own.aliases = after
	changed := false
	for p := range after {
		if _, had := p.holders[own]; had {
			continue
		}
		if p.holders == nil {
			p.holders = map[*parent]struct{}{}
		}
		p.holders[own] = struct{}{}
		changed = true
	}
	for p := range before {
		if _, has := after[p]; !has {
			delete(p.holders, own)
			m.release(p.id)
			changed = true
		}
	}
	if changed && c != nil {
		relinked := *c
		relinked.relinked = true
		m.record(own, relinked)
	}
	m.release(agent)
}

// aliasesOf returns the parents whose entries the agent has besides its own,
// each with the aliases that give it.
func (m *mirror) aliasesOf(agent spiffeid.ID) map[*parent][]*item {
	a := m.agents[agent.String()]
	if a == nil {
		return nil
	}
	var found map[*parent][]*item
	look := func(s selector.Selector) {
		for it := range m.aliases.entries[s] {
			if !a.has(it.Selectors) {
				continue
			}
			if found == nil {
				found = map[*parent][]*item{}
			}
			p := m.parent(it.SPIFFEID)
			found[p] = append(found[p], it)
		}
	}
	look(ownSelector(a.ID))
	for _, s := range a.Selectors {
		look(s)
	}
	return found
}

// authorized returns the entry if it is the agent's at now. It does not rely on
// an expiry having been noticed yet.
func (m *mirror) authorized(agent spiffeid.ID, entryID string, now time.Time) (*item, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	it := m.entries[entryID]
	if it == nil || it.alias || it.StoreSVID || it.expired(now) {
		return nil, false
	}
	if it.ParentID == agent {
		return it, true
	}
	own, of := m.parents[agent.String()], m.parents[it.ParentID.String()]
	if own == nil || of == nil {
		return nil, false
	}
	live := func(alias *item) bool { return !alias.expired(now) }
	return it, slices.ContainsFunc(own.aliases[of], live)
}

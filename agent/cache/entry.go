package cache

import (
	"bytes"
	"crypto/ecdsa"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// facts are what the server says about an entry. They don't change; another
// word of the server is another facts.
type facts struct {
	id        string
	spiffeID  spiffeid.ID
	selectors selector.Set
	hint      string
	ttl       time.Duration
	dns       []string
	created   time.Time
	committed time.Time // when this version was committed, zero if unknown
	// ofPods are those of the selectors that only processes of a pod have; empty:
	// the entry may be for others.
	ofPods selector.Set
	// wire is the entry as the server sent it, for comparison and the sealed
	// file.
	wire []byte
}

// entry is an entry of this node with what the cache has for it. Guarded by
// Cache.mu.
type entry struct {
	facts
	key    selector.Selector // under which it is indexed
	groups map[*group]struct{}

	svid *SVID
	// attempted: signing was tried, or there was a chance to. Nobody waits
	// for an entry of which this is true.
	attempted bool
	failures  int
	wait      schedule.Backoff
	// asked is a key whose certificate was asked for, and did not come or was of no
	// use. The next attempt is for the same key: a certificate that was lost on its
	// way counts at the server, and so does one that was not taken.
	asked *ecdsa.PrivateKey
	// generation changes when a signature that is under way becomes useless.
	generation uint64
	signing    bool

	// Place in a queue.
	in       *queue
	position int
	class    class
	at       time.Time
	sequence uint64
}

// parseEntry checks an entry as far as serving it safely needs: one without
// selectors would match everybody, one with a reserved ID would be an agent or
// a server.
func parseEntry(from *agentv1.Entry, committed time.Time, td spiffeid.TrustDomain, reserved string) (facts, error) {
	invalid := func(rule string) (facts, error) {
		return facts{}, fault.New(fault.Precondition, "entry_invalid", "the server sent an entry that can't be served: "+rule)
	}
	if from.GetId() == "" {
		return invalid("no ID")
	}
	id, err := name.ParseID(from.GetSpiffeId())
	if err != nil {
		return invalid("not a SPIFFE ID")
	}
	if id.TrustDomain() != td || id.Path() == "" || strings.HasPrefix(id.Path(), reserved) {
		return invalid("not the SPIFFE ID of a workload of this trust domain")
	}
	if len(from.GetSelectors()) == 0 {
		return invalid("no selectors")
	}
	list := make([]selector.Selector, len(from.GetSelectors()))
	for i, s := range from.GetSelectors() {
		list[i] = selector.Selector{Type: s.GetType(), Value: s.GetValue()}
		if err := list[i].Check(); err != nil {
			return invalid(fault.SafeText(err))
		}
	}
	wire, err := proto.MarshalOptions{Deterministic: true}.Marshal(from)
	if err != nil {
		return invalid("it can't be encoded")
	}
	f := facts{
		id: from.GetId(), spiffeID: id, selectors: selector.NewSet(list...), hint: from.GetHint(),
		ttl: from.GetX509SvidTtl().AsDuration(), dns: from.GetDnsNames(), committed: committed, wire: wire,
	}
	f.ofPods = ofPods(f.selectors)
	if from.GetCreatedAt().IsValid() {
		f.created = from.GetCreatedAt().AsTime()
	}
	return f, nil
}

// upsert takes in what the server says about an entry.
func (c *Cache) upsert(f facts) {
	e := c.entries[f.id]
	if e == nil {
		e = &entry{facts: f, groups: map[*group]struct{}{}, wait: signBackoff}
		c.entries[f.id] = e
		c.link(e)
		c.enqueue(e)
		return
	}
	if bytes.Equal(e.wire, f.wire) {
		return
	}
	old := e.facts
	// The index needs the old facts to take the entry out.
	moved := !slices.Equal(old.selectors, f.selectors) || !old.created.Equal(f.created)
	if moved {
		c.unlink(e)
	}
	e.facts = f
	switch {
	case old.spiffeID != f.spiffeID:
		// The old identity is withdrawn with the change, not with its successor.
		e.svid, e.attempted = nil, false
	case old.hint != f.hint && e.svid != nil:
		renamed := *e.svid
		renamed.Hint = f.hint
		e.svid = &renamed
	}
	if moved {
		c.link(e)
	}
	c.touch(e)
	if old.spiffeID != f.spiffeID || old.ttl != f.ttl || !slices.Equal(old.dns, f.dns) {
		e.generation++
		e.asked = nil
		e.wait, e.failures = signBackoff, 0
		c.enqueue(e)
	} else if _, parked := c.parked[e]; parked {
		c.enqueue(e) // it may be for other pods now
	}
}

// removeEntry forgets an entry with its key and SVID.
func (c *Cache) removeEntry(e *entry) {
	c.unlink(e)
	if e.in != nil {
		e.in.remove(e)
	}
	e.svid = nil
	delete(c.parked, e)
	delete(c.entries, e.id)
}

// link puts an entry into the index and into the groups that it matches. The
// index has it under the one of its selectors that is rarest, so that a lookup
// meets few entries that it doesn't want.
func (c *Cache) link(e *entry) {
	e.key = e.selectors[0]
	for _, s := range e.selectors[1:] {
		if len(c.byKey[s]) < len(c.byKey[e.key]) {
			e.key = s
		}
	}
	addTo(c.byKey, e.key, e)
	if slices.ContainsFunc(e.selectors, isOfContainer) {
		c.ofContainers[e] = struct{}{}
	}
	rarest := e.selectors[0]
	for _, s := range e.selectors[1:] {
		if len(c.groupsBy[s]) < len(c.groupsBy[rarest]) {
			rarest = s
		}
	}
	for g := range c.groupsBy[rarest] {
		if g.set.Contains(e.selectors) {
			c.join(g, e)
		}
	}
}

func (c *Cache) unlink(e *entry) {
	removeFrom(c.byKey, e.key, e)
	delete(c.ofContainers, e)
	for g := range e.groups {
		g.entries = slices.DeleteFunc(g.entries, func(x *entry) bool { return x == e })
		c.dirty[g] = struct{}{}
	}
	clear(e.groups)
}

// join makes an entry a member of a group that it matches.
func (c *Cache) join(g *group, e *entry) {
	g.entries, g.sorted = append(g.entries, e), false
	e.groups[g] = struct{}{}
	c.dirty[g] = struct{}{}
}

// touch makes the groups of an entry compute their snapshot again.
func (c *Cache) touch(e *entry) {
	for g := range e.groups {
		c.dirty[g] = struct{}{}
	}
}

// byAge is the order of SVIDs in a message: the oldest entry is the default
// identity, whatever happens to the others (WL-35).
func byAge(a, b *entry) int {
	if c := a.created.Compare(b.created); c != 0 {
		return c
	}
	return strings.Compare(a.id, b.id)
}

func addTo[T comparable](index map[selector.Selector]map[T]struct{}, key selector.Selector, v T) {
	bucket := index[key]
	if bucket == nil {
		bucket = map[T]struct{}{}
		index[key] = bucket
	}
	bucket[v] = struct{}{}
}

func removeFrom[T comparable](index map[selector.Selector]map[T]struct{}, key selector.Selector, v T) {
	delete(index[key], v)
	if len(index[key]) == 0 {
		delete(index, key)
	}
}

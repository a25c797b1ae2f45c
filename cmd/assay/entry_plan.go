package main

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// planned is one entry of a file and what becomes of it.
type planned struct {
	want    *types.Entry // its id is that of the stored one, once there is one
	key     string       // entryKey of want
	have    *types.Entry // nil: it is to be made
	changes []fieldChange
	mask    *types.EntryMask // names the fields of changes
	err     error            // why it was not done
}

// fieldChange is a field in which a stored entry differs from the file. Values
// are as in the JSON of an entry.
type fieldChange struct {
	Field    string `json:"field"`
	Old      any    `json:"old"`
	New      any    `json:"new"`
	from, to string // the same for people
}

func (p *planned) action() string {
	switch {
	case p.have == nil:
		return "create"
	case len(p.changes) > 0:
		return "update"
	}
	return "none"
}

// fields names the fields that change.
func (p *planned) fields() string {
	names := make([]string, len(p.changes))
	for i, c := range p.changes {
		names[i] = c.Field
	}
	return strings.Join(names, ",")
}

// entryField is a field of an entry that a file says.
type entryField struct {
	name  string
	mask  func(*types.EntryMask) *bool
	same  func(a, b *types.Entry) bool
	value func(entryShape) any
	text  func(entryShape) string
}

func entryFields() []entryField {
	return []entryField{
		{
			"spiffe_id", func(m *types.EntryMask) *bool { return &m.SpiffeId },
			func(a, b *types.Entry) bool { return sameID(a.GetSpiffeId(), b.GetSpiffeId()) },
			func(e entryShape) any { return e.SPIFFEID }, func(e entryShape) string { return e.SPIFFEID },
		},
		{
			"parent_id", func(m *types.EntryMask) *bool { return &m.ParentId },
			func(a, b *types.Entry) bool { return sameID(a.GetParentId(), b.GetParentId()) },
			func(e entryShape) any { return e.ParentID }, func(e entryShape) string { return e.ParentID },
		},
		{
			"selectors", func(m *types.EntryMask) *bool { return &m.Selectors },
			func(a, b *types.Entry) bool {
				return slices.EqualFunc(a.GetSelectors(), b.GetSelectors(), sameSelector)
			},
			func(e entryShape) any { return e.Selectors }, func(e entryShape) string { return strings.Join(e.Selectors, ", ") },
		},
		{
			"x509_svid_ttl_seconds", func(m *types.EntryMask) *bool { return &m.X509SvidTtl },
			func(a, b *types.Entry) bool { return a.GetX509SvidTtl() == b.GetX509SvidTtl() },
			func(e entryShape) any { return e.X509SVIDTTLSeconds }, entryShape.ttl,
		},
		{
			"dns_names", func(m *types.EntryMask) *bool { return &m.DnsNames },
			func(a, b *types.Entry) bool { return slices.Equal(a.GetDnsNames(), b.GetDnsNames()) },
			func(e entryShape) any { return e.DNSNames },
			func(e entryShape) string { return cmp.Or(strings.Join(e.DNSNames, ", "), "none") },
		},
		{
			"hint", func(m *types.EntryMask) *bool { return &m.Hint },
			func(a, b *types.Entry) bool { return a.GetHint() == b.GetHint() },
			func(e entryShape) any { return e.Hint }, func(e entryShape) string { return strconv.Quote(e.Hint) },
		},
		{
			"store_svid", func(m *types.EntryMask) *bool { return &m.StoreSvid },
			func(a, b *types.Entry) bool { return a.GetStoreSvid() == b.GetStoreSvid() },
			func(e entryShape) any { return e.StoreSVID }, func(e entryShape) string { return yesNo(e.StoreSVID) },
		},
		{
			"expires_at", func(m *types.EntryMask) *bool { return &m.ExpiresAt },
			func(a, b *types.Entry) bool { return a.GetExpiresAt() == b.GetExpiresAt() },
			func(e entryShape) any { return e.ExpiresAt },
			func(e entryShape) string { return cmp.Or(stampOf(e.ExpiresAt), "never") },
		},
	}
}

func sameID(a, b *types.SPIFFEID) bool {
	return a.GetPath() == b.GetPath() && a.GetTrustDomain() == b.GetTrustDomain()
}

func sameSelector(a, b *types.Selector) bool { return compareSelectors(a, b) == 0 }

func compareSelectors(a, b *types.Selector) int {
	return cmp.Or(strings.Compare(a.GetType(), b.GetType()), strings.Compare(a.GetValue(), b.GetValue()))
}

// compareWith finds for each entry of a file what is stored of it, and how that
// differs. An entry of the file is the stored one of its id, else the one of
// its SPIFFE ID, parent and selectors.
func compareWith(stored []*types.Entry, plan []planned) {
	matchByKey(stored, plan, matchByID(stored, plan))
	fields := entryFields()
	for i := range plan {
		plan[i].compare(fields)
	}
}

// matchByID returns the ids that it found.
func matchByID(stored []*types.Entry, plan []planned) (taken map[string]bool) {
	byID := make(map[string]*types.Entry, len(stored))
	for _, e := range stored {
		byID[e.GetId()] = e
	}
	taken = map[string]bool{}
	for i := range plan {
		p := &plan[i]
		if p.have = byID[p.want.GetId()]; p.have != nil {
			taken[p.want.GetId()] = true
		}
	}
	return taken
}

// matchByKey does the rest. A stored entry that is another's by its id is not
// there any more under its key.
func matchByKey(stored []*types.Entry, plan []planned, taken map[string]bool) {
	if len(taken) == len(plan) {
		return
	}
	byKey := make(map[string]*types.Entry, len(stored))
	for _, e := range stored {
		if !taken[e.GetId()] {
			byKey[entryKey(e)] = e
		}
	}
	for i := range plan {
		p := &plan[i]
		if p.have != nil {
			continue
		}
		if p.have = byKey[p.key]; p.have != nil {
			p.want.Id = p.have.GetId()
		}
	}
}

// compare finds the fields in which the stored entry differs.
func (p *planned) compare(fields []entryField) {
	if p.have == nil {
		return
	}
	for _, f := range fields {
		if f.same(p.want, p.have) {
			continue
		}
		if p.mask == nil {
			p.mask = &types.EntryMask{}
		}
		*f.mask(p.mask) = true
		old, next := entryFromProto(p.have), entryFromProto(p.want)
		p.changes = append(p.changes, fieldChange{
			Field: f.name, Old: f.value(old), New: f.value(next), from: f.text(old), to: f.text(next),
		})
	}
}

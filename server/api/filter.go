package api

import (
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/registry"
)

// entryFilter is the filter of both ListEntries and CountEntries.
type entryFilter struct {
	registry.EntryFilter
	// none: no entry can match, since it asks for what no entry has yet.
	none bool
}

// filterOf makes one shape of the two messages that the API has for the filter.
func filterOf(f *entryv1.CountEntriesRequest_Filter) *entryv1.ListEntriesRequest_Filter {
	if f == nil {
		return nil
	}
	return &entryv1.ListEntriesRequest_Filter{
		BySpiffeId: f.GetBySpiffeId(), ByParentId: f.GetByParentId(), BySelectors: f.GetBySelectors(),
		ByFederatesWith: f.GetByFederatesWith(), ByHint: f.GetByHint(), ByDownstream: f.GetByDownstream(),
	}
}

func entryFilterFromProto(td spiffeid.TrustDomain, p *entryv1.ListEntriesRequest_Filter) (f entryFilter, err error) {
	if p.GetBySpiffeId() != nil {
		if f.SPIFFEID, err = idFromProto(td, "by_spiffe_id", p.GetBySpiffeId()); err != nil {
			return entryFilter{}, err
		}
	}
	if p.GetByParentId() != nil {
		if f.ParentID, err = idFromProto(td, "by_parent_id", p.GetByParentId()); err != nil {
			return entryFilter{}, err
		}
	}
	if p.GetBySelectors() != nil {
		if f.Selectors, f.Match, err = selectorMatch("by_selectors", p.GetBySelectors()); err != nil {
			return entryFilter{}, err
		}
	}
	if hint := p.GetByHint(); hint != nil {
		value := hint.GetValue()
		f.Hint = &value
	}
	if fed := p.GetByFederatesWith(); fed != nil {
		if err := checkFederatesMatch(fed); err != nil {
			return entryFilter{}, err
		}
		f.none = true // whatever the match, it takes one common trust domain at least
	}
	if wanted(p.GetByDownstream(), true) {
		f.none = true
	}
	return f, nil
}

func checkFederatesMatch(p *types.FederatesWithMatch) error {
	if len(p.GetTrustDomains()) == 0 {
		return fault.New(fault.Invalid, "filter_invalid", "by_federates_with names no trust domain")
	}
	for _, text := range p.GetTrustDomains() {
		id, err := name.ParseID("spiffe://" + strings.TrimPrefix(text, "spiffe://"))
		if err != nil || id.Path() != "" {
			return fault.New(fault.Invalid, "filter_invalid", "by_federates_with has a name that is not one of a trust domain, as example.org is")
		}
	}
	if _, known := types.FederatesWithMatch_MatchBehavior_name[int32(p.GetMatch())]; !known {
		return fault.New(fault.Invalid, "filter_invalid", "by_federates_with has a match behaviour that is not known")
	}
	return nil
}

// selectorMatch reads a match on selectors. An empty set would match in ways
// that nobody means.
func selectorMatch(what string, p *types.SelectorMatch) (selector.Set, registry.Match, error) {
	if len(p.GetSelectors()) == 0 {
		return nil, 0, fault.New(fault.Invalid, "filter_invalid", what+" names no selector")
	}
	set, err := selectorsFromProto(p.GetSelectors())
	if err != nil {
		return nil, 0, err
	}
	switch p.GetMatch() {
	case types.SelectorMatch_MATCH_EXACT:
		return set, registry.MatchExact, nil
	case types.SelectorMatch_MATCH_SUBSET:
		return set, registry.MatchSubset, nil
	case types.SelectorMatch_MATCH_SUPERSET:
		return set, registry.MatchSuperset, nil
	case types.SelectorMatch_MATCH_ANY:
		return set, registry.MatchAny, nil
	}
	return nil, 0, fault.New(fault.Invalid, "filter_invalid", what+" has a match behaviour that is not known")
}

// matches says whether the selectors that a candidate has match set. A
// candidate without selectors is no match: subset means a non-empty one.
func matches(have, set selector.Set, how registry.Match) bool {
	switch how {
	case registry.MatchSubset:
		return len(have) > 0 && set.Contains(have)
	case registry.MatchSuperset:
		return have.Contains(set)
	case registry.MatchAny:
		return slices.ContainsFunc(set, func(s selector.Selector) bool { return have.Contains(selector.Set{s}) })
	}
	return slices.Equal(have, set)
}

func wanted(b *wrapperspb.BoolValue, value bool) bool { return b != nil && b.GetValue() == value }

// agentFilter selects agents.
type agentFilter struct {
	attestor      string
	selectors     selector.Set
	match         registry.Match
	banned        *wrapperspb.BoolValue
	canReattest   *wrapperspb.BoolValue
	expiresBefore time.Time
}

// agentFilterMessage is what the filters of ListAgents and CountAgents share.
type agentFilterMessage interface {
	GetByAttestationType() string
	GetBySelectorMatch() *types.SelectorMatch
	GetByBanned() *wrapperspb.BoolValue
	GetByCanReattest() *wrapperspb.BoolValue
	GetByExpiresBefore() string
}

func agentFilterFromProto(p agentFilterMessage) (f agentFilter, err error) {
	f = agentFilter{attestor: p.GetByAttestationType(), banned: p.GetByBanned(), canReattest: p.GetByCanReattest()}
	if p.GetBySelectorMatch() != nil {
		if f.selectors, f.match, err = selectorMatch("by_selector_match", p.GetBySelectorMatch()); err != nil {
			return agentFilter{}, err
		}
	}
	if text := p.GetByExpiresBefore(); text != "" {
		if f.expiresBefore, err = expiresBefore(text); err != nil {
			return agentFilter{}, err
		}
	}
	return f, nil
}

// expiresBefore reads a moment as SPIRE's command line writes it, or RFC 3339.
func expiresBefore(text string) (time.Time, error) {
	for _, layout := range []string{"2006-01-02 15:04:05 -0700 -07", time.RFC3339} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fault.New(fault.Invalid, "filter_invalid", "by_expires_before is a time like 2026-11-23T15:04:05Z")
}

func (f *agentFilter) matches(a *registry.Agent) bool {
	return (f.attestor == "" || f.attestor == a.Attestor) &&
		(f.selectors == nil || matches(a.Selectors, f.selectors, f.match)) &&
		(f.banned == nil || f.banned.GetValue() == a.Banned) &&
		(f.canReattest == nil || f.canReattest.GetValue() == a.CanReattest) &&
		(f.expiresBefore.IsZero() || svidEnd(a).Before(f.expiresBefore))
}

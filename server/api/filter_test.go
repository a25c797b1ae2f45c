package api

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/registry"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// NEG-1, ID-18: nothing is normalised into something acceptable, and no
// refusal repeats its input.
func TestSPIFFEIDsAreTakenInTheirOnlyForm(t *testing.T) {
	good := &types.SPIFFEID{TrustDomain: "example.org", Path: "/ns/a/sa/b"}
	if id, err := idFromProto(td, "spiffe_id", good); err != nil || id.String() != "spiffe://example.org/ns/a/sa/b" {
		t.Fatalf("%v, %v", id, err)
	}
	for _, bad := range []*types.SPIFFEID{
		nil,
		{},
		{TrustDomain: "example.org"},
		{Path: "/a"},
		{TrustDomain: "Example.org", Path: "/a"},
		{TrustDomain: "other.org", Path: "/a"},
		{TrustDomain: "spiffe://example.org", Path: "/a"},
		{TrustDomain: "example.org/a", Path: "/a"},
		{TrustDomain: "example.org:80", Path: "/a"},
		{TrustDomain: "u@example.org", Path: "/a"},
		{TrustDomain: "example.org", Path: "a"},
		{TrustDomain: "example.org", Path: "/"},
		{TrustDomain: "example.org", Path: "/a/"},
		{TrustDomain: "example.org", Path: "//a"},
		{TrustDomain: "example.org", Path: "/a//b"},
		{TrustDomain: "example.org", Path: "/../a"},
		{TrustDomain: "example.org", Path: "/a/./b"},
		{TrustDomain: "example.org", Path: "/%2e%2e/a"},
		{TrustDomain: "example.org", Path: "/a?b"},
		{TrustDomain: "example.org", Path: "/a#"},
		{TrustDomain: "example.org", Path: "/a\x00"},
		{TrustDomain: "example.org", Path: "/а"},
		{TrustDomain: "example.org", Path: "/secretcanary~"},
	} {
		_, err := idFromProto(td, "spiffe_id", bad)
		if fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != "spiffe_id_invalid" {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func FuzzIDFromProto(f *testing.F) {
	f.Add("example.org", "/a")
	f.Add("example.org", "/../a")
	f.Fuzz(func(t *testing.T, domain, path string) {
		id, err := idFromProto(td, "spiffe_id", &types.SPIFFEID{TrustDomain: domain, Path: path})
		if err == nil && id.String() != "spiffe://"+domain+path {
			t.Fatalf("%q %q became %s", domain, path, id)
		}
	})
}

func set(texts ...string) selector.Set {
	list := make([]selector.Selector, len(texts))
	for i, text := range texts {
		list[i] = selector.Selector{Type: text, Value: "x"}
	}
	return selector.NewSet(list...)
}

// The examples are those of SPIRE's selector.proto; for MATCH_SUBSET its text
// is followed ("a non-empty subset of the provided set").
func TestSelectorMatchBehaviours(t *testing.T) {
	e1, e2, e3, none := set("a", "b", "c"), set("a", "b"), set("a"), set()
	for _, c := range []struct {
		how  registry.Match
		with selector.Set
		want map[string]bool
	}{
		{registry.MatchExact, set("b", "a"), map[string]bool{"e2": true}},
		{registry.MatchSubset, set("a", "b"), map[string]bool{"e2": true, "e3": true}},
		{registry.MatchSuperset, set("a", "b"), map[string]bool{"e1": true, "e2": true}},
		{registry.MatchAny, set("b", "z"), map[string]bool{"e1": true, "e2": true}},
	} {
		for name, have := range map[string]selector.Set{"e1": e1, "e2": e2, "e3": e3, "none": none} {
			if got := matches(have, c.with, c.how); got != c.want[name] {
				t.Errorf("match %d of %s: got %v", c.how, name, got)
			}
		}
	}
}

func TestFiltersThatMeanNothingAreRefused(t *testing.T) {
	for name, f := range map[string]*entryv1.ListEntriesRequest_Filter{
		"no selectors":      {BySelectors: &types.SelectorMatch{}},
		"unknown match":     {BySelectors: &types.SelectorMatch{Match: 9, Selectors: []*types.Selector{{Type: "a", Value: "b"}}}},
		"bad selector":      {BySelectors: &types.SelectorMatch{Selectors: []*types.Selector{{Type: "a"}}}},
		"no trust domain":   {ByFederatesWith: &types.FederatesWithMatch{}},
		"malformed ID":      {BySpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "a"}},
		"foreign parent ID": {ByParentId: &types.SPIFFEID{TrustDomain: "other.org", Path: "/a"}},
	} {
		if _, err := entryFilterFromProto(td, f); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	f, err := entryFilterFromProto(td, &entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(true)})
	if err != nil || !f.none {
		t.Errorf("downstream entries: %+v, %v", f, err)
	}
	f, err = entryFilterFromProto(td, filterOf(&entryv1.CountEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(false), ByHint: wrapperspb.String("")}))
	if err != nil || f.none || f.Hint == nil || *f.Hint != "" {
		t.Errorf("an empty hint is a hint to look for: %+v, %v", f, err)
	}
	if f, err = entryFilterFromProto(td, filterOf(nil)); err != nil || f.none {
		t.Errorf("no filter: %+v, %v", f, err)
	}
}

func TestAgentFilter(t *testing.T) {
	now := time.Now()
	agent := registry.Agent{Attestor: "join_token", Selectors: set("a"), ActiveSerial: "1", NotAfter: now.Add(time.Hour), CanReattest: true}
	for name, c := range map[string]struct {
		filter *spireagentv1.ListAgentsRequest_Filter
		want   bool
	}{
		"none":              {nil, true},
		"attestor":          {&spireagentv1.ListAgentsRequest_Filter{ByAttestationType: "join_token"}, true},
		"another attestor":  {&spireagentv1.ListAgentsRequest_Filter{ByAttestationType: "x509pop"}, false},
		"not banned":        {&spireagentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(false)}, true},
		"banned":            {&spireagentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(true)}, false},
		"can reattest":      {&spireagentv1.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(true)}, true},
		"can't reattest":    {&spireagentv1.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(false)}, false},
		"expires later":     {&spireagentv1.ListAgentsRequest_Filter{ByExpiresBefore: now.Add(-time.Hour).Format(time.RFC3339)}, false},
		"expires before":    {&spireagentv1.ListAgentsRequest_Filter{ByExpiresBefore: now.Add(2 * time.Hour).Format("2006-01-02 15:04:05 -0700 -07")}, true},
		"selectors":         {&spireagentv1.ListAgentsRequest_Filter{BySelectorMatch: &types.SelectorMatch{Selectors: selectorsToProto(set("a"))}}, true},
		"another selectors": {&spireagentv1.ListAgentsRequest_Filter{BySelectorMatch: &types.SelectorMatch{Selectors: selectorsToProto(set("b"))}}, false},
	} {
		f, err := agentFilterFromProto(c.filter)
		if err != nil || f.matches(&agent) != c.want {
			t.Errorf("%s: %v, %v", name, f.matches(&agent), err)
		}
	}
	if _, err := agentFilterFromProto(&spireagentv1.ListAgentsRequest_Filter{ByExpiresBefore: "soon"}); fault.ReasonOf(err) != "filter_invalid" {
		t.Errorf("a time that is none: %v", err)
	}
}

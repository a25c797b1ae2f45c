package main

import (
	"testing"
	"time"

	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestListsAskForWhatTheFlagsSay(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	two := selectors("unix", "uid:1", "unix", "gid:2")
	for match, want := range map[string]types.SelectorMatch_MatchBehavior{
		"exact": types.SelectorMatch_MATCH_EXACT, "subset": types.SelectorMatch_MATCH_SUBSET,
		"superset": types.SelectorMatch_MATCH_SUPERSET, "any": types.SelectorMatch_MATCH_ANY,
	} {
		with := &types.SelectorMatch{Selectors: two, Match: want}
		for _, verb := range [][]string{{"entry", "list"}, {"entry", "count"}, {"agent", "list"}} {
			f.filter, f.nodes = nil, nil
			got := assay(t, vars, append(verb, "--selector", "unix:uid:1", "--selector", "unix:gid:2", "--match", match)...)
			if got.code != 0 || !proto.Equal(f.filter.GetBySelectors(), with) && !proto.Equal(f.nodes.GetBySelectorMatch(), with) {
				t.Errorf("%v --match %s: %+v asked for %v, %v", verb, match, got, f.filter, f.nodes)
			}
		}
	}
	for name, c := range map[string]struct {
		args []string
		want *spireagent.ListAgentsRequest_Filter
	}{
		"nothing":      {nil, &spireagent.ListAgentsRequest_Filter{}},
		"attestor":     {[]string{"--attestor", "x509pop"}, &spireagent.ListAgentsRequest_Filter{ByAttestationType: "x509pop"}},
		"banned":       {[]string{"--banned"}, &spireagent.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(true)}},
		"not banned":   {[]string{"--banned=false", "--can-reattest"}, &spireagent.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(false), ByCanReattest: wrapperspb.Bool(true)}},
		"can't again":  {[]string{"--can-reattest=false"}, &spireagent.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(false)}},
		"before a day": {[]string{"--expires-before", "2020-01-01T01:00:00+01:00"}, &spireagent.ListAgentsRequest_Filter{ByExpiresBefore: "2020-01-01T00:00:00Z"}},
	} {
		if got := assay(t, vars, append([]string{"agent", "list"}, c.args...)...); got.code != 0 || !proto.Equal(f.nodes, c.want) {
			t.Errorf("%s: %+v asked for %v", name, got, f.nodes)
		}
	}
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	in, err := agentFilter{before: "90m", selectorFilter: selectorFilter{match: defaultMatch}}.proto(func(string) bool { return false }, now)
	if err != nil || in.GetByExpiresBefore() != "2026-01-01T01:30:00Z" {
		t.Errorf("in 90 minutes: %v, %v", in, err)
	}
}

func TestFiltersThatSayNothingAreUsageErrors(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	for _, args := range [][]string{
		{"entry", "list", "--match", "exact"},
		{"entry", "list", "--selector", "a:b", "--match", "most"},
		{"entry", "count", "--match", "any"},
		{"agent", "list", "--match", "subset"},
		{"agent", "list", "--selector", "a"},
		{"agent", "list", "--expires-before", "soon"},
		{"agent", "list", "--banned", "maybe"},
	} {
		if got := assay(t, vars, args...); got.code != exitUsage {
			t.Errorf("%v: %+v", args, got)
		}
	}
	if f.calls != 0 {
		t.Errorf("%d calls were made", f.calls)
	}
}

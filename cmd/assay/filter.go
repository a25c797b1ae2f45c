package main

import (
	"slices"
	"time"

	"github.com/spf13/cobra"
	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// selectorFilter holds the flags --selector and --match.
type selectorFilter struct {
	selectors []string
	match     string
}

// matchNames are the values of --match, in the order of SPIRE's numbers.
var matchNames = []string{"exact", "subset", "superset", "any"}

const defaultMatch = "superset"

func (f *selectorFilter) flags(cmd *cobra.Command, what string) {
	fl := cmd.Flags()
	fl.StringArrayVar(&f.selectors, "selector", nil, "only "+what+" with this type:value; repeat for several")
	fl.StringVar(&f.match, "match", defaultMatch,
		"how --selector is meant: superset (all of them, maybe more), exact (these and no others), subset (no others), any (one of them)")
	_ = cmd.RegisterFlagCompletionFunc("match", cobra.FixedCompletions(matchNames, cobra.ShellCompDirectiveNoFileComp))
}

// proto is nil if nothing was said about selectors.
func (f selectorFilter) proto() (*types.SelectorMatch, error) {
	how := slices.Index(matchNames, f.match)
	if how < 0 {
		return nil, usageError("--match must be exact, subset, superset or any, got " + quote(f.match))
	}
	if len(f.selectors) == 0 {
		if f.match != defaultMatch {
			return nil, usageError("--match needs a --selector")
		}
		return nil, nil
	}
	selectors, err := parseSelectors(f.selectors)
	if err != nil {
		return nil, err
	}
	return &types.SelectorMatch{Selectors: selectors, Match: types.SelectorMatch_MatchBehavior(how)}, nil
}

// entryFilter holds the flags of `entry list` and `entry count`.
type entryFilter struct {
	selectorFilter
	spiffeID, parentID, hint string
	hintSet                  bool
}

func (f entryFilter) proto() (*spireentry.ListEntriesRequest_Filter, error) {
	out := &spireentry.ListEntriesRequest_Filter{}
	ids := []struct {
		flag, text string
		to         **types.SPIFFEID
	}{{"--spiffe-id", f.spiffeID, &out.BySpiffeId}, {"--parent-id", f.parentID, &out.ByParentId}}
	for _, want := range ids {
		if want.text == "" {
			continue
		}
		if err := readID(want.flag, want.text, want.to); err != nil {
			return nil, err
		}
	}
	var err error
	if out.BySelectors, err = f.selectorFilter.proto(); err != nil {
		return nil, err
	}
	if f.hintSet {
		out.ByHint = wrapperspb.String(f.hint)
	}
	return out, nil
}

// flags adds the filter to a verb.
func (f *entryFilter) flags(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.spiffeID, "spiffe-id", "", "only entries for this identity")
	fl.StringVar(&f.parentID, "parent-id", "", "only entries of this agent or alias")
	fl.StringVar(&f.hint, "hint", "", `only entries with this hint; "" for those without one`)
	f.selectorFilter.flags(cmd, "entries")
}

// agentFilter holds the flags of `agent list`.
type agentFilter struct {
	selectorFilter
	attestor, before    string
	banned, canReattest bool
}

func (f *agentFilter) flags(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.attestor, "attestor", "", "only agents that attested so, as join_token or x509pop")
	fl.BoolVar(&f.banned, "banned", false, "only banned agents; --banned=false: only those that are not")
	fl.BoolVar(&f.canReattest, "can-reattest", false, "only agents that can attest again by themselves; =false: only those that can't")
	fl.StringVar(&f.before, "expires-before", "", "only agents whose X.509-SVID ends before 2026-12-31T00:00:00Z, or 3h from now; 0s: has ended")
	f.selectorFilter.flags(cmd, "agents")
}

func (f agentFilter) proto(given func(flag string) bool, now time.Time) (*spireagent.ListAgentsRequest_Filter, error) {
	out := &spireagent.ListAgentsRequest_Filter{ByAttestationType: f.attestor}
	if given("banned") {
		out.ByBanned = wrapperspb.Bool(f.banned)
	}
	if given("can-reattest") {
		out.ByCanReattest = wrapperspb.Bool(f.canReattest)
	}
	if f.before != "" {
		at, err := time.Parse(time.RFC3339, f.before)
		if ahead, derr := time.ParseDuration(f.before); derr == nil {
			at, err = now.Add(ahead), nil
		}
		if err != nil {
			return nil, usageError("--expires-before must be a time as 2026-12-31T00:00:00Z or a duration as 3h, got " + quote(f.before))
		}
		out.ByExpiresBefore = at.UTC().Format(time.RFC3339)
	}
	var err error
	out.BySelectorMatch, err = f.selectorFilter.proto()
	return out, err
}

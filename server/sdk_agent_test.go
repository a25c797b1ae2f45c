package server

import (
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// fleet is one agent of each kind: attested and not seen since, active,
// renewed, banned, one that told its version, and two that attested by
// certificate.
func (h *harness) fleet(n *nodes) (ids map[string]spiffeid.ID, certs map[string]*agent) {
	h.t.Helper()
	certs = map[string]*agent{}
	for _, kind := range []string{"new", "active", "renewed", "banned", "versioned"} {
		certs[kind] = h.newAgent()
	}
	certs["machine"] = h.proven(n.machine("a.example.org", time.Hour))
	certs["machine2"] = h.proven(n.machine("b.example.org", time.Hour))
	for kind, a := range certs {
		if kind == "new" {
			continue
		}
		if _, err := a.SignX509(h.t.Context(), &agentv1.SignX509Request{}); err != nil {
			h.t.Fatal(err)
		}
	}
	key := newKey(h.t)
	renewed, err := certs["renewed"].Renew(h.t.Context(), &agentv1.RenewRequest{Csr: newCSR(h.t, key, nil)})
	if err != nil {
		h.t.Fatal(err)
	}
	certs["renewed"] = h.agentOf(renewed.GetIdentity(), key)
	if _, err := certs["renewed"].SignX509(h.t.Context(), &agentv1.SignX509Request{}); err != nil {
		h.t.Fatal(err)
	}
	if _, err := h.operator().agents.BanAgent(h.t.Context(), &spireagentv1.BanAgentRequest{Id: protoID(certs["banned"].id)}); err != nil {
		h.t.Fatal(err)
	}
	stream, err := certs["versioned"].Sync(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	say(h.t, stream, &agentv1.SyncRequest{Message: &agentv1.SyncRequest_Hello_{Hello: &agentv1.SyncRequest_Hello{AgentVersion: "v9"}}})
	one(h.t, stream)
	ids = map[string]spiffeid.ID{}
	for kind, a := range certs {
		ids[kind] = a.id
	}
	return ids, certs
}

func TestSDKAgentsAreWhatTheyAre(t *testing.T) {
	n := newNodes(t)
	h := start(t, n.configure)
	ids, certs := h.fleet(n)
	o := h.operator()
	for kind, id := range ids {
		got, err := o.agents.GetAgent(t.Context(), &spireagentv1.GetAgentRequest{Id: protoID(id)})
		if err != nil {
			t.Fatal(err)
		}
		leaf := certs[kind].leaf.Leaf
		want := &types.Agent{
			Id: protoID(id), AttestationType: "join_token", X509SvidSerialNumber: new(big.Int).Set(leaf.SerialNumber).String(), X509SvidExpiresAt: leaf.NotAfter.Unix(),
			Banned: kind == "banned",
		}
		if isMachine(kind) {
			want.AttestationType, want.CanReattest, want.Selectors = "x509pop", true, got.GetSelectors()
			if len(got.GetSelectors()) < 2 {
				t.Errorf("%s has selectors %v", kind, got.GetSelectors())
			}
		}
		if kind == "versioned" {
			want.AgentVersion = "v9"
		}
		if !proto.Equal(got, want) {
			t.Errorf("%s:\ngot  %v\nwant %v", kind, got, want)
		}
	}
}

func isMachine(kind string) bool { return strings.HasPrefix(kind, "machine") }

// Every combination of the filters of ListAgents and CountAgents, over pages
// of several sizes. Those that attested by token have no selectors and can't
// attest again; all certificates end in 12 hours, also that of the one that
// was not seen since.
func TestSDKAgentFiltersInEveryPageSize(t *testing.T) {
	n := newNodes(t)
	h := start(t, n.configure)
	ids, _ := h.fleet(n)
	o := h.operator()
	bools := []*wrapperspb.BoolValue{nil, wrapperspb.Bool(true), wrapperspb.Bool(false)}
	in := func(ahead time.Duration, layout string) string { return time.Now().Add(ahead).Format(layout) }
	const spires = "2006-01-02 15:04:05 -0700 -07"
	ends := map[string]bool{"": true, in(time.Hour, spires): false, in(24*time.Hour, spires): true, in(24*time.Hour, time.RFC3339): true, in(-time.Hour, time.RFC3339): false}
	selectors := map[string][]*types.Selector{}
	for kind, id := range ids {
		a, err := o.agents.GetAgent(t.Context(), &spireagentv1.GetAgentRequest{Id: protoID(id)})
		if err != nil {
			t.Fatal(err)
		}
		selectors[kind] = a.GetSelectors()
	}
	turn := 0
	check := func(f *spireagentv1.ListAgentsRequest_Filter) {
		t.Helper()
		want := []string{}
		for kind, id := range ids {
			attestor := "join_token"
			if isMachine(kind) {
				attestor = "x509pop"
			}
			if (f.ByAttestationType == "" || f.ByAttestationType == attestor) && ends[f.ByExpiresBefore] &&
				(f.ByBanned == nil || f.ByBanned.GetValue() == (kind == "banned")) &&
				(f.ByCanReattest == nil || f.ByCanReattest.GetValue() == isMachine(kind)) && satisfies(selectors[kind], f.BySelectorMatch) {
				want = append(want, id.Path())
			}
		}
		slices.Sort(want)
		size := []int32{0, 1, 2, 6, 7, 8}[turn%6]
		turn++
		what := fmt.Sprintf("pages of %d by %v", size, f)
		got := pagesOf(t, what, size, func(token string) (keys []string, next string) {
			resp, err := o.agents.ListAgents(t.Context(), &spireagentv1.ListAgentsRequest{Filter: f, PageSize: size, PageToken: token, OutputMask: &types.AgentMask{}})
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			for _, a := range resp.GetAgents() {
				keys = append(keys, a.GetId().GetPath())
			}
			return keys, resp.GetNextPageToken()
		})
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
		count, err := o.agents.CountAgents(t.Context(), &spireagentv1.CountAgentsRequest{Filter: &spireagentv1.CountAgentsRequest_Filter{
			ByAttestationType: f.ByAttestationType, ByBanned: f.ByBanned, ByCanReattest: f.ByCanReattest, ByExpiresBefore: f.ByExpiresBefore, BySelectorMatch: f.BySelectorMatch,
		}})
		if err != nil || int(count.GetCount()) != len(want) {
			t.Errorf("count by %v: %d, %v; want %d", f, count.GetCount(), err, len(want))
		}
	}
	for _, kind := range []string{"", "join_token", "x509pop", "k8s_psat"} {
		for before := range ends {
			for _, banned := range bools {
				for _, can := range bools {
					check(&spireagentv1.ListAgentsRequest_Filter{ByAttestationType: kind, ByBanned: banned, ByCanReattest: can, ByExpiresBefore: before})
				}
			}
		}
	}
	a, b := selectors["machine"], selectors["machine2"]
	for mode := range types.SelectorMatch_MatchBehavior_name {
		for _, some := range [][]*types.Selector{a, b, a[:1], a[1:], b[:2], append(slices.Clone(a), b...), append(slices.Clone(a), a...), selectorsOf("1"), append(selectorsOf("1"), a...)} {
			check(&spireagentv1.ListAgentsRequest_Filter{BySelectorMatch: &types.SelectorMatch{Selectors: some, Match: types.SelectorMatch_MatchBehavior(mode)}})
			check(&spireagentv1.ListAgentsRequest_Filter{BySelectorMatch: &types.SelectorMatch{Selectors: some, Match: types.SelectorMatch_MatchBehavior(mode)}, ByCanReattest: bools[1], ByBanned: bools[2]})
		}
	}
	for name, f := range map[string]*spireagentv1.ListAgentsRequest_Filter{
		"no selectors": {BySelectorMatch: &types.SelectorMatch{}}, "unknown match": {BySelectorMatch: &types.SelectorMatch{Selectors: selectorsOf("1"), Match: 4}},
		"no time": {ByExpiresBefore: "soon"},
	} {
		_, err := o.agents.ListAgents(t.Context(), &spireagentv1.ListAgentsRequest{Filter: f})
		wantReason(t, "list by "+name, err, fault.Invalid, "filter_invalid")
		_, err = o.agents.CountAgents(t.Context(), &spireagentv1.CountAgentsRequest{Filter: &spireagentv1.CountAgentsRequest_Filter{
			BySelectorMatch: f.GetBySelectorMatch(), ByExpiresBefore: f.GetByExpiresBefore(),
		}})
		wantReason(t, "count by "+name, err, fault.Invalid, "filter_invalid")
	}
}

func TestSDKAgentPagesAreStable(t *testing.T) {
	h := start(t)
	o := h.operator()
	for range 7 {
		h.newAgent()
	}
	got := pagesOf(t, "pages under changes", 2, func(token string) (keys []string, next string) {
		resp, err := o.agents.ListAgents(t.Context(), &spireagentv1.ListAgentsRequest{PageSize: 2, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range resp.GetAgents() {
			keys = append(keys, a.GetId().GetPath())
		}
		last := &types.SPIFFEID{TrustDomain: domain, Path: keys[len(keys)-1]}
		if _, err := o.agents.DeleteAgent(t.Context(), &spireagentv1.DeleteAgentRequest{Id: last}); err != nil {
			t.Fatal(err)
		}
		return keys, resp.GetNextPageToken()
	})
	if len(got) != 7 {
		t.Errorf("%d of 7 agents were seen", len(got))
	}
}

func TestSDKAgentOutputMasks(t *testing.T) {
	n := newNodes(t)
	h := start(t, n.configure)
	ids, _ := h.fleet(n)
	o := h.operator()
	for _, kind := range []string{"versioned", "banned", "machine"} {
		full, err := o.agents.GetAgent(t.Context(), &spireagentv1.GetAgentRequest{Id: protoID(ids[kind])})
		if err != nil {
			t.Fatal(err)
		}
		checkMasks(t, "GetAgent", full, &types.AgentMask{}, func(mask proto.Message) proto.Message {
			got, err := o.agents.GetAgent(t.Context(), &spireagentv1.GetAgentRequest{Id: protoID(ids[kind]), OutputMask: mask.(*types.AgentMask)})
			if err != nil {
				t.Fatal(err)
			}
			return got
		})
		checkMasks(t, "ListAgents", full, &types.AgentMask{}, func(mask proto.Message) proto.Message {
			got, err := o.agents.ListAgents(t.Context(), &spireagentv1.ListAgentsRequest{OutputMask: mask.(*types.AgentMask)})
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(got.GetAgents(), func(a *types.Agent) bool { return a.GetId().GetPath() == ids[kind].Path() })
			return got.GetAgents()[i]
		})
	}
}

func TestSDKAgentIDsThatAreNone(t *testing.T) {
	o := start(t).operator()
	for name, c := range map[string]struct {
		id   *types.SPIFFEID
		kind fault.Kind
	}{
		"missing": {nil, fault.Invalid}, "foreign": {&types.SPIFFEID{TrustDomain: "other.org", Path: "/a"}, fault.Invalid},
		"without path": {&types.SPIFFEID{TrustDomain: domain}, fault.Invalid}, "unknown": {&types.SPIFFEID{TrustDomain: domain, Path: "/assay/agent/join_token/x"}, fault.NotFound},
	} {
		_, get := o.agents.GetAgent(t.Context(), &spireagentv1.GetAgentRequest{Id: c.id})
		_, ban := o.agents.BanAgent(t.Context(), &spireagentv1.BanAgentRequest{Id: c.id})
		_, evict := o.agents.DeleteAgent(t.Context(), &spireagentv1.DeleteAgentRequest{Id: c.id})
		for verb, err := range map[string]error{"get": get, "ban": ban, "evict": evict} {
			if fault.KindOf(fault.FromStatus(err)) != c.kind {
				t.Errorf("%s of %s: %v", verb, name, err)
			}
		}
	}
}

func TestSDKBundleMasks(t *testing.T) {
	h := start(t)
	o := h.operator()
	full, err := o.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	roots := h.roots()
	if len(full.GetX509Authorities()) != len(roots) || string(full.GetX509Authorities()[0].GetAsn1()) != string(roots[0].Raw) || full.GetX509Authorities()[0].GetTainted() ||
		full.GetTrustDomain() != domain || full.GetSequenceNumber() == 0 || full.GetJwtAuthorities() != nil || full.GetWitAuthorities() != nil {
		t.Errorf("the bundle is %v", full)
	}
	checkMasks(t, "GetBundle", full, &types.BundleMask{}, func(mask proto.Message) proto.Message {
		got, err := o.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: mask.(*types.BundleMask)})
		if err != nil {
			t.Fatal(err)
		}
		return got
	})
}

package server

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/ca"
)

func createOf(entries ...*types.Entry) *entryv1.BatchCreateEntryRequest {
	return &entryv1.BatchCreateEntryRequest{Entries: entries}
}

func deleteOf(ids ...string) *entryv1.BatchDeleteEntryRequest {
	return &entryv1.BatchDeleteEntryRequest{Ids: ids}
}

func tokenOf(seconds int32) *spireagentv1.CreateJoinTokenRequest {
	return &spireagentv1.CreateJoinTokenRequest{Ttl: seconds}
}

var node = spiffeid.RequireFromString("spiffe://example.org/some/node")

func TestEntryComesBackAsItWasMade(t *testing.T) {
	h := start(t)
	o := h.operator()
	e := entry(node, "/a", "uid:2", "uid:1", "uid:2")
	e.Selectors = append(e.Selectors, &types.Selector{Type: "k8s", Value: "pod-label:app:x"})
	e.Id, e.Hint, e.X509SvidTtl, e.DnsNames, e.ExpiresAt = "my-entry", "main", 300, []string{"a.example.org"}, time.Now().Unix()+1000
	e.JwtSvidTtl, e.FederatesWith = 60, []string{"other.org"} // accepted, not honoured: they come back empty
	resp, err := o.entries.BatchCreateEntry(t.Context(), createOf(e))
	if err != nil {
		t.Fatal(err)
	}
	r := resp.GetResults()[0]
	if r.GetStatus().GetCode() != 0 || r.GetStatus().GetMessage() != "OK" {
		t.Fatalf("status %v", r.GetStatus())
	}
	got := r.GetEntry()
	if got.GetId() != "my-entry" || got.GetSpiffeId().GetPath() != "/a" || got.GetParentId().GetPath() != "/some/node" || len(got.GetSelectors()) != 3 ||
		got.GetHint() != "main" || got.GetX509SvidTtl() != 300 || got.GetDnsNames()[0] != "a.example.org" || got.GetExpiresAt() != e.ExpiresAt ||
		got.GetRevisionNumber() != 0 || time.Now().Unix()-got.GetCreatedAt() > 60 || got.GetJwtSvidTtl() != 0 || got.GetFederatesWith() != nil {
		t.Errorf("made: %v", got)
	}
	read, err := o.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "my-entry", OutputMask: &types.EntryMask{Hint: true}})
	if err != nil || read.GetId() != "my-entry" || read.GetHint() != "main" || read.GetSpiffeId() != nil {
		t.Errorf("masked: %v, %v", read, err)
	}
	line := h.audited("entry.create")
	if sub(line, "target", "entry_id") != "my-entry" || sub(line, "target", "spiffe_id") != "spiffe://example.org/a" || sub(line, "actor", "kind") != "operator" ||
		sub(line, "target", "parent_id") != "spiffe://example.org/some/node" || len(sub(line, "why", "selectors_hash").(string)) != 64 ||
		sub(line, "actor", "uid") != float64(os.Getuid()) || sub(line, "actor", "exe") == nil || sub(line, "request_id") == nil {
		t.Errorf("audit: %v", line)
	}
}

func TestEntriesOfABatchSucceedOrFailOneByOne(t *testing.T) {
	h := start(t)
	o := h.operator()
	o.create(t, entry(node, "/there"))
	change := func(f func(*types.Entry)) *types.Entry { e := entry(node, "/x"); f(e); return e }
	cases := []struct {
		what   string
		entry  *types.Entry
		code   codes.Code
		reason string
	}{
		{"good", entry(node, "/good"), codes.OK, "OK"},
		{"similar", entry(node, "/there"), codes.AlreadyExists, "entry_exists"},
		{"twice in the batch", entry(node, "/good"), codes.AlreadyExists, "entry_exists"},
		{"admin", change(func(e *types.Entry) { e.Admin = true }), codes.InvalidArgument, "entry_admin_unsupported"},
		{"downstream", change(func(e *types.Entry) { e.Downstream = true }), codes.InvalidArgument, "entry_downstream_unsupported"}, // X509-18
		{"nil", nil, codes.InvalidArgument, "spiffe_id_invalid"},
		{"no parent", change(func(e *types.Entry) { e.ParentId = nil }), codes.InvalidArgument, "spiffe_id_invalid"},
		{"foreign ID", change(func(e *types.Entry) { e.SpiffeId.TrustDomain = "other.org" }), codes.InvalidArgument, "spiffe_id_invalid"},
		{"reserved", change(func(e *types.Entry) { e.SpiffeId.Path = "/assay/agent/join_token/x" }), codes.InvalidArgument, "spiffe_id_invalid"},
		{"the server", change(func(e *types.Entry) { e.SpiffeId.Path = "/assay/server" }), codes.InvalidArgument, "spiffe_id_invalid"},
		{"no selectors", change(func(e *types.Entry) { e.Selectors = nil }), codes.InvalidArgument, "selector_missing"},
		{"bad selector", change(func(e *types.Entry) { e.Selectors[0].Type = "a:b" }), codes.InvalidArgument, "selector_invalid"},
		{"life", change(func(e *types.Entry) { e.X509SvidTtl = 7200 }), codes.InvalidArgument, "ttl_out_of_range"},
		{"negative life", change(func(e *types.Entry) { e.X509SvidTtl = -1 }), codes.InvalidArgument, "ttl_out_of_range"},
		{"over already", change(func(e *types.Entry) { e.ExpiresAt = 1000 }), codes.InvalidArgument, "expires_at_past"},
		{"end before time", change(func(e *types.Entry) { e.ExpiresAt = math.MinInt64 }), codes.InvalidArgument, "expires_at_invalid"},
		{"DNS name", change(func(e *types.Entry) { e.DnsNames = []string{"a..b"} }), codes.InvalidArgument, "dns_name_invalid"},
		{"also good", entry(node, "/also-good"), codes.OK, "OK"},
	}
	req := createOf()
	for _, c := range cases {
		req.Entries = append(req.Entries, c.entry)
	}
	resp, err := o.entries.BatchCreateEntry(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range cases {
		r := resp.GetResults()[i]
		if codes.Code(r.GetStatus().GetCode()) != c.code || !strings.HasPrefix(r.GetStatus().GetMessage(), c.reason) {
			t.Errorf("%s: %v", c.what, r.GetStatus())
		}
		// SPIRE: the entry is set if it was made or is there already.
		if hasEntry := r.GetEntry() != nil; hasEntry != (c.code == codes.OK || c.code == codes.AlreadyExists) {
			t.Errorf("%s: entry %v", c.what, r.GetEntry())
		}
	}
	count, err := o.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
	if err != nil || count.GetCount() != 3 {
		t.Errorf("%d entries, %v", count.GetCount(), err)
	}
}

func TestEntriesAreListedInPagesAndByFilter(t *testing.T) {
	h := start(t)
	o := h.operator()
	other := spiffeid.RequireFromString("spiffe://example.org/other/node")
	var all []*types.Entry
	for i := range 25 {
		all = append(all, entry(node, fmt.Sprintf("/n/%d", i), "uid:1", fmt.Sprintf("gid:%d", i)))
	}
	hinted := entry(other, "/hinted", "uid:7")
	hinted.Hint = "blue"
	o.create(t, append(all, hinted)...)

	var ids []string
	token := ""
	for page := 0; ; page++ {
		resp, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 10, PageToken: token, OutputMask: &types.EntryMask{}})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range resp.GetEntries() {
			ids = append(ids, e.GetId())
			if e.GetSpiffeId() != nil {
				t.Error("the mask is not applied")
			}
		}
		if token = resp.GetNextPageToken(); token == "" {
			if page != 2 {
				t.Errorf("26 entries in %d pages of 10", page+1)
			}
			break
		}
	}
	if slices.Sort(ids); len(slices.Compact(ids)) != 26 {
		t.Errorf("%d different entries in all pages", len(slices.Compact(ids)))
	}

	unix := func(values ...string) []*types.Selector { return entry(node, "/x", values...).Selectors }
	for name, c := range map[string]struct {
		filter *entryv1.ListEntriesRequest_Filter
		want   int
	}{
		"none":          {nil, 26},
		"ID":            {&entryv1.ListEntriesRequest_Filter{BySpiffeId: &types.SPIFFEID{TrustDomain: domain, Path: "/n/3"}}, 1},
		"parent":        {&entryv1.ListEntriesRequest_Filter{ByParentId: &types.SPIFFEID{TrustDomain: domain, Path: "/other/node"}}, 1},
		"hint":          {&entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("blue")}, 1},
		"no hint":       {&entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("")}, 25},
		"downstream":    {&entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(true)}, 0},
		"no downstream": {&entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(false)}, 26},
		"federates":     {&entryv1.ListEntriesRequest_Filter{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{"a"}, Match: types.FederatesWithMatch_MATCH_ANY}}, 0},
		"exact":         {&entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Selectors: unix("gid:3", "uid:1")}}, 1},
		"exact, fewer":  {&entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Selectors: unix("uid:1")}}, 0},
		"subset": {&entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{
			Selectors: unix("uid:1", "gid:3", "gid:4", "uid:7"), Match: types.SelectorMatch_MATCH_SUBSET,
		}}, 3},
		"superset": {&entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Selectors: unix("uid:1"), Match: types.SelectorMatch_MATCH_SUPERSET}}, 25},
		"any":      {&entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Selectors: unix("uid:7", "gid:1"), Match: types.SelectorMatch_MATCH_ANY}}, 2},
	} {
		list, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: c.filter, PageSize: math.MaxInt32})
		if err != nil || len(list.GetEntries()) != c.want {
			t.Errorf("list by %s: %d, %v", name, len(list.GetEntries()), err)
		}
		f := c.filter
		count, err := o.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
			BySpiffeId: f.GetBySpiffeId(), ByParentId: f.GetByParentId(), BySelectors: f.GetBySelectors(),
			ByFederatesWith: f.GetByFederatesWith(), ByHint: f.GetByHint(), ByDownstream: f.GetByDownstream(),
		}})
		if err != nil || int(count.GetCount()) != c.want {
			t.Errorf("count by %s: %d, %v", name, count.GetCount(), err)
		}
	}
	_, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageToken: "made up"})
	wantReason(t, "page token", err, fault.Invalid, "page_token_invalid")
	_, err = o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: -1})
	wantReason(t, "page size", err, fault.Invalid, "page_size_invalid")
	_, err = o.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{BySelectors: &types.SelectorMatch{}}})
	wantReason(t, "empty match", err, fault.Invalid, "filter_invalid")
}

// NEG-28: a page never grows over what clients receive by default.
func TestPagesOfBigEntriesStayBelowTheReceiveLimit(t *testing.T) {
	h := start(t)
	o := h.operator()
	for i := range 10 {
		var batch []*types.Entry
		for j := range 15 {
			e := entry(node, fmt.Sprintf("/big/%d/%d", i, j), "uid:1")
			for k := range 40 {
				e.Selectors = append(e.Selectors, &types.Selector{Type: "x", Value: fmt.Sprintf("%d:%s", k, strings.Repeat("v", 990))})
			}
			batch = append(batch, e)
		}
		o.create(t, batch...)
	}
	seen, pages, token := 0, 0, ""
	for pages == 0 || token != "" {
		resp, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		seen, pages, token = seen+len(resp.GetEntries()), pages+1, resp.GetNextPageToken()
	}
	if seen != 150 || pages < 2 {
		t.Errorf("%d of 150 entries in %d pages", seen, pages)
	}
}

// The updates of a batch go to the disk together and come out as one after the
// other.
func TestUpdatesOfABatchMakeRoomForEachOther(t *testing.T) {
	h := start(t)
	o := h.operator()
	const n = 200
	entries := make([]*types.Entry, n)
	for i := range entries {
		entries[i] = entry(node, fmt.Sprintf("/w/%d", i))
	}
	update := func(mask *types.EntryMask, list ...*types.Entry) (moved []*types.Entry) {
		t.Helper()
		resp, err := o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: list, InputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range resp.GetResults() {
			if r.GetStatus().GetCode() != 0 {
				t.Fatalf("item %d: %v", i, r.GetStatus())
			}
			moved = append(moved, r.GetEntry())
		}
		return moved
	}
	ids := o.create(t, entries...)
	moves := make([]*types.Entry, n)
	for i, id := range ids { // each takes the place of the next, the last of them first
		moves[n-1-i] = &types.Entry{Id: id, SpiffeId: entry(node, fmt.Sprintf("/w/%d", i+1)).GetSpiffeId()}
	}
	for i, e := range update(&types.EntryMask{SpiffeId: true}, moves...) {
		if e.GetId() != ids[n-1-i] || e.GetSpiffeId().GetPath() != fmt.Sprintf("/w/%d", n-i) || e.GetRevisionNumber() != 1 {
			t.Fatalf("item %d: %v", i, e)
		}
	}
	for i, e := range update(&types.EntryMask{Hint: true}, &types.Entry{Id: ids[0], Hint: "first"}, &types.Entry{Id: ids[0], Hint: "last"}) {
		if e.GetRevisionNumber() != int64(2+i) || e.GetHint() != []string{"first", "last"}[i] {
			t.Errorf("an entry named twice: %v", e)
		}
	}
}

func TestEntryIsUpdatedByMask(t *testing.T) {
	h := start(t)
	o := h.operator()
	id := o.create(t, entry(node, "/a"))[0]
	change := entry(node, "/b", "uid:9")
	change.Id, change.Hint = id, "new"
	resp, err := o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries:   []*types.Entry{change, {Id: "unknown", Hint: "x"}, {Hint: "x"}, {Id: id, Hint: strings.Repeat("x", 5000)}},
		InputMask: &types.EntryMask{Hint: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	got := resp.GetResults()[0].GetEntry()
	if got.GetHint() != "new" || got.GetSpiffeId().GetPath() != "/a" || got.GetSelectors()[0].GetValue() != "uid:1000" || got.GetRevisionNumber() != 1 {
		t.Errorf("by mask: %v", resp.GetResults()[0])
	}
	for i, want := range []codes.Code{codes.OK, codes.NotFound, codes.InvalidArgument, codes.InvalidArgument} {
		if r := resp.GetResults()[i]; codes.Code(r.GetStatus().GetCode()) != want || (r.GetEntry() != nil) != (want == codes.OK) {
			t.Errorf("item %d: %v", i, r)
		}
	}
	resp, err = o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{change}})
	if err != nil || resp.GetResults()[0].GetEntry().GetSpiffeId().GetPath() != "/b" || resp.GetResults()[0].GetEntry().GetRevisionNumber() != 2 {
		t.Errorf("without a mask all fields change: %v, %v", resp, err)
	}
	change.Hint = "not this"
	resp, err = o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries: []*types.Entry{change}, InputMask: &types.EntryMask{DnsNames: true, ExpiresAt: true, X509SvidTtl: true, ParentId: true},
	})
	if err != nil || resp.GetResults()[0].GetEntry().GetHint() != "new" || resp.GetResults()[0].GetEntry().GetSpiffeId().GetPath() != "/b" {
		t.Errorf("a field that the mask does not name has changed: %v, %v", resp, err)
	}
	change.Admin = true
	resp, err = o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{change}})
	if err != nil || !strings.HasPrefix(resp.GetResults()[0].GetStatus().GetMessage(), "entry_admin_unsupported") {
		t.Errorf("made admin by update: %v, %v", resp, err)
	}
	if line := h.audited("entry.update"); sub(line, "target", "entry_id") != id || sub(line, "result", "reason") != "entry_admin_unsupported" {
		t.Errorf("audit: %v", line)
	}
}

func TestEntriesAreDeletedOneByOne(t *testing.T) {
	h := start(t)
	o := h.operator()
	ids := o.create(t, entry(node, "/a"), entry(node, "/b"))
	resp, err := o.entries.BatchDeleteEntry(t.Context(), deleteOf(ids[0], "unknown", ids[0]))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.OK, codes.NotFound, codes.NotFound} {
		if r := resp.GetResults()[i]; codes.Code(r.GetStatus().GetCode()) != want || r.GetId() != []string{ids[0], "unknown", ids[0]}[i] {
			t.Errorf("item %d: %v", i, r)
		}
	}
	_, err = o.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: ids[0]})
	wantReason(t, "deleted", err, fault.NotFound, "entry_unknown")
	_, err = o.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{})
	wantReason(t, "no id", err, fault.Invalid, "entry_id_missing")
	if _, err := o.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: ids[1]}); err != nil {
		t.Error(err)
	}
	found := false
	for _, line := range h.audit() {
		found = found || line["action"] == "entry.delete" && sub(line, "target", "spiffe_id") == "spiffe://example.org/a" && sub(line, "result", "code") == "ok"
	}
	if !found {
		t.Error("the deletion is not in the audit log")
	}
}

func TestJoinTokensAreMadeToRule(t *testing.T) {
	h := start(t)
	o := h.operator()
	token, err := o.agents.CreateJoinToken(t.Context(), tokenOf(60))
	if err != nil || len(token.GetValue()) < 40 || token.GetExpiresAt() > time.Now().Unix()+60 || token.GetExpiresAt() < time.Now().Unix()+50 {
		t.Errorf("%v, %v", token, err)
	}
	if line := h.audited("token.create"); !strings.HasPrefix(fmt.Sprint(sub(line, "target", "agent_id")), "spiffe://example.org/assay/agent/join_token/") {
		t.Errorf("audit: %v", line)
	}
	chosen := "0123456789abcdef0123456789abcdef"
	if token, err = o.agents.CreateJoinToken(t.Context(), &spireagentv1.CreateJoinTokenRequest{Ttl: 60, Token: chosen}); err != nil || token.GetValue() != chosen {
		t.Errorf("a chosen token: %v, %v", token, err)
	}
	for name, c := range map[string]struct {
		req    *spireagentv1.CreateJoinTokenRequest
		reason string
	}{
		"weak":     {&spireagentv1.CreateJoinTokenRequest{Ttl: 60, Token: "0123456789abcdef"}, "token_weak"},
		"no ttl":   {&spireagentv1.CreateJoinTokenRequest{}, "ttl_out_of_range"},
		"long ttl": {&spireagentv1.CreateJoinTokenRequest{Ttl: math.MaxInt32}, "ttl_out_of_range"},
	} {
		_, err := o.agents.CreateJoinToken(t.Context(), c.req)
		wantReason(t, name, err, fault.Invalid, c.reason)
	}
	// NEG-18: the values are in no file and no log.
	h.wantNowhere(t, chosen)
}

func TestAgentsAreListedInPagesAndByFilter(t *testing.T) {
	h := start(t)
	o := h.operator()
	for range 3 {
		h.newAgent()
	}
	first, err := o.agents.ListAgents(t.Context(), &spireagentv1.ListAgentsRequest{PageSize: 2, OutputMask: &types.AgentMask{AttestationType: true}})
	if err != nil || len(first.GetAgents()) != 2 || first.GetNextPageToken() == "" || first.GetAgents()[0].GetX509SvidExpiresAt() != 0 {
		t.Fatalf("%v, %v", first, err)
	}
	second, err := o.agents.ListAgents(t.Context(), &spireagentv1.ListAgentsRequest{PageSize: 2, PageToken: first.GetNextPageToken()})
	if err != nil || len(second.GetAgents()) != 1 || second.GetNextPageToken() != "" {
		t.Fatalf("%v, %v", second, err)
	}
	count, err := o.agents.CountAgents(t.Context(), &spireagentv1.CountAgentsRequest{Filter: &spireagentv1.CountAgentsRequest_Filter{ByBanned: wrapperspb.Bool(false)}})
	if err != nil || count.GetCount() != 3 {
		t.Errorf("%v, %v", count, err)
	}
	got, err := o.agents.GetAgent(t.Context(), &spireagentv1.GetAgentRequest{Id: second.GetAgents()[0].GetId()})
	if err != nil || got.GetX509SvidSerialNumber() != second.GetAgents()[0].GetX509SvidSerialNumber() {
		t.Errorf("%v, %v", got, err)
	}
	_, err = o.agents.GetAgent(t.Context(), &spireagentv1.GetAgentRequest{Id: &types.SPIFFEID{TrustDomain: domain, Path: "/assay/agent/join_token/x"}})
	wantReason(t, "unknown agent", err, fault.NotFound, "agent_unknown")
}

func TestBundleAndStatusTellTheSameStory(t *testing.T) {
	h := start(t)
	o := h.operator()
	b, err := o.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil || b.GetTrustDomain() != domain || len(b.GetX509Authorities()) != 1 || b.GetSequenceNumber() == 0 {
		t.Fatalf("%v, %v", b, err)
	}
	masked, err := o.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{SequenceNumber: true}})
	if err != nil || masked.GetX509Authorities() != nil || masked.GetTrustDomain() != domain {
		t.Errorf("%v, %v", masked, err)
	}
	o.create(t, entry(node, "/a"))
	status, err := o.admin.Status(t.Context(), &adminv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	root := h.roots()[0]
	if string(b.GetX509Authorities()[0].GetAsn1()) != string(root.Raw) {
		t.Error("the bundle has another root")
	}
	a := status.GetAuthorities()[0]
	if status.GetTrustDomain() != domain || status.GetVersion() != "v-test" || status.GetBundleSequence() != b.GetSequenceNumber() || status.GetEntries() != 1 ||
		status.GetRevision() != h.rooms.registry.Revision() || a.GetState() != "active" || a.GetUse() != "x509" || a.GetPin() != ca.Pin(root) ||
		a.GetNotAfter().AsTime().Unix() != root.NotAfter.Unix() || status.GetIssuer().GetAuthorityId() != a.GetId() || status.GetIssuer().GetNotAfter() == nil {
		t.Errorf("status: %v", status)
	}
}

// Controllers of the SPIRE world probe with entries like these before they
// work; each is stored and comes back as it was.
func TestProbesOfControllersPass(t *testing.T) {
	h := start(t)
	o := h.operator()
	unknown := entry(spiffeid.RequireFromString("spiffe://example.org/made/up/parent"), "/probe")
	unknown.Selectors = []*types.Selector{{Type: "nobody-has-this", Value: "a:b"}}
	stored := entry(node, "/for-a-store")
	stored.StoreSvid = true
	for i, id := range o.create(t, unknown, stored) {
		given := []*types.Entry{unknown, stored}[i]
		read, err := o.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: id})
		if err != nil || !proto.Equal(read.GetParentId(), given.GetParentId()) || !proto.Equal(read.GetSpiffeId(), given.GetSpiffeId()) ||
			!proto.Equal(read.GetSelectors()[0], given.GetSelectors()[0]) || read.GetStoreSvid() != given.GetStoreSvid() {
			t.Errorf("%v, %v", read, err)
		}
	}
}

// An entry for a secret store is no workload's: no agent hears of it, and none
// gets a certificate for it.
func TestEntryForAStoreReachesNoAgent(t *testing.T) {
	h := start(t)
	o := h.operator()
	a := h.newAgent()
	stored := entry(a.id, "/for-a-store")
	stored.StoreSvid = true
	id := o.create(t, stored)[0]
	stream := openSync(t, a, nil)
	if first := one(t, stream); len(first.GetEntries()) != 0 {
		t.Errorf("the agent has %v", first.GetEntries())
	}
	sign := func() *agentv1.SignX509Response_Result {
		t.Helper()
		resp, err := a.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{EntryId: id, Csr: newCSR(t, newKey(t), nil)}}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetResults()[0]
	}
	if got := sign(); got.GetFailure().GetReason() != "entry_not_authorized" || got.GetChain() != nil {
		t.Errorf("signed: %v", got)
	}
	update := func(store bool) {
		t.Helper()
		resp, err := o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
			Entries: []*types.Entry{{Id: id, StoreSvid: store}}, InputMask: &types.EntryMask{StoreSvid: true},
		})
		if err != nil || resp.GetResults()[0].GetStatus().GetCode() != 0 {
			t.Fatalf("%v, %v", resp, err)
		}
	}
	update(false)
	if got := one(t, stream); len(got.GetEntries()) != 1 {
		t.Errorf("now it is a workload's: %v", got)
	}
	if got := sign(); got.GetChain() == nil {
		t.Errorf("not signed: %v", got)
	}
	update(true)
	if got := one(t, stream); len(got.GetRemovedEntryIds()) != 1 {
		t.Errorf("again it is not: %v", got)
	}
}

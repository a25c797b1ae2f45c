package server

import (
	"testing"

	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// newAgentAs joins an agent by a token that was made with agent_id.
func (h *harness) newAgentAs(alias spiffeid.ID) *agent {
	h.t.Helper()
	token, err := h.operator().agents.CreateJoinToken(h.t.Context(), &spireagentv1.CreateJoinTokenRequest{Ttl: 600, AgentId: protoID(alias)})
	if err != nil {
		h.t.Fatal(err)
	}
	key := newKey(h.t)
	identity, err := h.attest(key, token.GetValue())
	if err != nil {
		h.t.Fatal(err)
	}
	return h.agentOf(identity, key)
}

func TestTokenWithAnAgentIDMakesAnAlias(t *testing.T) {
	h := start(t)
	o := h.operator()
	host := spiffeid.RequireFromString("spiffe://example.org/host/1")
	first, other, second := h.newAgentAs(host), h.newAgent(), h.newAgentAs(host)
	if line := h.audited("entry.create"); sub(line, "target", "spiffe_id") != host.String() || sub(line, "target", "parent_id") != second.id.String() ||
		sub(line, "result", "code") != "ok" || len(sub(line, "why", "selectors_hash").(string)) != 64 {
		t.Errorf("audit: %v", line)
	}
	// As SPIRE makes it: of the agent, about the agent.
	list, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByParentId: protoID(first.id)}})
	if err != nil || len(list.GetEntries()) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	made := list.GetEntries()[0]
	if made.GetSpiffeId().GetPath() != "/host/1" || len(made.GetSelectors()) != 1 || made.GetSelectors()[0].GetType() != "spiffe_id" ||
		made.GetSelectors()[0].GetValue() != first.id.String() || made.GetExpiresAt() != 0 {
		t.Errorf("made %v", made)
	}
	open := openSync(t, first, nil)
	one(t, open)
	entries := o.create(t, entry(host, "/web"))
	if u := one(t, open); u.GetSnapshot() || len(u.GetEntries()) != 1 || u.GetEntries()[0].GetId() != entries[0] {
		t.Errorf("pushed %v", u)
	}
	if u := one(t, openSync(t, second, nil)); len(u.GetEntries()) != 1 || u.GetEntries()[0].GetId() != entries[0] {
		t.Errorf("the second agent of the alias has %v", u)
	}
	if u := one(t, openSync(t, other, nil)); len(u.GetEntries()) != 0 {
		t.Errorf("an agent without the alias has %v", u)
	}
	// NEG-21: the alias's entry is theirs, the alias is nobody's, and the others get one answer.
	wantSigned(t, first, []string{entries[0], made.GetId(), "unknown"}, 1)
	wantSigned(t, second, []string{entries[0], made.GetId()}, 1)
	wantSigned(t, other, []string{entries[0], made.GetId(), "unknown"}, 0)

	if _, err := o.entries.BatchDeleteEntry(t.Context(), deleteOf(made.GetId())); err != nil {
		t.Fatal(err)
	}
	if u := one(t, open); !u.GetSnapshot() || len(u.GetEntries()) != 0 {
		t.Errorf("after the alias was deleted: %v", u)
	}
	wantSigned(t, first, entries, 0)
	wantSigned(t, second, entries, 1)
	h.ban(second)
	_, err = second.SignX509(t.Context(), &agentv1.SignX509Request{})
	wantReason(t, "a banned agent", err, fault.Denied, "agent_banned")
}

// wantSigned has an agent ask for all of ids; it gets the first n, and for the
// others the answer for what does not exist.
func wantSigned(t *testing.T, a *agent, ids []string, n int) {
	t.Helper()
	req := &agentv1.SignX509Request{}
	for _, id := range ids {
		req.Items = append(req.Items, &agentv1.SignX509Request_Item{EntryId: id, Csr: newCSR(t, newKey(t), nil)})
	}
	resp, err := a.SignX509(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range resp.GetResults() {
		f := r.GetFailure()
		if i < n && f != nil || i >= n && (f.GetCode() != int32(codes.NotFound) || f.GetReason() != "entry_not_authorized") {
			t.Errorf("item %d, %s: %v", i, ids[i], r)
		}
	}
}

// What an alias may be called is what an entry may be called, and a token that
// can't have its alias is not made.
func TestTokenWithABadAgentIDIsNotMade(t *testing.T) {
	h := start(t)
	o := h.operator()
	const chosen = "0123456789abcdef0123456789abcdef"
	for _, bad := range []*types.SPIFFEID{
		{},
		{TrustDomain: domain},
		{TrustDomain: "other.org", Path: "/host"},
		{TrustDomain: domain, Path: "/assay/agent/x"},
		{TrustDomain: domain, Path: "/assay/server"},
		{TrustDomain: domain, Path: "/a//b"},
		{TrustDomain: domain, Path: "/a/../b"},
	} {
		_, err := o.agents.CreateJoinToken(t.Context(), &spireagentv1.CreateJoinTokenRequest{Ttl: 60, Token: chosen, AgentId: bad})
		wantReason(t, bad.String(), err, fault.Invalid, "spiffe_id_invalid")
	}
	if _, err := h.attest(newKey(t), chosen); err == nil {
		t.Error("a token was made")
	}
}

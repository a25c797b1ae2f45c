package server

import (
	"bytes"
	"crypto/tls"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

const (
	opsID      = "spiffe://" + domain + "/ops/ci"
	otherOpsID = "spiffe://" + domain + "/ops/oncall"
)

func withOperators(c *Config) { c.Admin.RemoteIDs = []string{opsID, otherOpsID} }

// workload returns a certificate for path, by an entry of a's node.
func (h *harness) workload(a *agent, path string) *tls.Certificate {
	h.t.Helper()
	id := h.operator().create(h.t, entry(a.id, path))[0]
	key := newKey(h.t)
	resp, err := a.SignX509(h.t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{EntryId: id, Csr: newCSR(h.t, key, nil)}}})
	if err != nil {
		h.t.Fatal(err)
	}
	return certificate(h.t, &agentv1.Identity{Chain: resp.GetResults()[0].GetChain().GetCertificates()}, key)
}

// remote is an operator over the network.
func (h *harness) remote(leaf *tls.Certificate) *operator {
	h.t.Helper()
	return operatorOver(h.connect(leaf))
}

func operatorOver(conn *grpc.ClientConn) *operator {
	return &operator{
		conn: conn, entries: entryv1.NewEntryClient(conn), agents: spireagentv1.NewAgentClient(conn),
		bundles: bundlev1.NewBundleClient(conn), svids: svidv1.NewSVIDClient(conn), admin: adminv1.NewAdminClient(conn),
	}
}

func TestRemoteOperatorReadsAndWritesEntries(t *testing.T) {
	h := start(t, withOperators)
	a := h.newAgent()
	leaf := h.workload(a, "/ops/ci")
	o := h.remote(leaf)
	id := o.create(t, entry(a.id, "/web"))[0]

	line := h.audited("entry.create")
	if sub(line, "actor", "kind") != "operator" || sub(line, "actor", "spiffe_id") != opsID || sub(line, "actor", "serial") != leaf.Leaf.SerialNumber.Text(16) ||
		!strings.HasPrefix(sub(line, "from").(string), "127.0.0.1:") || sub(line, "target", "spiffe_id") != "spiffe://"+domain+"/web" {
		t.Errorf("the audit log has %v", line)
	}
	updated, err := o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries: []*types.Entry{{Id: id, Hint: "new"}}, InputMask: &types.EntryMask{Hint: true},
	})
	if err != nil || updated.GetResults()[0].GetEntry().GetHint() != "new" {
		t.Errorf("update: %v, %v", updated, err)
	}
	if list, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{}); err != nil || len(list.GetEntries()) != 2 {
		t.Errorf("list: %v, %v", list, err)
	}
	if one, err := o.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: id}); err != nil || one.GetRevisionNumber() != 1 {
		t.Errorf("get: %v, %v", one, err)
	}
	if n, err := o.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil || n.GetCount() != 2 {
		t.Errorf("count: %v, %v", n, err)
	}
	deleted, err := o.entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
	if err != nil || deleted.GetResults()[0].GetStatus().GetCode() != 0 {
		t.Errorf("delete: %v, %v", deleted, err)
	}
	if list, err := o.agents.ListAgents(t.Context(), &spireagentv1.ListAgentsRequest{}); err != nil || len(list.GetAgents()) != 1 {
		t.Errorf("agents: %v, %v", list, err)
	}
	if one, err := o.agents.GetAgent(t.Context(), &spireagentv1.GetAgentRequest{Id: protoID(a.id)}); err != nil || one.GetAttestationType() != "join_token" {
		t.Errorf("agent: %v, %v", one, err)
	}
	if n, err := o.agents.CountAgents(t.Context(), &spireagentv1.CountAgentsRequest{}); err != nil || n.GetCount() != 1 {
		t.Errorf("count of agents: %v, %v", n, err)
	}
	if b, err := o.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil || len(b.GetX509Authorities()) != 1 {
		t.Errorf("bundle: %v, %v", b, err)
	}
	if s, err := o.admin.Status(t.Context(), &adminv1.StatusRequest{}); err != nil || s.GetTrustDomain() != domain {
		t.Errorf("status: %v, %v", s, err)
	}
}

// NEG-25: what is irreversible, or makes others powerful, is for the socket.
func TestRemoteOperatorIsRefusedWhatIsLocal(t *testing.T) {
	h := start(t, withOperators)
	a := h.newAgent()
	o := h.remote(h.workload(a, "/ops/ci"))
	_, err := o.agents.CreateJoinToken(t.Context(), &spireagentv1.CreateJoinTokenRequest{Ttl: 60})
	wantReason(t, "token", err, fault.Denied, "local_only")
	_, err = o.agents.BanAgent(t.Context(), &spireagentv1.BanAgentRequest{Id: protoID(a.id)})
	wantReason(t, "ban", err, fault.Denied, "local_only")
	_, err = o.agents.DeleteAgent(t.Context(), &spireagentv1.DeleteAgentRequest{Id: protoID(a.id)})
	wantReason(t, "evict", err, fault.Denied, "local_only")
	_, err = o.svids.MintX509SVID(t.Context(), mintOf(t, "/web"))
	wantReason(t, "mint", err, fault.Denied, "local_only")
	for path, want := range map[string]codes.Code{
		agentv1.Agent_SignX509_FullMethodName: codes.Unimplemented, agentv1.Agent_Renew_FullMethodName: codes.Unimplemented,
		agentv1.Agent_Bundle_FullMethodName: codes.Unimplemented,
	} {
		if err := o.conn.Invoke(t.Context(), path, &agentv1.BundleRequest{}, &agentv1.BundleResponse{}); status.Code(err) != want {
			t.Errorf("%s by an operator: %v", path, err)
		}
	}
	if got, err := h.operator().agents.GetAgent(t.Context(), &spireagentv1.GetAgentRequest{Id: protoID(a.id)}); err != nil || got.GetBanned() {
		t.Errorf("the agent is %v, %v", got, err)
	}
	eventually(t, "an audit line of the refusals", 10*time.Second, func() bool {
		return slices.ContainsFunc(h.audit(), func(line map[string]any) bool {
			return line["action"] == "call.refuse" && sub(line, "actor", "kind") == "operator" && sub(line, "actor", "spiffe_id") == opsID &&
				sub(line, "result", "reason") == "local_only"
		})
	})
}

// No remote operator makes an operator, itself included, whichever way it
// tries; what it may not touch stays as it was.
func TestRemoteOperatorCannotMakeOperators(t *testing.T) {
	h := start(t, withOperators)
	a, other := h.newAgent(), h.newAgent()
	o := h.remote(h.workload(a, "/ops/ci"))
	local := h.operator()
	theirs := local.create(t, entry(a.id, "/ops/oncall"), entry(serverID, "/nodes/all"))
	mine := o.create(t, entry(a.id, "/web"))[0]
	before, err := local.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}

	nodeOf := func(path string) *types.Entry {
		e := entry(a.id, path)
		e.Selectors = []*types.Selector{{Type: "spiffe_id", Value: a.id.String()}}
		return e
	}
	for name, e := range map[string]*types.Entry{
		"an alias of its node": nodeOf("/nodes/all"), "itself elsewhere": entry(other.id, "/ops/ci"), "itself, other selectors": entry(a.id, "/ops/ci", "uid:0"),
		"another operator": entry(a.id, "/ops/oncall", "uid:5"), "the very entry": entry(a.id, "/ops/ci"), "an alias of nodes": entry(serverID, "/nodes/mine"),
	} {
		resp, err := o.entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
		if err != nil {
			t.Fatal(err)
		}
		wantItem(t, "create "+name, resp.GetResults()[0].GetStatus(), codes.PermissionDenied, "entry_local_only")
		if resp.GetResults()[0].GetEntry() != nil {
			t.Errorf("create %s: %v", name, resp)
		}
	}
	reserved, err := o.entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{entry(a.id, "/assay/server"), entry(a.id, "/assay/agent/x")}})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range reserved.GetResults() {
		wantItem(t, "reserved", r.GetStatus(), codes.InvalidArgument, "spiffe_id_invalid")
	}

	ops := &types.SPIFFEID{TrustDomain: domain, Path: "/ops/ci"}
	web := &types.SPIFFEID{TrustDomain: domain, Path: "/web2"}
	for name, req := range map[string]*entryv1.BatchUpdateEntryRequest{
		"to itself":                  {Entries: []*types.Entry{{Id: mine, SpiffeId: ops}}, InputMask: &types.EntryMask{SpiffeId: true}},
		"to itself, whole":           {Entries: []*types.Entry{whole(mine, entry(other.id, "/ops/ci"))}},
		"to an alias of its node":    {Entries: []*types.Entry{{Id: mine, Selectors: nodeOf("/x").GetSelectors()}}, InputMask: &types.EntryMask{Selectors: true}},
		"to an alias":                {Entries: []*types.Entry{{Id: mine, ParentId: protoID(serverID)}}, InputMask: &types.EntryMask{ParentId: true}},
		"operator's selectors":       {Entries: []*types.Entry{{Id: theirs[0], Selectors: entry(a.id, "/x", "uid:0").GetSelectors()}}, InputMask: &types.EntryMask{Selectors: true}},
		"operator's parent":          {Entries: []*types.Entry{{Id: theirs[0], ParentId: protoID(other.id)}}, InputMask: &types.EntryMask{ParentId: true}},
		"operator's end":             {Entries: []*types.Entry{{Id: theirs[0]}}, InputMask: &types.EntryMask{ExpiresAt: true}},
		"operator's nothing":         {Entries: []*types.Entry{{Id: theirs[0]}}, InputMask: &types.EntryMask{}},
		"operator's ID away":         {Entries: []*types.Entry{{Id: theirs[0], SpiffeId: web}}, InputMask: &types.EntryMask{SpiffeId: true}},
		"operator's, all of it":      {Entries: []*types.Entry{whole(theirs[0], entry(other.id, "/web3"))}},
		"an alias's selectors":       {Entries: []*types.Entry{{Id: theirs[1], Selectors: entry(a.id, "/x", "uid:0").GetSelectors()}}, InputMask: &types.EntryMask{Selectors: true}},
		"an alias, away and renamed": {Entries: []*types.Entry{whole(theirs[1], entry(a.id, "/web4"))}},
	} {
		resp, err := o.entries.BatchUpdateEntry(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		wantItem(t, "update "+name, resp.GetResults()[0].GetStatus(), codes.PermissionDenied, "entry_local_only")
	}
	deleted, err := o.entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: append(theirs, theirs...)})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range deleted.GetResults()[:2] {
		wantItem(t, "delete", r.GetStatus(), codes.PermissionDenied, "entry_local_only")
	}

	after, err := local.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	if err != nil || after.String() != before.String() {
		t.Errorf("%v\nbefore %v\nafter  %v", err, before, after)
	}
	if line := h.audited("entry.delete"); sub(line, "result", "reason") == nil {
		t.Errorf("the audit log has %v", line)
	}
	// Who is at the socket may.
	local.create(t, entry(other.id, "/ops/ci"), entry(serverID, "/nodes/mine"))
}

func whole(id string, e *types.Entry) *types.Entry {
	e.Id = id
	return e
}

func wantItem(t *testing.T, what string, s *types.Status, code codes.Code, reason string) {
	t.Helper()
	if s.GetCode() != int32(code) || !strings.HasPrefix(s.GetMessage(), reason+": ") {
		t.Errorf("%s: got %v, want %v %s", what, s, code, reason)
	}
}

// NEG-25
func TestOthersAreNoRemoteOperators(t *testing.T) {
	h := start(t, withOperators)
	a := h.newAgent()
	for name, c := range map[string]struct {
		leaf   *tls.Certificate
		kind   fault.Kind
		reason string
	}{
		"an agent":                {a.leaf, fault.Denied, "operator_not_allowed"},
		"a workload":              {h.workload(a, "/web"), fault.Denied, "operator_not_allowed"},
		"below an operator's ID":  {h.workload(a, "/ops/ci/x"), fault.Denied, "operator_not_allowed"},
		"above an operator's ID":  {h.workload(a, "/ops"), fault.Denied, "operator_not_allowed"},
		"another writing of it":   {h.workload(a, "/ops/CI"), fault.Denied, "operator_not_allowed"},
		"without any certificate": {nil, fault.Unauthenticated, "operator_svid_missing"},
	} {
		o := h.remote(c.leaf)
		_, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
		wantReason(t, "list by "+name, err, c.kind, c.reason)
		_, err = o.entries.BatchCreateEntry(t.Context(), createOf(entry(a.id, "/x")))
		wantReason(t, "create by "+name, err, c.kind, c.reason)
		_, err = o.admin.Status(t.Context(), &adminv1.StatusRequest{})
		wantReason(t, "status by "+name, err, c.kind, c.reason)
		_, err = o.agents.BanAgent(t.Context(), &spireagentv1.BanAgentRequest{Id: protoID(a.id)})
		wantReason(t, "ban by "+name, err, c.kind, c.reason)
	}
	eventually(t, "an audit line of the refusals", 10*time.Second, func() bool {
		return slices.ContainsFunc(h.audit(), func(line map[string]any) bool {
			return line["action"] == "call.refuse" && sub(line, "actor", "spiffe_id") == a.id.String() && sub(line, "result", "reason") == "operator_not_allowed"
		})
	})
}

func TestRemovedRemoteOperatorIsCutOffByARestart(t *testing.T) {
	h := start(t, withOperators)
	a := h.newAgent()
	leaf := h.workload(a, "/ops/ci")
	if _, err := h.remote(leaf).admin.Status(t.Context(), &adminv1.StatusRequest{}); err != nil {
		t.Fatal(err)
	}
	h.stop()
	h.cfg.Admin.RemoteIDs = []string{otherOpsID}
	h.run()
	_, err := h.remote(leaf).admin.Status(t.Context(), &adminv1.StatusRequest{})
	wantReason(t, "removed", err, fault.Denied, "operator_not_allowed")
	// It is a workload like others now: its entry can be changed from afar.
	a.AgentClient = h.dial(a.leaf)
	o := h.remote(h.workload(a, "/ops/oncall"))
	o.create(t, entry(a.id, "/ops/ci", "uid:7"))
}

// Operators take the places of their own ID; they need none of those for
// strangers, and take none of an agent's.
func TestConnectionsOfRemoteOperatorsAreCountedByTheirID(t *testing.T) {
	h := start(t, withOperators, func(c *Config) { c.Limits.AnonymousConnections = 4 })
	a := h.newAgent()
	leaf, other := h.workload(a, "/ops/ci"), h.workload(a, "/ops/oncall")
	ask := func(leaf *tls.Certificate) (*operator, error) {
		o := h.remote(leaf)
		_, err := o.admin.Status(t.Context(), &adminv1.StatusRequest{})
		return o, err
	}
	var first *operator
	for i := range maxOperatorConns {
		o, err := ask(leaf)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		if first == nil {
			first = o
		}
	}
	if _, err := ask(leaf); status.Code(err) != codes.Unavailable {
		t.Errorf("one too many: %v", err)
	}
	if _, err := ask(other); err != nil {
		t.Errorf("another operator: %v", err)
	}
	if _, err := h.dial(nil).Bundle(t.Context(), &agentv1.BundleRequest{}); err != nil {
		t.Errorf("a stranger: %v", err)
	}
	if err := first.conn.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a place for the next connection", 10*time.Second, func() bool {
		_, err := ask(leaf)
		return err == nil
	})
}

// The admin socket's message size is for operators alone: agents and strangers
// are held to the agents' own on the same port.
func TestOnlyRemoteOperatorsMaySendLargeBatches(t *testing.T) {
	h := start(t, withOperators)
	a := h.newAgent()
	large := &entryv1.BatchDeleteEntryRequest{Ids: []string{strings.Repeat("x", 1<<20)}}
	o := h.remote(h.workload(a, "/ops/ci"))
	if resp, err := o.entries.BatchDeleteEntry(t.Context(), large); err != nil || len(resp.GetResults()) != 1 {
		t.Errorf("by an operator: %v", err)
	}
	_, err := a.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{Csr: bytes.Repeat([]byte{1}, maxAgentMessage+1)}}})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("by an agent: %v", err)
	}
	_, err = h.remote(nil).entries.BatchDeleteEntry(t.Context(), large)
	wantReason(t, "by a stranger", err, fault.Unauthenticated, "operator_svid_missing")
}

// A peer that shows an operator's certificate and then says nothing is closed
// in time, whatever the listener that accepted it does to the socket.
func TestOperatorConnectionKeepsItsOwnDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		conn := &operatorConn{Conn: here}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_ = here.SetDeadline(time.Time{}) // as the listener does
		began := time.Now()
		if _, err := there.Read(make([]byte, 1)); err == nil || time.Since(began) != 10*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}

		here, there = net.Pipe()
		conn = &operatorConn{Conn: here}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_ = conn.SetDeadline(time.Time{}) // the handshake is done
		time.Sleep(time.Minute)
		go func() { _, _ = there.Write([]byte("x")) }()
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Errorf("a connection in use: %v", err)
		}
		_, _ = here.Close(), there.Close()
	})
}

// A server stops although an operator's connection is between two servers.
func TestServerStopsWithOperatorsConnected(t *testing.T) {
	h := start(t, withOperators)
	leaf := h.workload(h.newAgent(), "/ops/ci")
	if _, err := h.remote(leaf).admin.Status(t.Context(), &adminv1.StatusRequest{}); err != nil {
		t.Fatal(err)
	}
	door := newHandover(nil)
	if err := door.Close(); err != nil {
		t.Fatal(err)
	}
	if door.give(&operatorConn{}) {
		t.Error("a closed door takes a connection")
	}
	if _, err := door.Accept(); err == nil {
		t.Error("a closed door gives a connection")
	}
	h.stop()
}

func TestRemoteOperatorIDsAreExactAndNotReserved(t *testing.T) {
	if ids := (AdminConfig{RemoteIDs: []string{opsID}}).remoteIDs(); len(ids) != 1 || ids[0] != spiffeid.RequireFromString(opsID) {
		t.Errorf("read as %v", ids)
	}
	for _, id := range []string{
		"", "ops/ci", "spiffe://example.org", "spiffe://example.org/", "spiffe://other.org/ops", "spiffe://example.org/ops/*", "spiffe://EXAMPLE.org/ops",
		"spiffe://example.org/a/../ops", "spiffe://example.org/assay/server", "spiffe://example.org/assay/agent/join_token/x", "spiffe://example.org/assay/ops",
	} {
		_, err := Config{TrustDomain: domain, Admin: AdminConfig{RemoteIDs: []string{opsID, id}}}.Validate()
		if fault.ReasonOf(err) != "config_invalid" || !strings.Contains(fault.SafeText(err), "spiffe://example.org/ops/ci") {
			t.Errorf("%q: %v", id, err)
		}
	}
	if _, err := (Config{TrustDomain: domain, ReservedPrefix: "spire", Admin: AdminConfig{RemoteIDs: []string{"spiffe://example.org/spire/ops"}}}).Validate(); err == nil {
		t.Error("an ID below the other prefix is accepted")
	}
}

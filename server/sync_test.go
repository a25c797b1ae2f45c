package server

import (
	"fmt"
	"strings"
	"testing"
	"time"

	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

type syncClient = grpc.BidiStreamingClient[agentv1.SyncRequest, agentv1.SyncResponse]

// openSync opens a stream and says hello, by default as an agent that holds
// nothing.
func openSync(t *testing.T, a *agent, hello *agentv1.SyncRequest_Hello) syncClient {
	t.Helper()
	stream, err := a.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if hello == nil {
		hello = &agentv1.SyncRequest_Hello{AgentVersion: "v1.2.3"}
	}
	say(t, stream, &agentv1.SyncRequest{Message: &agentv1.SyncRequest_Hello_{Hello: hello}})
	return stream
}

func say(t *testing.T, stream syncClient, msg *agentv1.SyncRequest) {
	t.Helper()
	if err := stream.Send(msg); err != nil {
		t.Fatal(err)
	}
}

// next receives a whole update.
func next(t *testing.T, stream syncClient) (msgs []*agentv1.SyncResponse) {
	t.Helper()
	for {
		msg, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if msgs = append(msgs, msg); !msg.GetMore() {
			return msgs
		}
	}
}

func one(t *testing.T, stream syncClient) *agentv1.SyncResponse {
	t.Helper()
	msgs := next(t, stream)
	if len(msgs) != 1 {
		t.Fatalf("an update in %d messages", len(msgs))
	}
	return msgs[0]
}

func TestSyncBeginsWithASnapshotAndPushesChanges(t *testing.T) {
	h := start(t)
	o, a, other := h.operator(), h.newAgent(), h.newAgent()
	e := entry(a.id, "/a", "uid:1", "gid:2")
	e.DnsNames, e.Hint, e.X509SvidTtl = []string{"a.example.org"}, "main", 600
	ids := o.create(t, e, entry(other.id, "/b"))

	stream := openSync(t, a, nil)
	first := one(t, stream)
	if !first.GetSnapshot() || len(first.GetEntries()) != 1 || first.GetCommittedAt() != nil || first.GetServerTime() == nil ||
		first.GetEpoch() != h.rooms.registry.Epoch() || first.GetRevision() != h.rooms.registry.Revision() {
		t.Fatalf("snapshot: %v", first)
	}
	got := first.GetEntries()[0]
	if got.GetId() != ids[0] || got.GetSpiffeId() != "spiffe://example.org/a" || len(got.GetSelectors()) != 2 || got.GetHint() != "main" ||
		got.GetX509SvidTtl().AsDuration() != 10*time.Minute || got.GetDnsNames()[0] != "a.example.org" || got.GetCreatedAt() == nil {
		t.Errorf("entry: %v", got)
	}
	b := first.GetBundle()
	if b.GetTrustDomain() != domain || b.GetSequence() == 0 || len(b.GetX509Authorities()) != 1 || len(b.GetX509Authorities()[0].GetId()) != 40 {
		t.Errorf("bundle: %v", b)
	}

	o.create(t, entry(other.id, "/c")) // not ours: nothing is sent
	made := o.create(t, entry(a.id, "/d"))
	delta := one(t, stream)
	if delta.GetSnapshot() || len(delta.GetEntries()) != 1 || delta.GetEntries()[0].GetId() != made[0] || delta.GetBundle() != nil ||
		time.Since(delta.GetCommittedAt().AsTime()) > time.Minute {
		t.Errorf("delta: %v", delta)
	}
	if _, err := o.entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: ids[:1]}); err != nil {
		t.Fatal(err)
	}
	gone := one(t, stream)
	if len(gone.GetRemovedEntryIds()) != 1 || gone.GetRemovedEntryIds()[0] != ids[0] || len(gone.GetEntries()) != 0 {
		t.Errorf("removal: %v", gone)
	}
}

func TestSyncResumesWhereTheAgentWas(t *testing.T) {
	h := start(t)
	o, a := h.operator(), h.newAgent()
	o.create(t, entry(a.id, "/a"))
	first := one(t, openSync(t, a, nil))
	made := o.create(t, entry(a.id, "/b"))
	resumed := one(t, openSync(t, a, &agentv1.SyncRequest_Hello{Epoch: first.GetEpoch(), Revision: first.GetRevision()}))
	if resumed.GetSnapshot() || len(resumed.GetEntries()) != 1 || resumed.GetEntries()[0].GetId() != made[0] || resumed.GetBundle() == nil {
		t.Errorf("resumed with %v", resumed)
	}
	foreign := one(t, openSync(t, a, &agentv1.SyncRequest_Hello{Epoch: "another", Revision: first.GetRevision()}))
	if !foreign.GetSnapshot() || len(foreign.GetEntries()) != 2 {
		t.Errorf("another epoch: %v", foreign)
	}
}

func TestLongSnapshotComesInPieces(t *testing.T) {
	h := start(t)
	o, a := h.operator(), h.newAgent()
	var list []*types.Entry
	for i := range 600 {
		list = append(list, entry(a.id, fmt.Sprintf("/a/%d", i), "sha256:"+strings.Repeat("a", 900), fmt.Sprintf("uid:%d", i)))
	}
	o.create(t, list...)
	msgs := next(t, openSync(t, a, nil))
	seen := map[string]bool{}
	for i, m := range msgs {
		if !m.GetSnapshot() || (m.GetBundle() != nil) != (i == 0) {
			t.Errorf("message %d: snapshot %v, bundle %v", i, m.GetSnapshot(), m.GetBundle() != nil)
		}
		for _, e := range m.GetEntries() {
			seen[e.GetId()] = true
		}
	}
	if len(msgs) < 3 || len(seen) != 600 {
		t.Errorf("%d entries in %d messages", len(seen), len(msgs))
	}
}

func TestSyncNeedsHelloFirstAndOnce(t *testing.T) { // NEG-25
	h := start(t)
	a := h.newAgent()
	stream, err := a.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	say(t, stream, &agentv1.SyncRequest{Message: &agentv1.SyncRequest_Report_{Report: &agentv1.SyncRequest_Report{}}})
	_, err = stream.Recv()
	wantReason(t, "no hello", err, fault.Invalid, "hello_missing")

	stream = openSync(t, a, nil)
	one(t, stream)
	say(t, stream, &agentv1.SyncRequest{Message: &agentv1.SyncRequest_Hello_{Hello: &agentv1.SyncRequest_Hello{}}})
	_, err = stream.Recv()
	wantReason(t, "hello again", err, fault.Invalid, "hello_repeated")
}

func TestWhatAgentsClaimShowsInStatusAndImpossibleClaimsDoNot(t *testing.T) {
	h := start(t)
	o, a := h.operator(), h.newAgent()
	stream := openSync(t, a, nil)
	sequence := one(t, stream).GetBundle().GetSequence()
	root := h.rooms.authority.Bundle().Roots[0].ID
	soon := timestamppb.New(time.Now().Add(20 * time.Minute))
	say(t, stream, &agentv1.SyncRequest{Message: &agentv1.SyncRequest_Ack_{Ack: &agentv1.SyncRequest_Ack{BundleSequence: sequence, WaitsUntil: soon}}})
	say(t, stream, &agentv1.SyncRequest{Message: &agentv1.SyncRequest_Report_{Report: &agentv1.SyncRequest_Report{
		Live:           []*agentv1.SyncRequest_LiveSVIDs{{AuthorityId: root, Count: 7, LatestExpiry: soon}, {AuthorityId: "made up", Count: 100}},
		EarliestExpiry: soon, AgentTime: timestamppb.New(time.Now().Add(time.Hour)), Revision: 3,
	}}})
	say(t, stream, &agentv1.SyncRequest{Message: &agentv1.SyncRequest_Ack_{Ack: &agentv1.SyncRequest_Ack{BundleSequence: sequence + 100}}})
	var status *adminv1.StatusResponse
	eventually(t, "the claim in status", 5*time.Second, func() bool {
		var err error
		if status, err = o.admin.Status(t.Context(), &adminv1.StatusRequest{}); err != nil {
			t.Fatal(err)
		}
		return status.GetAgents()[0].GetLiveSvids() > 0 && strings.Contains(h.logs.String(), "claims what can't be true")
	})
	got := status.GetAgents()[0]
	if got.GetId() != a.id.String() || !got.GetConnected() || got.GetVersion() != "v1.2.3" || got.GetAcknowledgedSequence() != sequence ||
		got.GetWaitsUntil().GetSeconds() != soon.GetSeconds() || got.GetLiveSvids() != 7 || got.GetRevision() != 3 ||
		got.GetClockOffsetMs() < 3_500_000 || got.GetSvidNotAfter().AsTime().Unix() != a.leaf.Leaf.NotAfter.Unix() {
		t.Errorf("status of the agent: %v", got)
	}
	if !strings.Contains(strings.Join(status.GetWarnings(), "\n"), "clock") {
		t.Errorf("an agent whose clock is an hour ahead is worth a warning: %v", status.GetWarnings())
	}
	if n := strings.Count(h.logs.String(), "claims what can't be true"); n != 1 {
		t.Errorf("%d alarms for one stream", n)
	}
}

// NEG-13: a ban counts within a second, on open streams and connections, for
// new connections and after a restart.
func TestBannedAgentIsCutOff(t *testing.T) {
	h := start(t)
	a := h.newAgent()
	stream := openSync(t, a, nil)
	one(t, stream)
	banned := time.Now()
	h.ban(a)
	var err error
	for err == nil {
		_, err = stream.Recv()
	}
	wantReason(t, "open stream", err, fault.Denied, "agent_banned")
	t.Logf("the stream lived %v longer", time.Since(banned)) // looked at every recheckEvery
	_, err = a.SignX509(t.Context(), &agentv1.SignX509Request{})
	wantReason(t, "open connection", err, fault.Denied, "agent_banned")
	_, err = h.dial(a.leaf).SignX509(t.Context(), &agentv1.SignX509Request{})
	wantReason(t, "new connection", err, fault.Denied, "agent_banned")
	h.restart()
	_, err = h.dial(a.leaf).SignX509(t.Context(), &agentv1.SignX509Request{})
	wantReason(t, "after a restart", err, fault.Denied, "agent_banned")
}

// ban bans an agent as an operator does.
func (h *harness) ban(a *agent) {
	h.t.Helper()
	if _, err := h.operator().agents.BanAgent(h.t.Context(), &spireagentv1.BanAgentRequest{Id: protoID(a.id)}); err != nil {
		h.t.Fatal(err)
	}
}

// An evicted agent is cut off as fast; the server has forgotten it.
func TestEvictedAgentIsCutOff(t *testing.T) {
	h := start(t)
	a := h.newAgent()
	stream := openSync(t, a, nil)
	one(t, stream)
	h.ban(a)
	o := h.operator()
	req := &spireagentv1.DeleteAgentRequest{Id: protoID(a.id)}
	if _, err := o.agents.DeleteAgent(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	var err error
	for err == nil {
		_, err = stream.Recv()
	}
	// Which of the two the stream saw first depends on the moment.
	if reason := fault.ReasonOf(fault.FromStatus(err)); reason != "agent_unknown" && reason != "agent_banned" {
		t.Errorf("open stream: %v", err)
	}
	_, err = a.SignX509(t.Context(), &agentv1.SignX509Request{})
	wantReason(t, "open connection", err, fault.Denied, "agent_unknown")
	for _, action := range []string{"agent.ban", "agent.evict"} {
		if line := h.audited(action); sub(line, "target", "agent_id") != a.id.String() {
			t.Errorf("audit of %s: %v", action, line)
		}
	}
	_, err = o.agents.DeleteAgent(t.Context(), req)
	wantReason(t, "twice", err, fault.NotFound, "agent_unknown")
	_, err = o.agents.BanAgent(t.Context(), &spireagentv1.BanAgentRequest{})
	wantReason(t, "nobody", err, fault.Invalid, "spiffe_id_invalid")
}

func TestStoppingServerEndsStreamsWithUnavailable(t *testing.T) {
	h := start(t)
	a := h.newAgent()
	stream := openSync(t, a, nil)
	one(t, stream)
	began := time.Now()
	h.stop()
	_, err := stream.Recv()
	wantReason(t, "open stream", err, fault.NotReady, "server_stopping") // WL-24: never Canceled
	if took := time.Since(began); took > drainTime {
		t.Errorf("stopping took %v", took)
	}
}

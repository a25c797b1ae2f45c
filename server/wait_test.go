package server

import (
	"context"
	"errors"
	"io"
	"strconv"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

type waitClient = grpc.ServerStreamingClient[adminv1.WaitResponse]

func (o *operator) wait(t *testing.T, ctx context.Context, revision int64, allAgents bool) waitClient {
	t.Helper()
	stream, err := o.admin.Wait(ctx, &adminv1.WaitRequest{Revision: revision, AllAgents: allAgents})
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func waited(t *testing.T, stream waitClient) *adminv1.WaitResponse {
	t.Helper()
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// wantEnd fails the test unless the stream ends well.
func wantEnd(t *testing.T, stream waitClient) {
	t.Helper()
	if resp, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last message: %v, %v", resp, err)
	}
}

// applied reports that the agent has applied what it was sent.
func applied(t *testing.T, stream syncClient, revision int64) {
	t.Helper()
	say(t, stream, &agentv1.SyncRequest{Message: &agentv1.SyncRequest_Report_{Report: &agentv1.SyncRequest_Report{Revision: revision}}})
}

func TestWaitForTheServer(t *testing.T) {
	h := start(t)
	o, a := h.operator(), h.newAgent()
	have := h.rooms.registry.Revision()
	for _, revision := range []int64{0, 1, have} {
		stream := o.wait(t, t.Context(), revision, false)
		want := revision
		if want == 0 {
			want = have
		}
		if got := waited(t, stream); !got.GetReached() || got.GetRevision() != want || got.GetServerRevision() != have || got.GetAgents() != 0 {
			t.Errorf("revision %d: %v", revision, got)
		}
		wantEnd(t, stream)
	}
	stream := o.wait(t, t.Context(), have+1, false)
	if got := waited(t, stream); got.GetReached() || got.GetRevision() != have+1 || got.GetServerRevision() != have {
		t.Errorf("to come: %v", got)
	}
	o.create(t, entry(a.id, "/a"))
	if got := waited(t, stream); !got.GetReached() || got.GetServerRevision() < have+1 {
		t.Errorf("come: %v", got)
	}
	wantEnd(t, stream)
	_, err := o.wait(t, t.Context(), -1, false).Recv()
	wantReason(t, "negative", err, fault.Invalid, "revision_invalid")
}

func TestWaitForTheAgents(t *testing.T) {
	h := start(t)
	o, a, idle, away := h.operator(), h.newAgent(), h.newAgent(), h.newAgent()
	mine, theirs := openSync(t, a, nil), openSync(t, idle, nil)
	one(t, mine)
	one(t, theirs)
	o.create(t, entry(a.id, "/a"))
	revision := h.rooms.registry.Revision()

	stream := o.wait(t, t.Context(), revision, true)
	got := waited(t, stream)
	if got.GetReached() || got.GetAgents() != 3 || got.GetWaiting() != 3 || len(got.GetWaitingAgents()) != 3 {
		t.Fatalf("at first: %v", got)
	}
	for _, w := range got.GetWaitingAgents() {
		if w.GetConnected() == (w.GetId() == away.id.String()) {
			t.Errorf("connected: %v", w)
		}
	}
	// The change comes to its agent, and an empty update to the one that it
	// does not concern.
	change := one(t, mine)
	if change.GetRevision() < revision || len(change.GetEntries()) != 1 {
		t.Errorf("the change: %v", change)
	}
	nothing := one(t, theirs)
	if nothing.GetRevision() < revision || nothing.GetSnapshot() || len(nothing.GetEntries()) != 0 {
		t.Errorf("the empty update: %v", nothing)
	}
	applied(t, mine, 1<<60) // can't be, so it counts for nothing
	applied(t, theirs, nothing.GetRevision())
	for got = waited(t, stream); got.GetWaiting() != 2; got = waited(t, stream) {
	}
	applied(t, mine, change.GetRevision())
	for got = waited(t, stream); got.GetWaiting() != 1; got = waited(t, stream) {
	}
	if last := got.GetWaitingAgents()[0]; last.GetId() != away.id.String() || last.GetConnected() || last.GetRevision() != 0 {
		t.Errorf("the last one: %v", last)
	}
	h.ban(away)
	if got = waited(t, stream); !got.GetReached() || got.GetWaiting() != 0 || got.GetAgents() != 3 {
		t.Errorf("without the banned one: %v", got)
	}
	wantEnd(t, stream)

	status, err := o.admin.Status(t.Context(), &adminv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range status.GetAgents() {
		if !s.GetBanned() && s.GetRevision() < revision {
			t.Errorf("status does not know it: %v", s)
		}
	}
	again := o.wait(t, t.Context(), revision, true)
	if got := waited(t, again); !got.GetReached() || got.GetAgents() != 2 {
		t.Errorf("again: %v", got)
	}
}

// Waits are bounded, and end with the caller and with the server.
func TestWaitsAreBounded(t *testing.T) {
	h := start(t)
	o := h.operator()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var streams []waitClient
	for range 64 {
		stream := o.wait(t, ctx, 1<<40, false)
		waited(t, stream)
		streams = append(streams, stream)
	}
	_, err := o.wait(t, t.Context(), 1, false).Recv()
	wantReason(t, "one too many", err, fault.Exhausted, "limit_waits")
	cancel()
	for _, stream := range streams {
		if _, err := stream.Recv(); err == nil {
			t.Error("a wait goes on without its caller")
		}
	}
	eventually(t, "room for another one", 10*time.Second, func() bool {
		resp, err := o.wait(t, t.Context(), 1, false).Recv()
		return err == nil && resp.GetReached()
	})
	h.newAgent()
	here, there := o.wait(t, t.Context(), 1<<40, false), o.wait(t, t.Context(), 0, true)
	waited(t, here)
	waited(t, there)
	began := time.Now()
	h.stop()
	for _, stream := range []waitClient{here, there} {
		_, err := stream.Recv()
		wantReason(t, "the server stops", err, fault.NotReady, "server_stopping")
	}
	if took := time.Since(began); took > drainTime {
		t.Errorf("the server waited %v for those who wait", took)
	}
}

// What the entry API answers is in the revision that it tells, although SPIRE's
// messages have no field for it.
func TestEntryWritesTellTheirRevision(t *testing.T) {
	h := start(t)
	o := h.operator()
	revision := int64(0)
	told := func(what string, trailer metadata.MD, err error) {
		t.Helper()
		values := trailer.Get(adminv1.RevisionMetadata)
		if err != nil || len(values) != 1 {
			t.Fatalf("%s: %v, %v", what, values, err)
		}
		now, err := strconv.ParseInt(values[0], 10, 64)
		if err != nil || now <= revision || now != h.rooms.registry.Revision() {
			t.Errorf("%s: told %d, was %d, is %d", what, now, revision, h.rooms.registry.Revision())
		}
		revision = now
	}
	var trailer metadata.MD
	made, err := o.entries.BatchCreateEntry(t.Context(), createOf(entry(node, "/a")), grpc.Trailer(&trailer))
	told("create", trailer, err)
	id := made.GetResults()[0].GetEntry().GetId()
	_, err = o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries: []*types.Entry{{Id: id, Hint: "h"}}, InputMask: &types.EntryMask{Hint: true},
	}, grpc.Trailer(&trailer))
	told("update", trailer, err)
	_, err = o.entries.BatchDeleteEntry(t.Context(), deleteOf(id), grpc.Trailer(&trailer))
	told("delete", trailer, err)
	revision--
	_, err = o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{}, grpc.Trailer(&trailer))
	told("list", trailer, err)
}

package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	spirebundle "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	spiresvid "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

// serveUnix serves a gRPC server on a Unix socket until the test ends and
// returns the socket's path.
func serveUnix(t *testing.T, register func(*grpc.Server)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	register(srv)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return path
}

// fakeServer answers the tool as an Assay server would, from fields that a
// test sets. It is a fake of the services behind the admin socket.
type fakeServer struct {
	adminv1.UnimplementedAdminServer

	status   *adminv1.StatusResponse
	bundle   *types.Bundle
	entries  []*types.Entry
	agents   []*types.Agent
	token    *types.JoinToken
	err      error // every call fails with it
	writeErr error // every batch of creations fails with it
	pageSize int   // entries and agents per page; 0 = all
	revision int64 // told by answers of the entry API; 0 = not
	waits    []*adminv1.WaitResponse
	mint     func(*spiresvid.MintX509SVIDRequest) *types.X509SVID

	mu      sync.Mutex
	created []*types.Entry
	update  *spireentry.BatchUpdateEntryRequest
	updates []*spireentry.BatchUpdateEntryRequest
	deleted []string
	banned  []string
	evicted []string
	filter  *spireentry.ListEntriesRequest_Filter
	nodes   *spireagent.ListAgentsRequest_Filter
	ttl     int32
	agentID *types.SPIFFEID
	waited  *adminv1.WaitRequest
	calls   int
}

type fakeEntries struct {
	spireentry.UnimplementedEntryServer
	*fakeServer
}

type fakeAgents struct {
	spireagent.UnimplementedAgentServer
	*fakeServer
}

type fakeBundles struct {
	spirebundle.UnimplementedBundleServer
	*fakeServer
}

type fakeSVIDs struct {
	spiresvid.UnimplementedSVIDServer
	*fakeServer
}

// start serves f on a Unix socket.
func (f *fakeServer) start(t *testing.T) string {
	return serveUnix(t, func(s *grpc.Server) {
		adminv1.RegisterAdminServer(s, f)
		spireentry.RegisterEntryServer(s, fakeEntries{fakeServer: f})
		spireagent.RegisterAgentServer(s, fakeAgents{fakeServer: f})
		spirebundle.RegisterBundleServer(s, fakeBundles{fakeServer: f})
		spiresvid.RegisterSVIDServer(s, fakeSVIDs{fakeServer: f})
	})
}

func (f *fakeServer) begin() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.err != nil {
		return fault.Status(f.err, "REQ7").Err()
	}
	return nil
}

func (f *fakeServer) Status(context.Context, *adminv1.StatusRequest) (*adminv1.StatusResponse, error) {
	return f.status, f.begin()
}

// Wait says what a test gave it, and then nothing until the caller goes, unless
// the last of it was that the revision is reached.
func (f *fakeServer) Wait(req *adminv1.WaitRequest, stream grpc.ServerStreamingServer[adminv1.WaitResponse]) error {
	if err := f.begin(); err != nil {
		return err
	}
	f.mu.Lock()
	f.waited = req
	f.mu.Unlock()
	for _, w := range f.waits {
		if err := stream.Send(w); err != nil || w.GetReached() {
			return err
		}
	}
	<-stream.Context().Done()
	return status.FromContextError(stream.Context().Err()).Err()
}

// tell adds the trailer that answers of the entry API have.
func (f *fakeServer) tell(ctx context.Context) {
	if f.revision > 0 {
		_ = grpc.SetTrailer(ctx, metadata.Pairs(adminv1.RevisionMetadata, strconv.FormatInt(f.revision, 10)))
	}
}

func itemStatus(err error) *types.Status {
	if err == nil {
		return &types.Status{Message: "OK"}
	}
	return &types.Status{Code: int32(fault.Code(fault.KindOf(err))), Message: fault.ReasonOf(err) + ": " + fault.SafeText(err)}
}

func (f fakeEntries) BatchCreateEntry(ctx context.Context, req *spireentry.BatchCreateEntryRequest) (*spireentry.BatchCreateEntryResponse, error) {
	f.tell(ctx)
	if err := f.begin(); err != nil {
		return nil, err
	}
	if f.writeErr != nil {
		return nil, fault.Status(f.writeErr, "REQ6").Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &spireentry.BatchCreateEntryResponse{}
	for _, e := range req.GetEntries() {
		f.created = append(f.created, e)
		result := &spireentry.BatchCreateEntryResponse_Result{Status: itemStatus(nil), Entry: e}
		switch e.GetSpiffeId().GetPath() {
		case "/twice":
			result.Status = itemStatus(fault.New(fault.Exists, "entry_exists", "an entry with these IDs and selectors exists"))
			result.Entry = f.entries[0]
		case "/ended":
			result.Status = itemStatus(fault.New(fault.Exists, "entry_exists", "an entry with these IDs and selectors exists"))
			result.Entry = f.entries[2]
		case "/assay/server":
			result.Status = itemStatus(fault.New(fault.Denied, "id_reserved", "this path is reserved"))
			result.Entry = nil
		case "/foreign": // as SPIRE words it
			result.Status = &types.Status{Code: int32(codes.InvalidArgument), Message: "failed to convert entry: invalid spiffe ID"}
			result.Entry = nil
		default:
			e.Id, e.CreatedAt = "e-new", 1790000000
		}
		resp.Results = append(resp.Results, result)
	}
	return resp, nil
}

func (f fakeEntries) ListEntries(_ context.Context, req *spireentry.ListEntriesRequest) (*spireentry.ListEntriesResponse, error) {
	if err := f.begin(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.filter = req.GetFilter()
	f.mu.Unlock()
	var matching []*types.Entry
	for _, e := range f.entries {
		if matches(e, req.GetFilter()) {
			matching = append(matching, e)
		}
	}
	page, next := pageOf(matching, req.GetPageToken(), f.pageSize)
	return &spireentry.ListEntriesResponse{Entries: page, NextPageToken: next}, nil
}

// matches honours as much of a filter as the tool needs to tell who has an alias.
func matches(e *types.Entry, f *spireentry.ListEntriesRequest_Filter) bool {
	if f.GetBySpiffeId() != nil && f.GetBySpiffeId().GetPath() != e.GetSpiffeId().GetPath() ||
		f.GetByParentId() != nil && f.GetByParentId().GetPath() != e.GetParentId().GetPath() {
		return false
	}
	lacks := func(all []*types.Selector) func(*types.Selector) bool {
		return func(s *types.Selector) bool {
			return !slices.ContainsFunc(all, func(o *types.Selector) bool { return proto.Equal(o, s) })
		}
	}
	have, want := e.GetSelectors(), f.GetBySelectors()
	switch {
	case want == nil:
		return true
	case want.GetMatch() == types.SelectorMatch_MATCH_SUBSET:
		return !slices.ContainsFunc(have, lacks(want.GetSelectors()))
	case want.GetMatch() == types.SelectorMatch_MATCH_SUPERSET:
		return !slices.ContainsFunc(want.GetSelectors(), lacks(have))
	}
	return len(have) == len(want.GetSelectors()) && !slices.ContainsFunc(have, lacks(want.GetSelectors()))
}

// pageOf cuts a page; a token is as many letters as items came before.
func pageOf[T any](items []T, token string, size int) ([]T, string) {
	items = items[len(token):]
	if size == 0 || len(items) <= size {
		return items, ""
	}
	return items[:size], token + "xxxxxxxxxx"[:size]
}

func (f fakeEntries) GetEntry(_ context.Context, req *spireentry.GetEntryRequest) (*types.Entry, error) {
	if err := f.begin(); err != nil {
		return nil, err
	}
	for _, e := range f.entries {
		if e.GetId() == req.GetId() {
			return e, nil
		}
	}
	return nil, fault.Status(fault.New(fault.NotFound, "entry_unknown", "no entry has this ID"), "REQ9").Err()
}

func (f fakeEntries) CountEntries(_ context.Context, req *spireentry.CountEntriesRequest) (*spireentry.CountEntriesResponse, error) {
	if err := f.begin(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	filter := req.GetFilter()
	f.filter = &spireentry.ListEntriesRequest_Filter{
		BySpiffeId: filter.GetBySpiffeId(), ByParentId: filter.GetByParentId(), BySelectors: filter.GetBySelectors(), ByHint: filter.GetByHint(),
	}
	return &spireentry.CountEntriesResponse{Count: int32(len(f.entries))}, nil
}

func (f fakeEntries) BatchUpdateEntry(ctx context.Context, req *spireentry.BatchUpdateEntryRequest) (*spireentry.BatchUpdateEntryResponse, error) {
	f.tell(ctx)
	if err := f.begin(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.update = req
	f.updates = append(f.updates, req)
	resp := &spireentry.BatchUpdateEntryResponse{}
	for _, e := range req.GetEntries() {
		if e.GetId() != "e-1" {
			resp.Results = append(resp.Results, &spireentry.BatchUpdateEntryResponse_Result{
				Status: itemStatus(fault.New(fault.NotFound, "entry_unknown", "no entry has this ID")),
			})
			continue
		}
		changed := proto.Clone(f.entries[0]).(*types.Entry)
		changed.X509SvidTtl = 900
		changed.RevisionNumber++
		resp.Results = append(resp.Results, &spireentry.BatchUpdateEntryResponse_Result{Status: itemStatus(nil), Entry: changed})
	}
	return resp, nil
}

func (f fakeEntries) BatchDeleteEntry(ctx context.Context, req *spireentry.BatchDeleteEntryRequest) (*spireentry.BatchDeleteEntryResponse, error) {
	f.tell(ctx)
	if err := f.begin(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &spireentry.BatchDeleteEntryResponse{}
	for _, id := range req.GetIds() {
		var err error
		if id[0] != 'e' {
			err = fault.New(fault.NotFound, "entry_unknown", "no entry has this ID")
		} else {
			f.deleted = append(f.deleted, id)
		}
		resp.Results = append(resp.Results, &spireentry.BatchDeleteEntryResponse_Result{Id: id, Status: itemStatus(err)})
	}
	return resp, nil
}

func (f fakeAgents) ListAgents(_ context.Context, req *spireagent.ListAgentsRequest) (*spireagent.ListAgentsResponse, error) {
	if err := f.begin(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.nodes = req.GetFilter()
	f.mu.Unlock()
	var matching []*types.Agent
	for _, a := range f.agents {
		as := &types.Entry{Selectors: a.GetSelectors()}
		if matches(as, &spireentry.ListEntriesRequest_Filter{BySelectors: req.GetFilter().GetBySelectorMatch()}) {
			matching = append(matching, a)
		}
	}
	page, next := pageOf(matching, req.GetPageToken(), f.pageSize)
	return &spireagent.ListAgentsResponse{Agents: page, NextPageToken: next}, nil
}

func (f fakeAgents) GetAgent(_ context.Context, req *spireagent.GetAgentRequest) (*types.Agent, error) {
	if err := f.begin(); err != nil {
		return nil, err
	}
	for _, a := range f.agents {
		if a.GetId().GetPath() == req.GetId().GetPath() {
			return a, nil
		}
	}
	return nil, fault.Status(fault.New(fault.NotFound, "agent_unknown", "no agent has this ID"), "REQ8").Err()
}

func (f fakeAgents) BanAgent(_ context.Context, req *spireagent.BanAgentRequest) (*emptypb.Empty, error) {
	return f.act(&f.banned, req.GetId())
}

func (f fakeAgents) DeleteAgent(_ context.Context, req *spireagent.DeleteAgentRequest) (*emptypb.Empty, error) {
	return f.act(&f.evicted, req.GetId())
}

func (f fakeAgents) act(list *[]string, id *types.SPIFFEID) (*emptypb.Empty, error) {
	if err := f.begin(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if strings.HasSuffix(id.GetPath(), "/99") {
		return nil, fault.Status(fault.New(fault.NotFound, "agent_unknown", "no agent has this ID"), "REQ8").Err()
	}
	*list = append(*list, id.GetPath())
	return &emptypb.Empty{}, nil
}

func (f fakeAgents) CreateJoinToken(_ context.Context, req *spireagent.CreateJoinTokenRequest) (*types.JoinToken, error) {
	if err := f.begin(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.ttl, f.agentID = req.GetTtl(), req.GetAgentId()
	f.mu.Unlock()
	return f.token, nil
}

func (f fakeBundles) GetBundle(context.Context, *spirebundle.GetBundleRequest) (*types.Bundle, error) {
	return f.bundle, f.begin()
}

func (f fakeSVIDs) MintX509SVID(_ context.Context, req *spiresvid.MintX509SVIDRequest) (*spiresvid.MintX509SVIDResponse, error) {
	if err := f.begin(); err != nil {
		return nil, err
	}
	return &spiresvid.MintX509SVIDResponse{Svid: f.mint(req)}, nil
}

// fakeAgent is a fake of the Workload API. Each stream gets what script sends.
type fakeAgent struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	script func(stream workload.SpiffeWorkloadAPI_FetchX509SVIDServer, call int) error

	mu    sync.Mutex
	calls int
}

func (f *fakeAgent) FetchX509SVID(_ *workload.X509SVIDRequest, stream workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	f.mu.Lock()
	f.calls++
	call := f.calls
	f.mu.Unlock()
	return f.script(stream, call)
}

func (f *fakeAgent) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// start serves f and returns its URI.
func (f *fakeAgent) start(t *testing.T) string {
	return "unix://" + serveUnix(t, func(s *grpc.Server) { workload.RegisterSpiffeWorkloadAPIServer(s, f) })
}

// sends makes a script that sends these messages and then waits.
func sends(messages ...*workload.X509SVIDResponse) func(workload.SpiffeWorkloadAPI_FetchX509SVIDServer, int) error {
	return func(stream workload.SpiffeWorkloadAPI_FetchX509SVIDServer, _ int) error {
		for _, m := range messages {
			if err := stream.Send(m); err != nil {
				return err
			}
		}
		<-stream.Context().Done()
		// Not nil: the server may see the caller's deadline first, and a stream
		// that ends well without a message is another thing.
		return status.FromContextError(stream.Context().Err()).Err()
	}
}

// outcome is what one run of the tool left.
type outcome struct {
	code           int
	stdout, stderr string
}

// assay runs the tool as main does, with an environment of its own.
func assay(t *testing.T, vars map[string]string, args ...string) outcome {
	t.Helper()
	return assayIn(t, env{stdin: bytes.NewReader(nil), getenv: func(name string) string { return vars[name] }}, args...)
}

// assayIn is assay in surroundings of the test's own.
func assayIn(t *testing.T, e env, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var stdout, stderr bytes.Buffer
	e.stdout, e.stderr = &stdout, &stderr
	code := run(ctx, e, args)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Fatalf("%v took too long", args)
	}
	return outcome{code: code, stdout: stdout.String(), stderr: stderr.String()}
}

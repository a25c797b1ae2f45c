package endpoint

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/seed-caa81108/assay/agent/attest"
	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// call makes one RPC and returns its first error: nil if a message came.
func call(ctx context.Context, cc *grpc.ClientConn, method string) error {
	desc := &grpc.StreamDesc{StreamName: "x", ServerStreams: true, ClientStreams: true}
	stream, err := cc.NewStream(ctx, desc, method)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(&workload.X509SVIDRequest{}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return stream.RecvMsg(&workload.X509SVIDResponse{})
}

const (
	fetchSVID    = "/SpiffeWorkloadAPI/FetchX509SVID"
	fetchBundles = "/SpiffeWorkloadAPI/FetchX509Bundles"
)

var unbuilt = []string{
	"/SpiffeWorkloadAPI/FetchJWTSVID", "/SpiffeWorkloadAPI/FetchJWTBundles", "/SpiffeWorkloadAPI/ValidateJWTSVID",
	"/SpiffeWorkloadAPI/FetchWITSVID", "/SpiffeWorkloadAPI/FetchWITBundles",
}

func allMethods() []string {
	list := []string{"/SpiffeWorkloadAPI/NoSuchMethod", "/no.such.Service/Method"}
	for m := range Methods() {
		list = append(list, m)
	}
	return list
}

// failing is a source of selectors that counts and may fail.
type failing struct {
	calls atomic.Int32
	err   error
}

func (f *failing) Selectors(context.Context, attest.Process) (selector.Set, error) {
	f.calls.Add(1)
	return nil, f.err
}

func TestHeaderComesFirst(t *testing.T) { // WL-4, WL-5, WL-6, CODE-1, D-16, NEG-35
	src := &failing{}
	e := serve(t, &source{err: errNotSynced}, withSource("x", src))
	cc := e.conn()
	for _, method := range allMethods() {
		for _, values := range [][]string{nil, {"True"}, {"TRUE"}, {"1"}, {"true "}, {"true", "false"}, {"true", "true"}, {""}, {"false"}} {
			md := metadata.MD{}
			if values != nil {
				md[headerKey] = values
			}
			err := call(metadata.NewOutgoingContext(t.Context(), md), cc, method)
			wantStatus(t, err, codes.InvalidArgument, "security_header_missing")
			if !strings.Contains(err.Error(), "security header missing from request") {
				t.Errorf("%s: text %v", method, err)
			}
		}
	}
	if n := src.calls.Load(); n > 1 {
		t.Errorf("attested %d times without the header", n)
	}
}

func TestStatusCodes(t *testing.T) { // CODE-8, CODE-9, CODE-10, D-13, WL-10, WL-11, WL-12, WL-19, WL-20
	ca := newAuthority(t)
	broken := ca.snapshot(ca.svid("/a", ""))
	broken.SVIDs[0].Key = cache.PrivateKey{}
	quick := withTiming(func(w *timing) { w.hold = time.Millisecond })
	cases := []struct {
		name    string
		source  *source
		opts    []option
		methods []string
		code    codes.Code
		reason  string
	}{
		{"no identity", &source{err: errNoIdentity}, nil, []string{fetchSVID, fetchBundles}, codes.PermissionDenied, "no_identity"},
		{"initialising", &source{err: errNotSynced}, nil, []string{fetchSVID, fetchBundles}, codes.Unavailable, "not_synced"},
		{"upstream down", &source{err: errPending}, nil, []string{fetchSVID, fetchBundles}, codes.Unavailable, "svid_pending"},
		{"attestor failed", &source{err: errNoIdentity}, []option{withSource("x", &failing{err: io.EOF})}, []string{fetchSVID, fetchBundles}, codes.Unavailable, "attestation_failed"},
		{"shedding load", &source{err: errNoIdentity}, []option{withLimits(Limits{Descriptors: 1, DescriptorsPerUID: 1})}, []string{fetchSVID, fetchBundles}, codes.Unavailable, "load_shed"},
		{"incomplete answer", &source{snap: broken}, nil, []string{fetchSVID, fetchBundles}, codes.Unavailable, "response_invalid"},
		{"profile not built", &source{err: errNotSynced}, nil, unbuilt, codes.Unimplemented, "unimplemented"},
		{"unknown method", &source{err: errNotSynced}, nil, []string{"/SpiffeWorkloadAPI/Nope", "/grpc.health.v1.Health/Check"}, codes.Unimplemented, "method_unknown"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			e := serve(t, tc.source, append(tc.opts, quick)...)
			cc := e.conn()
			for _, method := range tc.methods {
				wantStatus(t, call(withHeader(t), cc, method), tc.code, tc.reason)
			}
		})
	}
	t.Run("served", func(t *testing.T) {
		e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
		for _, method := range []string{fetchSVID, fetchBundles} {
			if err := call(withHeader(t), e.conn(), method); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestEveryMethodHasARule(t *testing.T) { // I11
	e := serve(t, &source{err: errNotSynced})
	for name, socket := range map[string]struct {
		server *grpc.Server
		rules  rpc.Methods
	}{"api": {e.server.api, Methods()}, "sds": {e.server.sds, SDSMethods()}} {
		if missing := rpc.Uncovered(socket.server, socket.rules); len(missing) != 0 {
			t.Fatalf("%s: no rule for %v", name, missing)
		}
		registered := 0
		for _, info := range socket.server.GetServiceInfo() {
			registered += len(info.Methods)
		}
		if registered != len(socket.rules) {
			t.Fatalf("%s: %d methods registered, %d rules", name, registered, len(socket.rules))
		}
	}
}

func TestRemoteCallersAreRefused(t *testing.T) { // WL-3
	for method, rule := range Methods() {
		if rule(rpc.Caller{Addr: "192.0.2.1:1"}) == nil {
			t.Errorf("%s", method)
		}
	}
}

func TestReflectionShowsThePublishedAPI(t *testing.T) { // WL-13 to WL-16
	e := serve(t, &source{err: errNotSynced})
	cc := e.conn()
	stream, err := reflectionv1.NewServerReflectionClient(cc).ServerReflectionInfo(withHeader(t))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(req *reflectionv1.ServerReflectionRequest) *reflectionv1.ServerReflectionResponse {
		t.Helper()
		if err := stream.Send(req); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	list := ask(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}})
	names := map[string]bool{}
	for _, s := range list.GetListServicesResponse().GetService() {
		names[s.GetName()] = true
	}
	if !names["SpiffeWorkloadAPI"] || len(names) != 3 {
		t.Fatalf("services %v", names)
	}
	file := ask(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "SpiffeWorkloadAPI"}})
	var shown descriptorpb.FileDescriptorProto
	if err := proto.Unmarshal(file.GetFileDescriptorResponse().GetFileDescriptorProto()[0], &shown); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(&shown, protodesc.ToFileDescriptorProto(workload.File_workload_proto)) {
		t.Fatal("the API shown is not the published one")
	}
	alpha, err := reflectionv1alpha.NewServerReflectionClient(cc).ServerReflectionInfo(withHeader(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := alpha.Send(&reflectionv1alpha.ServerReflectionRequest{MessageRequest: &reflectionv1alpha.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	if _, err := alpha.Recv(); err != nil {
		t.Fatal(err)
	}
	e.server.timing.grace = time.Millisecond
	e.stop()
	if _, err := stream.Recv(); statusCode(err) != codes.Unavailable {
		t.Fatalf("end of a reflection stream at shutdown: %v", err)
	}
}

//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// rawBytes is a codec that sends what it is given.
type rawBytes struct{}

func (rawBytes) Name() string { return "proto" }

func (rawBytes) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (rawBytes) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), data...)
	return nil
}

func dialRaw(t testing.TB, endpoint string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(endpoint,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawBytes{})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// call opens a stream, sends one message and returns the code of what comes
// first: OK for a message, else how the stream ended.
func call(ctx context.Context, conn *grpc.ClientConn, method string, body []byte) (grpc.ClientStream, codes.Code) {
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return nil, status.Code(err)
	}
	if err := stream.SendMsg(&body); err != nil && stream.Context().Err() != nil {
		return nil, status.Code(err)
	}
	_ = stream.CloseSend()
	var reply []byte
	return stream, status.Code(stream.RecvMsg(&reply))
}

const api = "/SpiffeWorkloadAPI/"

var rpcs = []string{
	"FetchX509SVID", "FetchX509Bundles", "FetchJWTSVID", "FetchJWTBundles",
	"ValidateJWTSVID", "FetchWITSVID", "FetchWITBundles",
}

var reflections = []string{
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
}

// The matrix of status codes over raw gRPC on the real socket: CODE-1, 8, 9, 10,
// D-8, D-13, D-16, NEG-35, NEG-42, PLAN-2, WL-4, 5, 6, 10, 11, 12, 14, 20, 28, 48,
// 50.
func TestStatusCodes(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	conn := dialRaw(t, a.Endpoint())

	header := metadata.Pairs("workload.spiffe.io", "true")
	type row struct {
		name   string
		md     metadata.MD
		method string
		body   []byte
		want   codes.Code
	}
	var rows []row
	for _, method := range rpcs {
		for name, md := range map[string]metadata.MD{
			"no header": nil, "True": metadata.Pairs("workload.spiffe.io", "True"), "1": metadata.Pairs("workload.spiffe.io", "1"),
			"twice": metadata.Pairs("workload.spiffe.io", "true", "workload.spiffe.io", "false"),
		} {
			rows = append(rows, row{name, md, api + method, nil, codes.InvalidArgument})
		}
	}
	for _, method := range reflections {
		rows = append(rows, row{"reflection without header", nil, method, nil, codes.InvalidArgument})
	}
	for _, method := range rpcs[2:] {
		rows = append(rows, row{"not built", header, api + method, nil, codes.Unimplemented})
	}
	rows = append(
		rows,
		row{"no identity", header, api + "FetchX509SVID", nil, codes.PermissionDenied},
		row{"no identity", header, api + "FetchX509Bundles", nil, codes.PermissionDenied},
		row{"unknown method", header, api + "FetchSSHSVID", nil, codes.Unimplemented},
		row{"unknown method without header", nil, api + "FetchSSHSVID", nil, codes.InvalidArgument},
		row{"service with the prose's name", header, "/WorkloadAPI/FetchX509SVID", nil, codes.Unimplemented},
		row{"other case", header, "/spiffeworkloadapi/fetchx509svid", nil, codes.Unimplemented},
		row{"trailing slash", header, api + "FetchX509SVID/", nil, codes.Unimplemented},
		row{"oversize", header, api + "FetchX509SVID", make([]byte, 5<<20), codes.ResourceExhausted},
		// gRPC answers this one by itself, before any handler sees it.
		row{"malformed", header, api + "FetchX509SVID", []byte{0xff, 0xff, 0xff}, codes.Internal},
	)
	for _, r := range rows {
		t.Run(r.method+"/"+r.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(t.Context(), r.md), 20*time.Second)
			defer cancel()
			if _, got := call(ctx, conn, r.method, r.body); got != r.want {
				t.Errorf("%v, want %v", got, r.want)
			}
		})
	}

	t.Run("registered later, then revoked, then registered again", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(t.Context(), header), 30*time.Second)
		defer cancel()
		for range 2 {
			var entry struct {
				ID string `json:"id"`
			}
			s.CLIJSON(&entry, "entry", "create", "--parent-id", a.ID, "--spiffe-id", "spiffe://example.org/w",
				"--selector", fmt.Sprintf("unix:uid:%d", os.Getuid()))
			stream, code := call(ctx, conn, api+"FetchX509SVID", nil)
			if code != codes.OK {
				t.Fatalf("after registration: %v", code)
			}
			s.CLI("entry", "delete", entry.ID)
			var reply []byte
			if got := status.Code(stream.RecvMsg(&reply)); got != codes.PermissionDenied {
				t.Fatalf("after revocation: %v with %d bytes", got, len(reply))
			}
		}
	})

	t.Run("shutdown and the time after", func(t *testing.T) {
		s.CreateEntry(a.ID, "spiffe://example.org/w")
		ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(t.Context(), header), 30*time.Second)
		defer cancel()
		stream, code := call(ctx, conn, api+"FetchX509SVID", nil)
		if code != codes.OK {
			t.Fatal(code)
		}
		a.Stop(syscall.SIGTERM)
		var reply []byte
		if got := status.Code(stream.RecvMsg(&reply)); got != codes.Unavailable {
			t.Errorf("stream at shutdown: %v", got)
		}
		if _, got := call(ctx, conn, api+"FetchX509SVID", nil); got != codes.Unavailable {
			t.Errorf("without an agent: %v", got)
		}
	})
}

// WL-11: an agent that has never reached its server is not ready; that is not
// a denial.
func TestAgentWithoutServerIsUnavailable(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	token := a.Join()
	s.Server.Stop(syscall.SIGTERM)
	a.Launch(token)
	a.Eventually(10*time.Second, "socket", func() error {
		conn, err := net.Dial("unix", a.Socket())
		if err == nil {
			_ = conn.Close()
		}
		return err
	})
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"), 10*time.Second)
	defer cancel()
	if _, got := call(ctx, dialRaw(t, a.Endpoint()), api+"FetchX509SVID", nil); got != codes.Unavailable {
		t.Errorf("got %v", got)
	}
	// The agent stays up and joins by itself when the server comes back.
	s.StartServer()
	a.WaitReady(a.Ops)
}

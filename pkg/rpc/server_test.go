package rpc_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
)

const (
	bundleMethod = "/assay.agent.v1.Agent/Bundle"
	renewMethod  = "/assay.agent.v1.Agent/Renew"
	syncMethod   = "/assay.agent.v1.Agent/Sync"
)

// service answers with what a test puts into it.
type service struct {
	agentv1.UnimplementedAgentServer
	bundle func(ctx context.Context) (*agentv1.BundleResponse, error)
	sync   func(grpc.BidiStreamingServer[agentv1.SyncRequest, agentv1.SyncResponse]) error
}

func (s *service) Bundle(ctx context.Context, _ *agentv1.BundleRequest) (*agentv1.BundleResponse, error) {
	return s.bundle(ctx)
}

func (s *service) Sync(stream grpc.BidiStreamingServer[agentv1.SyncRequest, agentv1.SyncResponse]) error {
	return s.sync(stream)
}

func serve(t *testing.T, cfg rpc.ServerConfig, svc *service, lis net.Listener) *grpc.Server {
	t.Helper()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	srv := rpc.NewServer(cfg)
	agentv1.RegisterAgentServer(srv, svc)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(lis) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-done; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	return srv
}

func unixListener(t *testing.T) (net.Listener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s.sock")
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return lis, "unix://" + path
}

func dial(t *testing.T, target string, creds credentials.TransportCredentials) agentv1.AgentClient {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return agentv1.NewAgentClient(conn)
}

func TestMethodTableIsTheOnlyWayIn(t *testing.T) {
	lis, target := unixListener(t)
	reg := prometheus.NewRegistry()
	var seen rpc.Caller
	svc := &service{bundle: func(ctx context.Context) (*agentv1.BundleResponse, error) {
		seen = rpc.CallerFrom(ctx)
		if rpc.RequestID(ctx) == "" {
			t.Error("no request id")
		}
		return &agentv1.BundleResponse{}, nil
	}}
	srv := serve(t, rpc.ServerConfig{
		Name: "test", Creds: rpc.LocalCreds(), Metrics: rpc.NewMetrics(reg),
		Methods: rpc.Methods{
			bundleMethod: rpc.Anyone,
			renewMethod:  func(rpc.Caller) error { return fault.New(fault.Denied, "not_you", "you may not") },
		},
	}, svc, lis)
	client := dial(t, target, insecure.NewCredentials())

	if _, err := client.Bundle(t.Context(), &agentv1.BundleRequest{}); err != nil {
		t.Fatal(err)
	}
	if !seen.Local || seen.UID != uint32(os.Getuid()) || seen.GID != uint32(os.Getgid()) || seen.Addr != "unix" {
		t.Errorf("caller %+v", seen)
	}
	_, err := client.Renew(t.Context(), &agentv1.RenewRequest{})
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "not_you: you may not (request_id=") {
		t.Errorf("rule: %v", err)
	}
	_, err = client.SignX509(t.Context(), &agentv1.SignX509Request{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("a method without a rule: %v", err)
	}
	if got := rpc.Uncovered(srv, rpc.Methods{bundleMethod: rpc.Anyone}); len(got) != 4 {
		t.Errorf("uncovered: %v", got)
	}
	if n := testutil.CollectAndCount(reg, "assay_rpc_denials_total"); n != 1 {
		t.Errorf("%d denial series", n)
	}
}

// WL-4, WL-5, WL-6, D-16, NEG-35: the header is demanded once, exactly, on every
// path, before the method table is looked at.
func TestHeaderComesFirst(t *testing.T) {
	lis, target := unixListener(t)
	svc := &service{bundle: func(context.Context) (*agentv1.BundleResponse, error) { return &agentv1.BundleResponse{}, nil }}
	serve(t, rpc.ServerConfig{
		Name: "api", Creds: rpc.LocalCreds(), HeaderKey: "workload.spiffe.io", HeaderValue: "true",
		Methods: rpc.Methods{bundleMethod: rpc.Anyone},
	}, svc, lis)
	client := dial(t, target, insecure.NewCredentials())
	cases := []struct {
		values []string
		ok     bool
	}{
		{nil, false},
		{[]string{"True"}, false},
		{[]string{"TRUE"}, false},
		{[]string{"1"}, false},
		{[]string{"true", "false"}, false},
		{[]string{"true", "true"}, false},
		{[]string{"true"}, true},
	}
	for _, c := range cases {
		md := metadata.MD{}
		md.Append("workload.spiffe.io", c.values...)
		ctx := metadata.NewOutgoingContext(t.Context(), md)
		_, err := client.Bundle(ctx, &agentv1.BundleRequest{})
		if c.ok != (err == nil) || !c.ok && status.Code(err) != codes.InvalidArgument {
			t.Errorf("%q: %v", c.values, err)
		}
		_, err = client.Renew(ctx, &agentv1.RenewRequest{}) // not in the table
		want := codes.InvalidArgument
		if c.ok {
			want = codes.Unimplemented
		}
		if status.Code(err) != want {
			t.Errorf("%q, unlisted: %v", c.values, err)
		}
	}
}

// WL-24, CODE-12: a handler that ends by its context never sends Canceled.
func TestHandlerErrorsBecomeSafeStatuses(t *testing.T) {
	lis, target := unixListener(t)
	var result error
	svc := &service{
		bundle: func(context.Context) (*agentv1.BundleResponse, error) {
			if result == nil {
				panic("secret")
			}
			return &agentv1.BundleResponse{}, result
		},
		sync: func(grpc.BidiStreamingServer[agentv1.SyncRequest, agentv1.SyncResponse]) error {
			panic("secret")
		},
	}
	serve(t, rpc.ServerConfig{
		Name: "test", Creds: rpc.LocalCreds(),
		Methods: rpc.Methods{bundleMethod: rpc.Anyone, syncMethod: rpc.Anyone},
	}, svc, lis)
	client := dial(t, target, insecure.NewCredentials())
	cases := []struct {
		result error
		want   codes.Code
	}{
		{nil, codes.Internal},
		{context.Canceled, codes.Unavailable},
		{context.DeadlineExceeded, codes.Unavailable},
		{status.Error(codes.Canceled, "x"), codes.Unavailable},
		{errors.New("secret"), codes.Internal},
		{fault.Wrap(fault.Conflict, errors.New("secret"), "busy", "try again"), codes.Aborted},
	}
	for _, c := range cases {
		result = c.result
		_, err := client.Bundle(t.Context(), &agentv1.BundleRequest{})
		if status.Code(err) != c.want || strings.Contains(err.Error(), "secret") {
			t.Errorf("%v: %v", c.result, err)
		}
	}
	stream, err := client.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Internal {
		t.Errorf("panic in a stream: %v", err)
	}
}

// NEG-25: a rule that panics, or fails with an error of no kind, refuses its
// call, and no handler runs. The process and the connection go on.
func TestRuleThatPanicsRefuses(t *testing.T) {
	lis, target := unixListener(t)
	logs := &strings.Builder{}
	svc := &service{bundle: func(context.Context) (*agentv1.BundleResponse, error) { return &agentv1.BundleResponse{}, nil }}
	serve(t, rpc.ServerConfig{
		Methods: rpc.Methods{
			bundleMethod: rpc.Anyone,
			renewMethod:  func(rpc.Caller) error { panic("a secret of ours") },
			syncMethod:   func(rpc.Caller) error { return errors.New("a secret of ours") },
		},
		Creds: rpc.LocalCreds(), Log: slog.New(slog.NewTextHandler(logs, nil)),
	}, svc, lis)
	client := dial(t, target, rpc.LocalCreds())
	_, err := client.Renew(t.Context(), &agentv1.RenewRequest{})
	if status.Code(err) != codes.Internal || fault.ReasonOf(fault.FromStatus(err)) != "authz_error" || strings.Contains(err.Error(), "secret") {
		t.Errorf("the caller sees %v", err)
	}
	stream, err := client.Sync(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "secret") {
		t.Errorf("a rule that fails: the caller sees %v", err)
	}
	if _, err := client.Bundle(t.Context(), &agentv1.BundleRequest{}); err != nil {
		t.Errorf("the next call: %v", err)
	}
	if !strings.Contains(logs.String(), "a secret of ours") {
		t.Error("the log does not have the cause")
	}
}

func TestReflectionNeedsRulesToo(t *testing.T) {
	srv := grpc.NewServer()
	reflection.Register(srv)
	if got := rpc.Uncovered(srv, nil); len(got) != 2 {
		t.Errorf("v1 and v1alpha expected, got %v", got)
	}
}

func TestTLSRecordsTheCallersCertificate(t *testing.T) {
	ca := newPKI(t)
	serverID := spiffeid.RequireFromString("spiffe://example.org/assay/server")
	serverCert := ca.sign(leafTemplate(serverID.String()))
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var seen rpc.Caller
	svc := &service{bundle: func(ctx context.Context) (*agentv1.BundleResponse, error) {
		seen = rpc.CallerFrom(ctx)
		if _, ok := rpc.ConnectionState(ctx); !ok {
			t.Error("no TLS state")
		}
		return &agentv1.BundleResponse{}, nil
	}}
	serve(t, rpc.ServerConfig{
		Name:    "agents",
		Creds:   rpc.ServerTLS(func() (*tls.Certificate, error) { return serverCert, nil }, ca.roots),
		Methods: rpc.Methods{bundleMethod: rpc.Anyone},
	}, svc, lis)

	expired := leafTemplate("spiffe://example.org/assay/agent/x")
	expired.NotBefore, expired.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	foreign := newPKI(t)
	cases := map[string]struct {
		leaf  *tls.Certificate
		state rpc.CertState
		ok    bool
	}{
		"none":    {nil, rpc.CertNone, true},
		"valid":   {ca.sign(leafTemplate("spiffe://example.org/assay/agent/x")), rpc.CertValid, true},
		"expired": {ca.sign(expired), rpc.CertExpired, true},
		"foreign": {foreign.sign(leafTemplate("spiffe://example.org/assay/agent/x")), 0, false},
		"no SVID": {ca.sign(leafTemplate("")), 0, false},
	}
	trust := func() []*x509.Certificate { return []*x509.Certificate{ca.cert} }
	for name, c := range cases {
		client := dial(t, lis.Addr().String(), rpc.ClientTLS(serverID, trust, func() *tls.Certificate { return c.leaf }))
		_, err := client.Bundle(t.Context(), &agentv1.BundleRequest{})
		if c.ok != (err == nil) {
			t.Errorf("%s: %v", name, err)
		}
		if c.ok && (seen.State != c.state || c.leaf != nil && (seen.Serial != "abc123" || seen.ID.Path() != "/assay/agent/x")) {
			t.Errorf("%s: caller %+v", name, seen)
		}
	}

	t.Run("client refuses the wrong server", func(t *testing.T) {
		other := spiffeid.RequireFromString("spiffe://example.org/assay/other")
		for name, creds := range map[string]credentials.TransportCredentials{
			"other ID":   rpc.ClientTLS(other, trust, func() *tls.Certificate { return nil }),
			"other root": rpc.ClientTLS(serverID, func() []*x509.Certificate { return []*x509.Certificate{foreign.cert} }, func() *tls.Certificate { return nil }),
		} {
			if _, err := dial(t, lis.Addr().String(), creds).Bundle(t.Context(), &agentv1.BundleRequest{}); status.Code(err) != codes.Unavailable {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	t.Run("TLS 1.2 and a missing h2 are refused", func(t *testing.T) {
		for name, cfg := range map[string]*tls.Config{
			"1.2":   {InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}},
			"no h2": {InsecureSkipVerify: true},
		} {
			conn, err := tls.Dial("tcp", lis.Addr().String(), cfg)
			if err == nil {
				_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
				_, err = conn.Read(make([]byte, 1))
				_ = conn.Close()
			}
			if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

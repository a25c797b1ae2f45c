package rpc_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// NEG-20, NEG-43: half a call does not last, and a whole one lasts as long as it
// wants.
func TestCallsWhoseMessageDoesNotComeEnd(t *testing.T) {
	lis, target := unixListener(t)
	const limit = time.Second // busy machines take long from the headers to the message
	svc := &service{
		bundle: func(context.Context) (*agentv1.BundleResponse, error) { return &agentv1.BundleResponse{}, nil },
		sync: func(stream grpc.BidiStreamingServer[agentv1.SyncRequest, agentv1.SyncResponse]) error {
			for {
				if _, err := stream.Recv(); errors.Is(err, io.EOF) {
					return nil
				} else if err != nil {
					return err
				}
			}
		},
	}
	reg := prometheus.NewRegistry()
	serve(t, rpc.ServerConfig{
		Name: "test", Creds: rpc.LocalCreds(), MessageTimeout: limit, Metrics: rpc.NewMetrics(reg),
		Methods: rpc.Methods{bundleMethod: rpc.Anyone, syncMethod: rpc.Anyone},
	}, svc, lis)
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, method := range []string{bundleMethod, syncMethod} {
		began := time.Now()
		half, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		err = half.RecvMsg(&agentv1.BundleResponse{})
		if status.Code(err) != codes.Canceled || time.Since(began) < limit {
			t.Errorf("%s: after %v: %v", method, time.Since(began), err)
		}
	}
	client := agentv1.NewAgentClient(conn)
	stream, err := client.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&agentv1.SyncRequest{}); err != nil {
		t.Fatal(err)
	}
	<-time.After(2 * limit)
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("a stream with its message: %v", err)
	}
	// What the transport refuses by itself is in the metrics, too.
	big := &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{Csr: make([]byte, 100<<10)}}}
	if err := conn.Invoke(t.Context(), bundleMethod, big, &agentv1.BundleResponse{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("100 KiB: %v", err)
	}
	if _, err := client.Bundle(t.Context(), &agentv1.BundleRequest{}); err != nil {
		t.Fatal(err)
	}
	for series, want := range map[string]float64{
		`assay_limit_refusals_total{reason="message_too_large",server="test"}`:                             1,
		`assay_rpc_requests_total{code="OK",method="/assay.agent.v1.Agent/Bundle",server="test"}`:          1,
		`assay_rpc_requests_total{code="Unavailable",method="/assay.agent.v1.Agent/Bundle",server="test"}`: 1,
		`assay_rpc_requests_total{code="Unavailable",method="/assay.agent.v1.Agent/Sync",server="test"}`:   1,
	} {
		if got := sampled(t, reg)[series]; got != want {
			t.Errorf("%s is %v, want %v", series, got, want)
		}
	}
}

// sampled reads all counters.
func sampled(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]float64{}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			name, sep := family.GetName(), "{"
			for _, label := range m.GetLabel() {
				name += sep + label.GetName() + `="` + label.GetValue() + `"`
				sep = ","
			}
			all[name+"}"] = m.GetCounter().GetValue()
		}
	}
	return all
}

//go:build e2e && long

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/test/harness"
)

// A workload that ceases to read holds nobody up: its stream is closed, what came
// on it is waited out, and the root is replaced under all others. // NEG-43
func TestARootIsReplacedPastAClientThatDoesNotRead(t *testing.T) {
	t.Parallel()
	f := newFleetAt(t, newSite(t, quickTTL), 2)
	a := f.site.NewAgent("stalled")
	a.Start(a.Join())
	manyEntries(f.site, a, 100)
	stream := neverRead(t, a)
	a.Eventually(time.Minute, "all its SVIDs on the stream", func() error {
		resp, err := stream.Recv()
		if err == nil && len(resp.GetSvids()) < 100 {
			err = fmt.Errorf("%d SVIDs", len(resp.GetSvids()))
		}
		return err
	})

	begin := time.Now()
	f.site.CLI("root", "rotate", "--yes", "--detach")
	closed := regexp.MustCompile(`assay_workload_denials_total\{.*reason="stream_stalled".*\} [1-9]`)
	a.Eventually(time.Minute, "the stream to be given up", func() error {
		if !closed.MatchString(scrape(t, a.Ops)) {
			return errors.New("not yet")
		}
		return nil
	})
	t.Logf("closed %v after the rotation began", time.Since(begin).Round(100*time.Millisecond))
	st := f.until("the end of the rotation", ended("done"))
	if st.state(st.Rotation.From) != "revoked" || len(st.Rotation.Missed) != 0 {
		t.Errorf("after it: %+v", st)
	}
	var err error
	for err == nil { // what was on its way
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unavailable || !strings.Contains(fmt.Sprint(status.Convert(err).Details()), "stream_stalled") {
		t.Errorf("the stream ended with %v %v", err, status.Convert(err).Details())
	}
	if _, err := fetch(t, a, 30*time.Second); err != nil {
		t.Errorf("its next stream: %v", err)
	}
	f.check()
}

// manyEntries gives this user's processes so many identities that a message with
// all of them is larger than what goes ahead of a client that does not read.
func manyEntries(s *harness.Site, a *harness.Agent, n int) {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf(`{"spiffe_id": "spiffe://example.org/many/%d", "parent_id": %q, "selectors": ["unix:uid:%d"]}`, i, a.ID, os.Getuid()))
	}
	s.CLI("entry", "apply", "-f", s.Write("many.json", `{"entries": [`+strings.Join(list, ",")+`]}`))
}

// neverRead opens a stream whose window does not grow.
func neverRead(t *testing.T, a *harness.Agent) grpc.ServerStreamingClient[workload.X509SVIDResponse] {
	t.Helper()
	conn, err := grpc.NewClient(a.Endpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithStaticStreamWindowSize(64<<10))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true"))
	t.Cleanup(cancel)
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

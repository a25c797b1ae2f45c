//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// NEG-13: a ban ends the workloads' streams, the agent and what it keeps; an
// eviction alone lets a node back in, by a new token.
func TestBanAndEviction(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	s.CreateEntry(a.ID, "spiffe://example.org/w")
	if _, err := fetch(t, a, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	ctx := metadata.NewOutgoingContext(t.Context(), metadata.Pairs("workload.spiffe.io", "true"))
	stream, code := call(ctx, dialRaw(t, a.Endpoint()), api+"FetchX509SVID", nil)
	if code != codes.OK {
		t.Fatal(code)
	}

	s.CLI("agent", "ban", "--yes", a.ID)
	asked := time.Now()
	var reply []byte
	err := stream.RecvMsg(&reply)
	for err == nil {
		err = stream.RecvMsg(&reply)
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("the workload's stream: %v", err)
	}
	<-a.Done()
	t.Logf("the agent ended %v after the ban", time.Since(asked))
	if code := a.ExitCode(); code != 77 {
		t.Errorf("the agent's exit code is %d", code)
	}
	if left, err := filepath.Glob(filepath.Join(a.RunDir(), "*")); err != nil || len(left) > 0 {
		t.Errorf("left in run_dir: %v, %v", left, err)
	}
	if key, err := os.ReadFile(s.File("agent/data/identity.json")); err == nil {
		t.Errorf("the identity is still there: %d bytes", len(key))
	}

	if _, _, code := s.Try("assay", "agent", "evict", "--yes", a.ID); code != 0 {
		t.Errorf("evict: exit %d", code)
	}
	old := a.ID
	a.Start(a.Join())
	if a.ID == old {
		t.Errorf("the new token gave the old ID %s", old)
	}
	s.CreateEntry(a.ID, "spiffe://example.org/w")
	if _, err := fetch(t, a, 10*time.Second); err != nil {
		t.Error(err)
	}
}

//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/seed-caa81108/assay/test/harness"
)

// written makes an entry for this user on a's node and returns the revision to
// wait for.
func written(s *harness.Site, a *harness.Agent, path string) string {
	var made struct {
		Revision      int64 `json:"revision"`
		StoreRevision int64 `json:"store_revision"`
	}
	s.CLIJSON(&made, "entry", "create", "--parent-id", a.ID, "--spiffe-id", "spiffe://example.org"+path, "--selector", fmt.Sprintf("unix:uid:%d", os.Getuid()))
	return strconv.FormatInt(made.StoreRevision, 10)
}

// A pipeline registers a workload and starts it: once the wait ends, the first
// call has the identity. An agent that does not answer is named.
func TestWaitForAllAgents(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a, b := s.NewAgent("a"), s.NewAgent("b")
	a.Start(a.Join())
	b.Start(b.Join())

	for i := range 3 {
		path := fmt.Sprintf("/w%d", i)
		revision := written(s, a, path)
		began := time.Now()
		s.CLI("wait", "--revision", revision, "--all-agents")
		t.Logf("revision %s was everywhere after %v", revision, time.Since(began))
		got, err := workloadapi.FetchX509Context(t.Context(), workloadapi.WithAddr(a.Endpoint()))
		if err != nil {
			t.Fatal(err)
		}
		if len(got.SVIDs) != i+1 {
			t.Errorf("%d identities right after the wait, want %d", len(got.SVIDs), i+1)
		}
		var state struct {
			Revision int64 `json:"revision"`
			Agents   []struct {
				Revision int64 `json:"revision"`
			} `json:"agents"`
		}
		s.CLIJSON(&state, "status")
		for _, agent := range state.Agents {
			if have := strconv.FormatInt(agent.Revision, 10); len(have) < len(revision) || len(have) == len(revision) && have < revision {
				t.Errorf("an agent is at %s, the wait was for %s", have, revision)
			}
		}
	}

	b.Signal(syscall.SIGSTOP)
	revision := written(s, b, "/stopped")
	stdout, stderr, code := s.Try("assay", "wait", "--revision", revision, "--all-agents", "--timeout", "5s")
	if code != 75 || !strings.HasPrefix(stderr, "error: wait_timeout: ") || !strings.Contains(stderr, b.ID) || strings.Contains(stderr, a.ID) ||
		!strings.Contains(stdout, "1 of 2 agents") {
		t.Errorf("exit %d, %q %q", code, stdout, stderr)
	}
	b.Signal(syscall.SIGCONT)
	s.CLI("wait", "--revision", revision, "--all-agents")
	if _, err := fetch(t, b, 10*time.Second); err != nil {
		t.Error(err)
	}

	// An agent that is away is waited for until it is evicted.
	b.Stop(syscall.SIGTERM)
	written(s, b, "/away")
	if _, stderr, code = s.Try("assay", "wait", "--all-agents", "--timeout", "3s"); code != 75 || !strings.Contains(stderr, b.ID+" (away since ") {
		t.Errorf("exit %d, %q", code, stderr)
	}
	s.CLI("agent", "evict", "--yes", b.ID)
	s.CLI("wait", "--all-agents")
}

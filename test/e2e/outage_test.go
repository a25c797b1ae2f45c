//go:build e2e

package e2e

import (
	"context"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/seed-caa81108/assay/test/harness"
)

// patient is a context for a call whose entry may be on its way still: an agent
// holds who tells it no deadline for longest.
func patient(t *testing.T, limit time.Duration) (context.Context, func()) {
	ctx, cancel := context.WithCancel(t.Context())
	timer := time.AfterFunc(limit, cancel)
	return ctx, func() {
		timer.Stop()
		cancel()
	}
}

func fetch(t *testing.T, a *harness.Agent, limit time.Duration) (string, error) {
	t.Helper()
	ctx, cancel := patient(t, limit)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(a.Endpoint()))
	if err != nil {
		return "", err
	}
	return svid.Certificates[0].SerialNumber.Text(16), nil
}

// I9, P4, NEG-59: with the server gone, an agent serves what it holds, also
// after its own restart.
func TestAgentServesThroughAnOutageAndItsOwnRestart(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	s.CreateEntry(a.ID, "spiffe://example.org/w")
	before, err := fetch(t, a, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	a.Stop(syscall.SIGTERM)
	s.Server.Stop(syscall.SIGKILL)
	a.Launch(harness.Token{})
	a.Eventually(10*time.Second, "the SVID from before", func() error {
		after, err := fetch(t, a, 5*time.Second)
		if err == nil && after != before {
			t.Fatalf("serial %s, had %s: who signed that?", after, before)
		}
		return err
	})
	s.StartServer()
	a.WaitReady(a.Ops)
}

// A reboot empties run_dir and nothing else: no human is needed.
func TestRebootNeedsNoHuman(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	s.CreateEntry(a.ID, "spiffe://example.org/w")
	if _, err := fetch(t, a, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	a.Stop(syscall.SIGKILL)
	s.Server.Stop(syscall.SIGKILL)
	if err := os.RemoveAll(a.RunDir()); err != nil {
		t.Fatal(err)
	}
	s.StartServer()
	a.Start(harness.Token{})
	if _, err := fetch(t, a, 10*time.Second); err != nil {
		t.Fatal(err)
	}
}

// An agent whose SVID ran out while it was off comes back by attestor rejoin,
// with the key that the server knows.
func TestExpiredAgentRejoins(t *testing.T) {
	s := newSite(t, shortTTL+"attestation:\n  agent_svid_ttl: 12s\n")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	s.CreateEntry(a.ID, "spiffe://example.org/w")
	if _, err := fetch(t, a, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	a.Stop(syscall.SIGKILL)
	<-time.After(14 * time.Second)
	a.Start(harness.Token{})
	if _, err := fetch(t, a, 10*time.Second); err != nil {
		t.Fatal(err)
	}
}

//go:build e2e

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/test/harness"
)

// identities runs a copy of assay as a workload and returns the paths of the
// SPIFFE IDs that it fetched, sorted.
func identities(t *testing.T, program string) ([]string, error) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program, "svid", "fetch", "-o", "json").Output()
	if err != nil {
		return nil, fmt.Errorf("%s svid fetch: %w", program, err)
	}
	var got struct {
		SVIDs []struct {
			SPIFFEID string `json:"spiffe_id"`
		} `json:"svids"`
	}
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	var ids []string
	for _, svid := range got.SVIDs {
		ids = append(ids, strings.TrimPrefix(svid.SPIFFEID, "spiffe://example.org"))
	}
	slices.Sort(ids)
	return ids, nil
}

// wantIdentities waits until a program gets what an agent was just told of.
func wantIdentities(t *testing.T, a *harness.Agent, program string, want ...string) {
	t.Helper()
	a.Eventually(time.Minute, "the identities", func() error {
		got, err := identities(t, program)
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("the program got %q", got)
		}
		return err
	})
}

// NEG-37: a program is told apart by where it lies and what is in it, together
// with its user, and never by itself.
func TestIdentityOfAProgram(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.More = "attestation:\n  unix:\n    discover_workload_path: true\n"
	a.Start(a.Join())
	program := filepath.Join(s.Bins, "assay")
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	elsewhere := s.File("elsewhere")
	if err := os.WriteFile(elsewhere, data, 0o755); err != nil {
		t.Fatal(err)
	}

	_, stderr, code := s.Try("assay", "entry", "create", "--parent-id", a.ID,
		"--spiffe-id", "spiffe://example.org/weak", "--selector", "unix:path:"+program)
	if code != 78 || !strings.HasPrefix(stderr, "error: selector_too_weak: ") {
		t.Fatalf("exit %d, %q", code, stderr)
	}
	s.CreateEntry(a.ID, "spiffe://example.org/at-path", "--selector", "unix:path:"+program)
	s.CreateEntry(a.ID, "spiffe://example.org/by-content", "--selector", "unix:sha256:"+hex.EncodeToString(sum[:]))

	t.Setenv("SPIFFE_ENDPOINT_SOCKET", a.Endpoint())
	wantIdentities(t, a, program, "/at-path", "/by-content")
	if got, err := identities(t, elsewhere); err != nil || !slices.Equal(got, []string{"/by-content"}) {
		t.Errorf("its copy got %q, %v", got, err)
	}
}

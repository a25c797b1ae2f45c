//go:build e2e

package e2e

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/test/harness"
)

const opsID = "spiffe://" + harness.TrustDomain + "/ops/ci"

// An operator works from another host with the SVID that its own agent gives
// it: entries and reads, and nothing by which it or another becomes powerful.
func TestRemoteOperator(t *testing.T) {
	s := newSite(t, "")
	s.RemoteOperators = []string{opsID, "spiffe://" + harness.TrustDomain + "/ops/oncall"}
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	s.CreateEntry(a.ID, opsID)
	if _, err := fetch(t, a, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	from := []string{"--server", fmt.Sprintf("127.0.0.1:%d", s.Port), "--identity", a.Endpoint(), "--as", opsID}
	remote := func(args ...string) (string, string, int) {
		t.Helper()
		return s.Try("assay", append(args, from...)...)
	}
	refused := func(reason string, args ...string) {
		t.Helper()
		if _, stderr, code := remote(args...); code != 77 || !strings.Contains(stderr, reason) {
			t.Errorf("assay %v: exit %d, %s", args, code, stderr)
		}
	}

	user := fmt.Sprintf("unix:uid:%d", os.Getuid())
	create := []string{"entry", "create", "--parent-id", a.ID, "--selector", user, "-o", "json"}
	out, stderr, code := remote(append(create, "--spiffe-id", "spiffe://example.org/web", "--hint", "web")...)
	var web struct{ ID string }
	if err := json.Unmarshal([]byte(out), &web); code != 0 || err != nil {
		t.Fatalf("exit %d, %v: %s%s", code, err, out, stderr)
	}
	for _, verb := range [][]string{
		{"entry", "list"},
		{"entry", "show", web.ID},
		{"entry", "count"},
		{"agent", "list"},
		{"agent", "show", a.ID},
		{"bundle", "show"},
		{"status"},
		{"entry", "update", web.ID, "--ttl", "30m"},
	} {
		if out, stderr, code := remote(verb...); code != 0 || out == "" {
			t.Errorf("assay %v: exit %d, %s", verb, code, stderr)
		}
	}
	s.CLI("wait", "--all-agents")
	s.CLI("svid", "fetch", "--socket", a.Endpoint(), "--hint", "web")

	refused("local_only", "token", "create")
	refused("local_only", "agent", "ban", "--yes", a.ID)
	refused("local_only", "x509", "mint", "--spiffe-id", opsID, "--write", s.File("minted"))
	refused("entry_local_only", append(create, "--spiffe-id", opsID, "--hint", "more")...)
	refused("entry_local_only", append(create, "--spiffe-id", "spiffe://example.org/ops/oncall")...)
	refused("entry_local_only", "entry", "update", web.ID, "--spiffe-id", opsID)
	refused("entry_local_only", "entry", "create", "--parent-id", "spiffe://example.org/assay/server", "--spiffe-id", "spiffe://example.org/nodes", "--selector", "spiffe_id:"+a.ID)
	file := s.Write("entries.json", fmt.Sprintf(`{"entries": [{"id": %q, "spiffe_id": "spiffe://example.org/web", "parent_id": %q, "selectors": [%q], "hint": "web"},
		{"spiffe_id": "spiffe://example.org/ops/oncall", "parent_id": %q, "selectors": [%q]}]}`, web.ID, a.ID, user, a.ID, user))
	refused("entry_local_only", "entry", "apply", "-f", file)
	var entries struct {
		Entries []struct {
			ID       string
			SPIFFEID string `json:"spiffe_id"`
		}
	}
	s.CLIJSON(&entries, "entry", "list", "--spiffe-id", opsID)
	if len(entries.Entries) != 1 {
		t.Fatalf("the operator's entries are %v", entries)
	}
	refused("entry_local_only", "entry", "update", entries.Entries[0].ID, "--selector", "unix:uid:0")
	refused("entry_local_only", "entry", "delete", entries.Entries[0].ID)

	// The agent itself is no operator, and neither is another workload.
	from = []string{"--server", from[1], "--identity", agentIdentity(t, s, "agent")}
	refused("operator_not_allowed", "entry", "list")
	refused("operator_not_allowed", "entry", "delete", web.ID)
	from = []string{"--server", from[1], "--identity", a.Endpoint(), "--as", "spiffe://example.org/web"}
	refused("operator_not_allowed", "status")

	// From files, as a program without a Workload API has them.
	dir := s.File("ops")
	s.CLI("svid", "fetch", "--socket", a.Endpoint(), "--id", opsID, "--dir", dir)
	from = []string{"--server", from[1], "--identity", dir}
	if _, stderr, code := remote("entry", "delete", web.ID); code != 0 {
		t.Errorf("exit %d, %s", code, stderr)
	}
	audit, err := os.ReadFile(s.Audit())
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for line := range strings.Lines(string(audit)) {
		found = found || strings.Contains(line, `"entry.delete"`) && strings.Contains(line, `"`+opsID+`"`) && strings.Contains(line, `"127.0.0.1:`)
	}
	if !found {
		t.Error("the audit log does not name who deleted the entry, and from where")
	}

	// Taken out of the configuration, the operator is cut off by a restart.
	s.RemoteOperators = nil
	s.Server.Stop(syscall.SIGTERM)
	s.StartServer()
	refused("operator_not_allowed", "entry", "list")
}

// agentIdentity makes files of an agent's own certificate and key.
func agentIdentity(t *testing.T, s *harness.Site, agent string) string {
	t.Helper()
	data, err := os.ReadFile(s.File(agent + "/data/identity.json"))
	if err != nil {
		t.Fatal(err)
	}
	var identity struct {
		Key   []byte
		Chain [][]byte
	}
	if err := json.Unmarshal(data, &identity); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "identity")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var chain []byte
	for _, der := range identity.Chain {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	for name, content := range map[string][]byte{
		"svid.pem": chain, "svid_key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: identity.Key}), "bundle.pem": []byte(s.CLI("bundle", "show")),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

package main

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// withAliases is a server whose first agent has a selector and three aliases.
func withAliases(t *testing.T) *fakeServer {
	t.Helper()
	f := populated(newPKI(t))
	f.agents[0].Selectors = selectors("x509pop", "role:web", "x509pop", "zone:a")
	about := func(id1, path string, parent *types.SPIFFEID, sel ...string) *types.Entry {
		return &types.Entry{Id: id1, SpiffeId: id(path), ParentId: parent, Selectors: selectors(sel...)}
	}
	server := id("/assay/server")
	f.entries = append(f.entries,
		about("a-1", "/group/web", server, "x509pop", "role:web"),
		about("a-2", "/host/1", id("/assay/agent/join_token/01"), "spiffe_id", nodeID),
		about("a-3", "/host/one", server, "spiffe_id", nodeID),
		about("a-4", "/group/web", server, "x509pop", "zone:a"), // a second way to the same alias
		about("a-5", "/group/db", server, "x509pop", "role:db"),
		about("a-6", "/group/both", server, "x509pop", "role:web", "x509pop", "zone:b"),
		about("a-7", "/host/2", id("/assay/agent/join_token/02"), "spiffe_id", nodeID), // not its parent: no alias
		&types.Entry{Id: "a-8", SpiffeId: id("/group/old"), ParentId: server, Selectors: selectors("x509pop", "role:web"), ExpiresAt: longAgo.Unix()},
		&types.Entry{Id: "a-9", SpiffeId: id("/group/store"), ParentId: server, Selectors: selectors("x509pop", "role:web"), StoreSvid: true},
	)
	f.pageSize = 2
	return f
}

func TestAgentShowTellsAliases(t *testing.T) {
	vars := map[string]string{serverSocketEnv: withAliases(t).start(t)}
	got := assay(t, vars, "agent", "show", nodeID, "-o", "json")
	var doc struct {
		ID      string   `json:"id"`
		Aliases []string `json:"aliases"`
	}
	if err := json.Unmarshal([]byte(got.stdout), &doc); err != nil || got.code != 0 {
		t.Fatalf("exit %d, %v, %q%q", got.code, err, got.stdout, got.stderr)
	}
	want := []string{"spiffe://example.org/group/web", "spiffe://example.org/host/1", "spiffe://example.org/host/one"}
	if doc.ID != nodeID || !slices.Equal(doc.Aliases, want) {
		t.Errorf("got %+v", doc)
	}
	if got := assay(t, vars, "agent", "show", nodeID); strings.Count(got.stdout, "\nalias ") != len(want) {
		t.Errorf("got %q", got.stdout)
	}
}

func TestCreateAboutNodes(t *testing.T) {
	f := withAliases(t)
	vars := map[string]string{serverSocketEnv: f.start(t)}
	args := func(more ...string) []string {
		return append([]string{"entry", "create", "--node", "--spiffe-id", "spiffe://example.org/group/x"}, more...)
	}
	for _, c := range []struct{ selector, warning string }{
		{"x509pop:role:web", ""},
		{"spiffe_id:" + nodeID, ""},
		{"x509pop:role:mail", "warning: alias_unheld: "},
		{"unix:uid:5", `warning: selector_unknown: "unix:uid:5" matches no node: `},
	} {
		f.created = nil
		got := assay(t, vars, args("--selector", c.selector)...)
		if got.code != 0 || (got.stderr == "") != (c.warning == "") || !strings.HasPrefix(got.stderr, c.warning) || strings.Count(got.stderr, "\n") > 1 {
			t.Errorf("%s: exit %d, %q", c.selector, got.code, got.stderr)
		}
		if len(f.created) != 1 || idFromProto(f.created[0].GetParentId()) != "spiffe://example.org/assay/server" {
			t.Errorf("%s: created %v", c.selector, f.created)
		}
	}
	f.created = nil
	if got := assay(t, vars, args("--parent-id", nodeID, "--selector", "x509pop:role:web")...); got.code != 64 || len(f.created) > 0 {
		t.Errorf("two parents: exit %d, %q, %v", got.code, got.stderr, f.created)
	}
}

func TestCreateKnowsAliasesAsParents(t *testing.T) {
	vars := map[string]string{serverSocketEnv: withAliases(t).start(t)}
	for parent, known := range map[string]bool{
		"spiffe://example.org/group/web": true, "spiffe://example.org/host/1": true, "spiffe://example.org/group/db": true, // of nobody yet
		"spiffe://example.org/host/2": false, "spiffe://example.org/web": false, "spiffe://example.org/none": false,
	} {
		got := assay(t, vars, createArgs(parent, "unix:uid:5")...)
		if got.code != 0 || (got.stderr == "") != known || !known && !strings.HasPrefix(got.stderr, "warning: parent_unknown: "+parent+" ") {
			t.Errorf("%s: exit %d, %q", parent, got.code, got.stderr)
		}
	}
	// Of two entries the first makes the parent of the second.
	file := entriesFile(t, "e.yaml", `entries:
- {spiffe_id: "spiffe://example.org/fresh", parent_id: "spiffe://example.org/assay/server", selectors: ["x509pop:role:web"]}
- {spiffe_id: "spiffe://example.org/w", parent_id: "spiffe://example.org/fresh", selectors: ["unix:uid:5"]}
- {spiffe_id: "spiffe://example.org/w", parent_id: "spiffe://example.org/group/web", selectors: ["unix:uid:5"]}
`)
	if got := assay(t, vars, "entry", "apply", "-f", file); got.code != 0 || got.stderr != "" {
		t.Errorf("apply: exit %d, %q", got.code, got.stderr)
	}
	// A node's ID as selector is no alias unless that node is the parent.
	got := assay(t, vars, createArgs("spiffe://example.org/assay/agent/join_token/04", "spiffe_id:"+nodeID)...)
	if got.code != 0 || !strings.Contains(got.stderr, "warning: selector_unknown: ") || !strings.Contains(got.stderr, "it names a node") {
		t.Errorf("exit %d, %q", got.code, got.stderr)
	}
}

func TestTokenCreateAsksForAnAlias(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	const alias = "spiffe://example.org/host/1"
	got := assay(t, vars, "token", "create", "--agent-id", alias)
	if got.code != 0 || f.agentID.GetPath() != "/host/1" || !strings.Contains(got.stdout, "\nalias     "+alias+"\n") {
		t.Errorf("exit %d, %q%q, asked for %v", got.code, got.stdout, got.stderr, f.agentID)
	}
	got = assay(t, vars, "token", "create", "-o", "json", "--agent-id", alias)
	if got.code != 0 || !strings.Contains(got.stdout, `"alias":"`+alias+`"`) {
		t.Errorf("exit %d, %q", got.code, got.stdout)
	}
	f.agentID = nil
	for _, bad := range []string{"host/1", "spiffe://example.org", "spiffe://example.org/a/../b"} {
		if got := assay(t, vars, "token", "create", "--agent-id", bad); got.code != 65 || f.agentID != nil {
			t.Errorf("%s: exit %d, %q", bad, got.code, got.stderr)
		}
	}
	if got := assay(t, vars, "token", "create"); got.code != 0 || f.agentID != nil {
		t.Errorf("without: exit %d, asked for %v", got.code, f.agentID)
	}
}

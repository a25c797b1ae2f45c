package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func entriesFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// mixed has one entry of each fate, for the server of populated.
const mixed = `entries:
- spiffe_id: spiffe://example.org/web         # e-1: lifetime, names and hint differ
  parent_id: spiffe://example.org/assay/agent/join_token/01
  selectors: [unix:uid:1000, unix:path:/usr/bin/web]
  x509_svid_ttl: 15m
  dns_names: [web.example.org, www.example.org]
  expires_at: 2126-01-01T00:00:00Z
- spiffe_id: spiffe://example.org/job         # e-3, as it is
  parent_id: spiffe://example.org/assay/agent/join_token/02
  selectors: [unix:uid:71]
  expires_at: 2026-01-01T00:00:00Z
- id: e-22                                    # another identity
  spiffe_id: spiffe://example.org/database
  parent_id: spiffe://example.org/assay/agent/join_token/02
  selectors: [unix:uid:70]
  hint: "evil\x1b[2J\nline"
- spiffe_id: spiffe://example.org/new
  parent_id: spiffe://example.org/assay/agent/join_token/01
  selectors: [unix:uid:5]
- spiffe_id: spiffe://example.org/assay/server
  parent_id: spiffe://example.org/assay/agent/join_token/01
  selectors: [unix:uid:6]
`

func TestApplyPrintsWhatItDoes(t *testing.T) {
	f := populated(newPKI(t))
	f.pageSize = 2
	vars := map[string]string{serverSocketEnv: f.start(t)}
	path := entriesFile(t, "entries.yaml", mixed)
	for _, form := range []string{"text", "json"} {
		got := assay(t, vars, "entry", "apply", "-f", path, "--dry-run", "-o", form)
		if got.code != 0 || got.stderr != "" || len(f.created)+len(f.updates) > 0 {
			t.Errorf("exit %d, %q; sent %v %v", got.code, got.stderr, f.created, f.updates)
		}
		golden(t, "entry_apply_dry."+form, got.stdout)
	}
	for _, form := range []string{"text", "json"} {
		got := assay(t, vars, "entry", "apply", "-f", path, "-o", form)
		if got.code != 69 { // the first failure is that of e-22, which the fake does not find
			t.Errorf("exit %d, %q", got.code, got.stderr)
		}
		golden(t, "entry_apply."+form, got.stdout+got.stderr)
	}
	want := []*spireentry.BatchUpdateEntryRequest{
		{
			Entries: []*types.Entry{{
				Id: "e-22", SpiffeId: id("/database"), ParentId: id("/assay/agent/join_token/02"),
				Selectors: selectors("unix", "uid:70"), Hint: "evil\x1b[2J\nline",
			}},
			InputMask: &types.EntryMask{SpiffeId: true}, OutputMask: &types.EntryMask{},
		},
		{
			Entries: []*types.Entry{{
				Id: "e-1", SpiffeId: id("/web"), ParentId: id("/assay/agent/join_token/01"),
				Selectors:   selectors("unix", "path:/usr/bin/web", "unix", "uid:1000"),
				X509SvidTtl: 900, DnsNames: []string{"web.example.org", "www.example.org"}, ExpiresAt: farAway.Unix(),
			}},
			InputMask: &types.EntryMask{X509SvidTtl: true, DnsNames: true, Hint: true}, OutputMask: &types.EntryMask{},
		},
	}
	for _, w := range want {
		found := false
		for _, u := range f.updates {
			found = found || proto.Equal(u, w)
		}
		if !found {
			t.Errorf("%v was not sent", w)
		}
	}
	if len(f.updates) != 4 || len(f.created) != 4 { // two of each in each run
		t.Errorf("sent %v and %v", f.updates, f.created)
	}
}

// What a list prints can be applied, and changes nothing.
func TestApplyOfAListChangesNothing(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	listed := assay(t, vars, "entry", "list", "-o", "json").stdout
	got := assayIn(t, env{stdin: strings.NewReader(listed), getenv: func(name string) string { return vars[name] }}, "entry", "apply", "-f", "-")
	if got.code != 0 || got.stdout != "3 entries: 0 created, 0 updated, 3 unchanged\n" || got.stderr != "" {
		t.Errorf("exit %d, %q, %q", got.code, got.stdout, got.stderr)
	}
	if len(f.created)+len(f.updates) > 0 {
		t.Errorf("sent %v %v", f.created, f.updates)
	}
}

func TestApplyOfABadFileSendsNothing(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	for name, tc := range map[string]struct {
		text, reason string
		code         int
	}{
		"broken":      {mixed + "  selektor: x\n", "file_malformed", 65},
		"names twice": {mixed + strings.TrimPrefix(mixed, "entries:\n"), "usage", 64},
	} {
		got := assay(t, vars, "entry", "apply", "-f", entriesFile(t, "entries.yaml", tc.text))
		if got.code != tc.code || !strings.HasPrefix(got.stderr, "error: "+tc.reason+": ") || got.stdout != "" || len(f.created)+len(f.updates) > 0 {
			t.Errorf("%s: exit %d, %q, %q; sent %v %v", name, got.code, got.stdout, got.stderr, f.created, f.updates)
		}
	}
}

// An entry that is stored under the key of another entry of the file, which
// names it by its id, is not that other one.
func TestAnIDComesBeforeIDsAndSelectors(t *testing.T) {
	stored := []*types.Entry{
		{Id: "a", SpiffeId: id("/1"), ParentId: id("/n"), Selectors: selectors("u", "1")},
		{Id: "b", SpiffeId: id("/2"), ParentId: id("/n"), Selectors: selectors("u", "2")},
	}
	plan, err := parseEntryFile("a.yaml", []byte(`entries:
- {spiffe_id: "spiffe://example.org/1", parent_id: "spiffe://example.org/n", selectors: ["u:1"]}
- {id: a, spiffe_id: "spiffe://example.org/3", parent_id: "spiffe://example.org/n", selectors: ["u:1"]}
- {id: unknown, spiffe_id: "spiffe://example.org/2", parent_id: "spiffe://example.org/n", selectors: ["u:2"]}
`))
	if err != nil {
		t.Fatal(err)
	}
	compareWith(stored, plan)
	for i, want := range []struct{ action, id, fields string }{{"create", "", ""}, {"update", "a", "spiffe_id"}, {"none", "b", ""}} {
		if p := &plan[i]; p.action() != want.action || p.want.GetId() != want.id || p.fields() != want.fields {
			t.Errorf("%d: %s %s %s", i, p.action(), p.want.GetId(), p.fields())
		}
	}
}

// many is a file of n entries that are not there.
func many(n int) string {
	var text strings.Builder
	text.WriteString(`{"entries": [`)
	for i := range n {
		if i > 0 {
			text.WriteByte(',')
		}
		fmt.Fprintf(&text, `{"spiffe_id": "spiffe://example.org/w/%d", "parent_id": %q, "selectors": ["unix:uid:%d"]}`, i, nodeID, i)
	}
	text.WriteString(`]}`)
	return text.String()
}

func TestApplyOfManyTellsHowFarItIs(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	path := entriesFile(t, "entries.json", many(3*applyBatch))
	for _, tty := range []bool{false, true} {
		got := assayIn(t, env{stdin: bytes.NewReader(nil), getenv: func(name string) string { return vars[name] }, isTTY: tty}, "entry", "apply", "-f", path)
		if got.code != 0 || !strings.HasSuffix(got.stdout, "\n1500 entries: 1500 created, 0 updated, 0 unchanged\n") {
			t.Errorf("exit %d, %q", got.code, got.stderr)
		}
		want := "500 of 1500 entries\n1000 of 1500 entries\n1500 of 1500 entries\n"
		if tty {
			want = "\r" + strings.ReplaceAll(want, "\n", "\x1b[K\r") + "\x1b[K"
		}
		if got.stderr != want {
			t.Errorf("%q, want %q", got.stderr, want)
		}
	}
	if len(f.created) != 6*applyBatch {
		t.Errorf("%d entries were sent", len(f.created))
	}
}

// A server that refuses a whole request refuses each of its entries.
func TestApplyAgainstAServerThatFails(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	path := entriesFile(t, "entries.json", many(2))
	f.writeErr = fault.New(fault.Exhausted, "store_full", "no space left")
	got := assay(t, vars, "entry", "apply", "-f", path, "-o", "json")
	var doc applied
	if err := json.Unmarshal([]byte(got.stdout), &doc); err != nil {
		t.Fatal(err)
	}
	if got.code != 73 || doc.Failed != 2 || doc.Created != 0 || doc.Results[1].Error.Reason != "store_full" || doc.Results[1].ID != "" {
		t.Errorf("exit %d, %q, %+v", got.code, got.stderr, doc)
	}
	f.err = fault.New(fault.NotReady, "server_stopping", "the server stops")
	if got := assay(t, vars, "entry", "apply", "-f", path); got.code != 69 || got.stdout != "" || !strings.HasPrefix(got.stderr, "error: server_stopping: ") {
		t.Errorf("exit %d, %q, %q", got.code, got.stdout, got.stderr)
	}
}

func TestApplyWarnsOfWhatNobodyCanHave(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	got := assay(t, vars, "entry", "apply", "-f", entriesFile(t, "e.yaml", `entries:
- {spiffe_id: "spiffe://example.org/1", parent_id: "spiffe://example.org/n", selectors: ["unix:uid:web"]}
- {spiffe_id: "spiffe://example.org/2", parent_id: "spiffe://example.org/m", selectors: ["unix:uid:db"]}
- {spiffe_id: "spiffe://example.org/3", parent_id: "`+nodeID+`", selectors: ["unix:uid:3"]}
`))
	want := `warning: selector_unknown: "unix:uid:web" matches no process: unix:uid takes a plain number, as in unix:uid:1000
warning: parent_unknown: spiffe://example.org/n is not an agent on record, nor an alias, nor are 1 other parents: nobody gets their identities until those agents join; see assay agent list
`
	if got.code != 0 || got.stderr != want {
		t.Errorf("exit %d, %q", got.code, got.stderr)
	}
}

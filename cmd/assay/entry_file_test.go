package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const fullYAML = `# who gets what
entries:
- id: e-1
  spiffe_id: spiffe://example.org/web
  parent_id: spiffe://example.org/assay/agent/join_token/01
  selectors:
  - unix:uid:1000
  - unix:path:/usr/bin/web
  - unix:uid:1000
  x509_svid_ttl: 30m
  dns_names: [web.example.org, "www.example.org"]
  hint: internal
  store_svid: true
  expires_at: 2126-01-01T00:00:00Z
  created_at: 2026-09-21T14:13:20Z
  revision: 2
- {spiffe_id: "spiffe://example.org/db", parent_id: "spiffe://example.org/n", selectors: ["a:b:c"], expires_at: never}
`

const fullJSON = `{"entries": [
 {"id": "e-1", "spiffe_id": "spiffe://example.org/web", "parent_id": "spiffe:\/\/example.org/assay/agent/join_token/01",
  "selectors": ["unix:uid:1000", "unix:path:/usr/bin/w\u0065b"], "x509_svid_ttl_seconds": 1800,
  "dns_names": ["web.example.org", "www.example.org"], "hint": "internal", "store_svid": true,
  "expires_at": "2126-01-01T00:00:00Z", "created_at": null, "revision": 7},
 {"spiffe_id": "spiffe://example.org/db", "parent_id": "spiffe://example.org/n", "selectors": ["a:b:c"],
  "x509_svid_ttl": "0s", "expires_at": null, "dns_names": []}
]}
`

func TestAFileOfEntriesIsYAMLOrJSON(t *testing.T) {
	want := []*types.Entry{
		{
			Id: "e-1", SpiffeId: id("/web"), ParentId: id("/assay/agent/join_token/01"),
			Selectors: selectors("unix", "path:/usr/bin/web", "unix", "uid:1000"), X509SvidTtl: 1800,
			DnsNames: []string{"web.example.org", "www.example.org"}, Hint: "internal", StoreSvid: true, ExpiresAt: farAway.Unix(),
		},
		{SpiffeId: id("/db"), ParentId: id("/n"), Selectors: selectors("a", "b:c")},
	}
	for called, text := range map[string]string{
		"a.yaml": fullYAML, "a.yml": fullYAML, "standard input": fullYAML,
		"a.json": fullJSON, "entries": "\n\t " + fullJSON, "A.JSON": fullJSON,
	} {
		got, err := parseEntryFile(called, []byte(text))
		if err != nil {
			t.Errorf("%s: %v", called, err)
			continue
		}
		if !slices.EqualFunc(got, want, func(p planned, e *types.Entry) bool { return proto.Equal(p.want, e) }) {
			t.Errorf("%s: %v", called, got)
		}
	}
}

// Both readers know the same keys.
func TestKeysOfAFileOfEntries(t *testing.T) {
	var tags []string
	for i := range reflect.TypeFor[fileEntry]().NumField() {
		tags = append(tags, reflect.TypeFor[fileEntry]().Field(i).Tag.Get("yaml"))
	}
	if !slices.Equal(tags, entryKeys()) {
		t.Errorf("YAML has %q, JSON %q", tags, entryKeys())
	}
	for i := range reflect.TypeFor[entryShape]().NumField() {
		if key, _, _ := strings.Cut(reflect.TypeFor[entryShape]().Field(i).Tag.Get("json"), ","); !slices.Contains(tags, key) {
			t.Errorf("a list has %s, which a file can't have", key)
		}
	}
}

func TestABadFileOfEntriesIsRefusedWithItsPlace(t *testing.T) {
	const ids = `"spiffe_id": "spiffe://example.org/a", "parent_id": "spiffe://example.org/n"`
	entry := func(more string) string { return `{"entries": [{` + ids + `, "selectors": ["a:b"]` + more + `}]}` }
	const good = "entries:\n- spiffe_id: spiffe://example.org/a\n  parent_id: spiffe://example.org/n\n  selectors: [a:b]\n"
	for name, tc := range map[string]struct{ called, text, want string }{
		"unknown key":        {"a.json", entry(",\n \"spifeid\": 1"), `a.json: line 2: entries[0]: unknown key "spifeid"; known are id, `},
		"key in other case":  {"a.json", entry(`, "Hint": "x"`), `unknown key "Hint"`},
		"key twice":          {"a.json", entry(`, "selectors": []`), `entries[0]: key "selectors" is given twice`},
		"null and key":       {"a.json", entry(`, "hint": null, "hint": "x"`), `key "hint" is given twice`},
		"list twice":         {"a.json", `{"entries": [], "entries": []}`, `a.json: line 1: key "entries" is given twice`},
		"unknown at the top": {"a.json", `{"entries": [], "next": ""}`, `unknown key "next"; known are entries`},
		"not a list":         {"a.json", `{"entries": {}}`, `a.json: line 1: must be a list`},
		"no object":          {"a.json", `[]`, `must be an object`},
		"empty":              {"a.json", "", `must be an object`},
		"nothing in it":      {"a.json", `{}`, `a.json: has no list "entries"`},
		"null":               {"a.json", `{"entries": null}`, `has no list "entries"`},
		"second document":    {"a.json", `{"entries": []} {}`, `something follows the document`},
		"comma":              {"a.json", `{"entries": [{` + ids + `} {}]}`, `a comma or ']' is missing`},
		"last comma":         {"a.json", `{"entries": [],}`, `must be text in double quotes`},
		"cut off":            {"a.json", `{"entries": [{"id": "x`, `entries[0].id: a text does not end`},
		"cut off in escape":  {"a.json", `{"entries": [{"id": "x\`, `a text does not end`},
		"type":               {"a.json", entry(`, "revision": "1"`), `entries[0].revision: must be a whole number`},
		"fraction":           {"a.json", entry(`, "x509_svid_ttl_seconds": 1.5`), `x509_svid_ttl_seconds: must be a whole number`},
		"zero in front":      {"a.json", entry(`, "x509_svid_ttl_seconds": 010`), `x509_svid_ttl_seconds: must be a whole number`},
		"too large":          {"a.json", entry(`, "x509_svid_ttl_seconds": 2147483648`), `x509_svid_ttl_seconds: must be a whole number`},
		"truth":              {"a.json", entry(`, "store_svid": "yes"`), `store_svid: must be true or false`},
		"duration":           {"a.json", entry(`, "x509_svid_ttl": "1 hour"`), `x509_svid_ttl: must be a duration`},
		"not UTF-8":          {"a.json", entry(", \"hint\": \"\xff\""), `hint: is not UTF-8`},
		"control character":  {"a.json", entry(", \"hint\": \"a\nb\""), `hint: has a control character`},
		"wrong escape":       {"a.json", entry(`, "hint": "\x"`), `hint: has a wrong escape`},
		"admin":              {"a.json", entry(`, "admin": true`), `unknown key "admin"`},

		"YAML unknown key":   {"a.yaml", good + "  spifeid: 1\n", `a.yaml: line 5: unknown key "entries[0].spifeid"; known are id, `},
		"YAML key twice":     {"a.yaml", good + "  selectors: []\n", `line 5: key "entries[0].selectors" is given twice, first in line 4`},
		"YAML list twice":    {"a.yaml", good + "entries: []\n", `key "entries" is given twice`},
		"YAML empty":         {"a.yaml", "", `has no list "entries"`},
		"YAML comment":       {"a.yaml", "# nothing\n", `has no list "entries"`},
		"YAML no list":       {"a.yaml", "entries:\n", `has no list "entries"`},
		"YAML type":          {"a.yaml", "entries: 1\n", `entries: must be a list`},
		"YAML documents":     {"a.yaml", good + "---\n" + good, `a second document begins`},
		"YAML anchor":        {"a.yaml", "entries: &a []\n", `anchors, aliases and merges are not taken`},
		"YAML broken":        {"a.yaml", "entries: [\n", `a.yaml: line 1: `},
		"YAML not UTF-8":     {"a.yaml", good + "  hint: \"\xff\"\n", `a.yaml is not UTF-8`},
		"YAML empty element": {"a.yaml", "entries:\n-\n", `entries[0]: is empty`},
		"neither":            {"standard input", "<html>", `standard input: line 1: must be a mapping`},

		"no id":             {"a.json", `{"entries": [{"selectors": ["a:b"]}]}`, `a.json: entries[0]: spiffe_id is missing`},
		"no parent":         {"a.json", `{"entries": [{"spiffe_id": "spiffe://example.org/a"}]}`, `parent_id is missing`},
		"bad id":            {"a.json", `{"entries": [{"spiffe_id": "spiffe://example.org/a/../b"}]}`, `spiffe_id: the path has a segment . or ..`},
		"id of no workload": {"a.json", `{"entries": [{"spiffe_id": "spiffe://example.org"}]}`, `spiffe_id: has no path`},
		"no selectors":      {"a.json", `{"entries": [{` + ids + `}]}`, `selectors are missing`},
		"bad selector":      {"a.json", `{"entries": [{` + ids + `, "selectors": ["a:b", "c"]}]}`, `selectors[1]: `},
		"two lifetimes":     {"a.json", entry(`, "x509_svid_ttl": "1h", "x509_svid_ttl_seconds": 3600`), `keep one`},
		"split second":      {"a.json", entry(`, "x509_svid_ttl": "1500ms"`), `x509_svid_ttl must be whole seconds`},
		"negative":          {"a.json", entry(`, "x509_svid_ttl_seconds": -1`), `x509_svid_ttl_seconds can't be negative`},
		"moving end":        {"a.json", entry(`, "expires_at": "720h"`), `expires_at must be a time as 2026-12-31T00:00:00Z, or never`},
		"end too early":     {"a.json", entry(`, "expires_at": "1969-12-31T00:00:00Z"`), `expires_at must be a whole second after 1970`},
		"end too fine":      {"a.json", entry(`, "expires_at": "2126-01-01T00:00:00.5Z"`), `expires_at must be a whole second`},
	} {
		plan, err := parseEntryFile(tc.called, []byte(tc.text))
		if !errors.Is(err, fault.Invalid) || fault.ReasonOf(err) != "file_malformed" || !strings.Contains(fault.SafeText(err), tc.want) {
			t.Errorf("%s: %v, %v; want %q", name, plan, err, tc.want)
		}
	}
}

func TestAFileNamesAnEntryOnce(t *testing.T) {
	const one = `"spiffe_id": "spiffe://example.org/a", "parent_id": "spiffe://example.org/n", "selectors": ["a:b", "c:d"]`
	const other = `"spiffe_id": "spiffe://example.org/b", "parent_id": "spiffe://example.org/n", "selectors": ["a:b"]`
	for text, want := range map[string]string{
		`{` + one + `}, {` + other + `}, {` + strings.Replace(one, `"a:b", "c:d"`, `"c:d", "a:b", "a:b"`, 1) + `}`: "entries[2] has the SPIFFE ID, parent and selectors of entries[0]",
		`{"id": "x", ` + one + `}, {"id": "x", ` + other + `}`:                                                     "entries[1] has the id of entries[0]",
	} {
		_, err := parseEntryFile("a.json", []byte(`{"entries": [`+text+`]}`))
		if fault.ReasonOf(err) != "usage" || !strings.Contains(fault.SafeText(err), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestReadingAFile(t *testing.T) {
	dir := t.TempDir()
	for args, want := range map[string]string{
		"":                            "error: usage: -f is needed",
		filepath.Join(dir, "nothing"): "error: file_missing: ",
		dir:                           "error: ",
	} {
		got := assay(t, map[string]string{serverSocketEnv: "/nowhere.sock"}, "entry", "apply", "-f", args)
		if got.code == 0 || !strings.HasPrefix(got.stderr, want) {
			t.Errorf("%q: exit %d, %q", args, got.code, got.stderr)
		}
	}
}

// Whatever is accepted is JSON or YAML that says just that: written as
// `entry list` would and read again, it is the same.
func FuzzEntryFile(f *testing.F) {
	for _, name := range []string{"a.json", "a.yaml"} {
		for _, text := range []string{fullJSON, fullYAML, "", "{}", `{"entries": []}`, "entries: []", `{"entries": [{"hint": "\ud800"}]}`} {
			f.Add(name, []byte(text))
		}
	}
	listed, err := os.ReadFile(filepath.Join("testdata", "entry_list.json"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add("", listed)
	f.Fuzz(func(t *testing.T, called string, data []byte) {
		plan, err := parseEntryFile(called, data)
		if err != nil {
			if text := fault.SafeText(err); fault.KindOf(err) != fault.Invalid || text == "" {
				t.Fatalf("%v", err)
			}
			return
		}
		if isJSON(called, data) && !json.Valid(data) {
			t.Fatalf("took what is no JSON: %q", data)
		}
		doc := entryList{Entries: make([]entryShape, len(plan))}
		for i, p := range plan {
			doc.Entries[i] = entryFromProto(p.want)
		}
		text, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseEntryFile("again.json", text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		for i := range plan {
			if !proto.Equal(plan[i].want, again[i].want) || plan[i].key != again[i].key {
				t.Fatalf("%v became %v", plan[i].want, again[i].want)
			}
		}
	})
}

//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// applied is what `assay entry apply -o json` prints.
type applied struct {
	DryRun    bool `json:"dry_run"`
	Created   int
	Updated   int
	Unchanged int
	Failed    int
	Results   []struct {
		ID      string
		Action  string
		Changes []struct{ Field string }
		Error   *struct{ Reason string }
	}
}

func (a applied) counts() [4]int { return [4]int{a.Created, a.Updated, a.Unchanged, a.Failed} }

// A file of entries is applied, again, changed, by the real binaries, and its
// identities reach a workload.
func TestEntriesOfAFile(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	file := func(name, format string, args ...any) string { return s.Write(name, fmt.Sprintf(format, args...)) }
	apply := func(want [4]int, args ...string) applied {
		t.Helper()
		var doc applied
		s.CLIJSON(&doc, append([]string{"entry", "apply"}, args...)...)
		if doc.counts() != want {
			t.Fatalf("%q: created, updated, unchanged, failed %v, want %v", args, doc.counts(), want)
		}
		return doc
	}
	const form = `entries:
- spiffe_id: spiffe://example.org/one
  parent_id: %[1]s
  selectors: [unix:uid:%[2]d]
  hint: %[3]s
- spiffe_id: spiffe://example.org/two
  parent_id: %[1]s
  selectors: [unix:uid:%[2]d]
  x509_svid_ttl: 30m
`
	first := file("entries.yaml", form, a.ID, os.Getuid(), "first")

	apply([4]int{2, 0, 0, 0}, "-f", first, "--dry-run")
	if got := strings.TrimSpace(s.CLI("entry", "count")); got != "0" {
		t.Fatalf("a dry run made %s entries", got)
	}
	made := apply([4]int{2, 0, 0, 0}, "-f", first)
	apply([4]int{0, 0, 2, 0}, "-f", first)
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", a.Endpoint())
	fetched := func(want ...string) {
		t.Helper()
		wantIdentities(t, a, filepath.Join(s.Bins, "assay"), want...)
	}
	fetched("/one", "/two")

	// A change, named by the entry's id; the rest stays.
	changed := file("changed.json", `{"entries": [{"id": %q, "spiffe_id": "spiffe://example.org/three", "parent_id": %q,
		"selectors": ["unix:uid:%d"], "hint": "first"}]}`, made.Results[0].ID, a.ID, os.Getuid())
	doc := apply([4]int{0, 1, 0, 0}, "-f", changed)
	if got := doc.Results[0].Changes; len(got) != 1 || got[0].Field != "spiffe_id" {
		t.Errorf("changed %v", got)
	}
	fetched("/three", "/two")
	if out := s.CLI("entry", "apply", "-f", first, "--dry-run"); !strings.HasPrefix(out, "+ spiffe://example.org/one for "+a.ID+" with unix:uid:") ||
		!strings.HasSuffix(out, "\n2 entries: 1 to create, 0 to update, 1 unchanged\n") {
		t.Errorf("the difference is printed as %q", out)
	}

	// What a list prints is a file that changes nothing.
	listed := s.CLI("entry", "list", "-o", "json")
	cmd := exec.CommandContext(t.Context(), filepath.Join(s.Bins, "assay"), "entry", "apply", "-f", "-", "-o", "json", "--socket", s.AdminSocket())
	cmd.Stdin = strings.NewReader(listed)
	out, err := cmd.Output()
	var again applied
	if err == nil {
		err = json.Unmarshal(out, &again)
	}
	if err != nil || again.counts() != [4]int{0, 0, 2, 0} {
		t.Errorf("%v, %s", err, out)
	}

	// A mistake anywhere in a file keeps all of it out.
	for name, tc := range map[string]struct {
		more, reason string
		code         int
	}{
		"unknown key": {"  selektors: []\n", "file_malformed", 65},
		"named twice": {fmt.Sprintf("- {spiffe_id: 'spiffe://example.org/one', parent_id: '%s', selectors: ['unix:uid:%d']}\n", a.ID, os.Getuid()), "usage", 64},
	} {
		bad := file("bad.yaml", form+"%[4]s", a.ID, os.Getuid(), "second", tc.more)
		stdout, stderr, code := s.Try("assay", "entry", "apply", "-f", bad)
		if code != tc.code || stdout != "" || !strings.HasPrefix(stderr, "error: "+tc.reason+": "+bad+": ") {
			t.Errorf("%s: exit %d, %q, %q", name, code, stdout, stderr)
		}
	}
	if got := s.CLI("entry", "list", "-o", "json"); got != listed {
		t.Errorf("a refused file changed something: %s, was %s", got, listed)
	}

	// One that the server refuses does not keep the others out.
	mixed := file("mixed.yaml", form+"- {spiffe_id: 'spiffe://example.org/assay/server', parent_id: '%[1]s', selectors: ['unix:uid:1']}\n", a.ID, os.Getuid(), "other")
	stdout, stderr, code := s.Try("assay", "entry", "apply", "-f", mixed, "-o", "json")
	var partly applied
	if err := json.Unmarshal([]byte(stdout), &partly); err != nil {
		t.Fatal(err)
	}
	if code != 65 || partly.counts() != [4]int{1, 0, 1, 1} || partly.Results[2].Error.Reason != "spiffe_id_invalid" || !strings.Contains(stderr, `"spiffe_id_invalid"`) {
		t.Errorf("exit %d, %s, %s", code, stdout, stderr)
	}
	fetched("/one", "/three", "/two")
}

package main

import (
	"strings"
	"testing"
)

const nodeID = "spiffe://example.org/assay/agent/join_token/01"

func createArgs(parent string, selectors ...string) []string {
	args := []string{"entry", "create", "--spiffe-id", "spiffe://example.org/new", "--parent-id", parent}
	for _, s := range selectors {
		args = append(args, "--selector", s)
	}
	return args
}

// An entry that nobody can match is made, since a newer agent may know its
// selector, but not in silence.
func TestCreateWarnsOfSelectorsThatNobodyHas(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	for sel, known := range map[string]bool{
		"unix:uid:0": true, "unix:uid:4294967295": true, "unix:gid:1000": true, "unix:supplementary_gid:27": true,
		"unix:user:web": true, "unix:group:web": true, "unix:supplementary_group:sudo": true, "unix:user:a:b": true,
		"k8s:ns:shop": true, "k8s:pod-label:app:web": true, "k8s:container-image-digest:sha256:00": true, "k8s:host:true": true,
		"k8s:container-id:00": false, "k8s:namespace:shop": false, "k8s:ns": false, "k8s:sa:": false,
		"docker:label:a": true, // of another type: not ours to judge
		"unix:uid:web":   false, "unix:uid:-1": false, "unix:uid:007": false, "unix:uid:+7": false, "unix:uid:4294967296": false,
		"unix:gid:staff": false, "unix:supplementary_gid:x": false, "unix:uid": false, "unix:user:": false, "unix:user": false,
		"unix:path:/usr/bin/web": true, "unix:sha256:" + strings.Repeat("0f", 32): true,
		"unix:path:web": false, "unix:UID:7": false, "unix:sha256:00": false, "unix:1000": false,
	} {
		got := assay(t, vars, createArgs(nodeID, "unix:uid:5", sel)...)
		if got.code != 0 || !strings.HasPrefix(got.stdout, "id ") {
			t.Errorf("%s: exit %d, %q%q", sel, got.code, got.stdout, got.stderr)
		}
		if warned := strings.HasPrefix(got.stderr, "warning: selector_unknown: \""+sel+"\" matches no process: "); warned == known || known && got.stderr != "" {
			t.Errorf("%s: %q", sel, got.stderr)
		}
	}
}

func TestCreateWarnsOfAParentThatIsNotOnRecord(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	const stranger = "spiffe://example.org/assay/agent/join_token/99"
	got := assay(t, vars, createArgs(stranger, "unix:uid:5")...)
	if got.code != 0 || !strings.HasPrefix(got.stderr, "warning: parent_unknown: "+stranger+" is not an agent on record") || strings.Count(got.stderr, "\n") != 1 {
		t.Errorf("exit %d, %q", got.code, got.stderr)
	}
	// What was refused is told by its error alone.
	args := createArgs(stranger, "unix:nonsense")
	args[3] = "spiffe://example.org/twice"
	if got := assay(t, vars, args...); got.code != 75 || strings.Contains(got.stderr, "warning: ") {
		t.Errorf("exit %d, %q", got.code, got.stderr)
	}
}

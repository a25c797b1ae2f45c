// Package test holds what is true of the project as a whole.
package test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/seed-caa81108/assay/"

// rooms is the package table: what each room may import from this module. An
// edge that is not here is a wall; docs/architecture.md has the drawing.
var rooms = map[string][]string{
	"cmd/assay":        {"server", "agent", "proto/admin/v1", "pkg/daemon", "pkg/durable", "pkg/fault", "pkg/name", "pkg/rpc", "pkg/schedule", "pkg/selector"},
	"cmd/assay-server": {"server", "pkg/daemon", "pkg/fault"},
	"cmd/assay-agent":  {"agent", "pkg/daemon", "pkg/fault"},

	"server": {
		"server/api", "server/attest", "server/audit", "server/backup", "server/ca", "server/istioca", "server/keys", "server/kube", "server/limit", "server/registry", "server/rotation", "server/store",
		"proto/agent/v1", "proto/admin/v1", "pkg/durable", "pkg/fault", "pkg/name", "pkg/rpc", "pkg/schedule",
	},
	"server/api": {
		"server/attest", "server/audit", "server/backup", "server/ca", "server/kube", "server/limit", "server/registry", "server/rotation",
		"proto/agent/v1", "proto/admin/v1", "pkg/failpoint", "pkg/fault", "pkg/name", "pkg/rpc", "pkg/selector",
	},
	"server/rotation": {"server/audit", "server/ca", "server/registry", "pkg/failpoint", "pkg/fault", "pkg/schedule"},
	"server/attest":   {"server/kube", "proto/agent/v1", "pkg/fault", "pkg/name", "pkg/selector"},
	"server/registry": {"server/store", "proto/agent/v1", "pkg/failpoint", "pkg/fault", "pkg/name", "pkg/schedule", "pkg/selector"},
	"server/ca":       {"server/audit", "server/keys", "server/store", "pkg/failpoint", "pkg/fault", "pkg/name", "pkg/schedule"},
	"server/kube":     {"pkg/fault", "pkg/schedule", "pkg/selector"},
	"server/limit":    {},
	"server/istioca":  {"server/audit", "server/ca", "server/kube", "server/limit", "pkg/durable", "pkg/fault", "pkg/name", "pkg/rpc", "pkg/schedule"},
	"server/keys":     {"pkg/durable", "pkg/failpoint", "pkg/fault"},
	"server/audit":    {"pkg/durable", "pkg/failpoint", "pkg/fault"},
	"server/store":    {"pkg/durable", "pkg/fault"},
	"server/backup":   {"server/store", "pkg/fault"},

	"server/store/storetest": {"server/store", "pkg/fault"},

	"agent": {
		"agent/attest", "agent/cache", "agent/endpoint", "agent/node", "agent/state",
		"proto/agent/v1", "pkg/durable", "pkg/fault", "pkg/rpc", "pkg/schedule", "pkg/selector",
	},
	"agent/attest":   {"agent/cgroup", "pkg/fault", "pkg/rpc", "pkg/selector"},
	"agent/cache":    {"agent/state", "proto/agent/v1", "pkg/durable", "pkg/fault", "pkg/name", "pkg/rpc", "pkg/schedule", "pkg/selector"},
	"agent/cgroup":   {"pkg/fault"},
	"agent/endpoint": {"agent/attest", "agent/cache", "pkg/fault", "pkg/rpc", "pkg/schedule", "pkg/selector"},
	"agent/node":     {"agent/state", "proto/agent/v1", "pkg/durable", "pkg/fault", "pkg/rpc", "pkg/schedule"},
	"agent/state":    {"proto/agent/v1", "pkg/durable", "pkg/fault"},

	"proto/agent/v1": {},
	"proto/admin/v1": {},

	"pkg/daemon":    {"pkg/durable", "pkg/fault"},
	"pkg/durable":   {"pkg/fault"},
	"pkg/failpoint": {},
	"pkg/fault":     {},
	"pkg/name":      {"pkg/fault"},
	"pkg/rpc":       {"pkg/fault", "pkg/name"},
	"pkg/schedule":  {},
	"pkg/selector":  {"pkg/fault"},

	"test/bench": {"*"},
}

// agentNever is what a process that is privileged on every node must not link.
var agentNever = []string{"go.etcd.io/", "k8s.io/", "istio.io/", "github.com/spiffe/spire-api-sdk", module + "server"}

// elsewhere is who alone may import modules that bring much, or that are wire
// types of one service; tests of any room may.
var elsewhere = map[string]string{"github.com/envoyproxy/go-control-plane": "agent/endpoint"}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Imports,Deps"}, args...)...)
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

func TestEveryImportIsInThePackageTable(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range list(t, "./...") {
		room := strings.TrimPrefix(p.ImportPath, module)
		allowed, known := rooms[room]
		if seen[room] = true; !known {
			if !strings.HasPrefix(room, "test") {
				t.Errorf("%s is no room of the package table", room)
			}
			continue
		}
		for _, imp := range p.Imports {
			for prefix, home := range elsewhere {
				if strings.HasPrefix(imp, prefix) && room != home {
					t.Errorf("%s imports %s, which is for %s alone", room, imp, home)
				}
			}
			target, ours := strings.CutPrefix(imp, module)
			if ours && !slices.Contains(allowed, target) && !slices.Contains(allowed, "*") {
				t.Errorf("%s imports %s, which the package table does not allow", room, target)
			}
		}
	}
	for room := range rooms {
		if !seen[room] {
			t.Errorf("the package table has %s, which does not exist", room)
		}
	}
}

func TestTheAgentLinksNoServerParts(t *testing.T) {
	for _, dep := range list(t, "./cmd/assay-agent")[0].Deps {
		for _, never := range agentNever {
			if strings.HasPrefix(dep, never) {
				t.Errorf("assay-agent links %s", dep)
			}
		}
	}
}

package cgroup

import (
	"path"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// relative is a path as the kernel shows it from inside a cgroup namespace.
func relative(root, target string) string {
	r, t := split(root), split(target)
	same := 0
	for same < len(r) && same < len(t) && r[same] == t[same] {
		same++
	}
	seen := strings.Repeat("/..", len(r)-same)
	for _, name := range t[same:] {
		seen += "/" + name
	}
	if seen == "" {
		return "/"
	}
	return seen
}

func split(p string) []string { return strings.FieldsFunc(p, func(r rune) bool { return r == '/' }) }

// NEG-40: from inside a cgroup namespace of its own the agent tells the same as
// from the host's, of every process, and refuses what climbs above the host's
// root.
func TestAViewPutsBackTheNamesAbove(t *testing.T) {
	const (
		uid   = "7d1f9b3c-2a64-4e0f-9c55-0b8a4e6d21f0"
		other = "aaaaaaaa-2a64-4e0f-9c55-0b8a4e6d21f0"
	)
	own, container := strings.Repeat("0a", 32), strings.Repeat("1b", 32)
	root := "/kubepods/besteffort/pod" + uid + "/" + own
	v, err := newView(root, "1:pids:/\n0::/\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{
		"/", "/init.scope", "/system.slice/sshd.service", root, root + "/nested", root + "/kubepods/besteffort/pod" + other + "/" + container,
		"/kubepods/besteffort/pod" + uid + "/" + container, "/kubepods/besteffort/pod" + other + "/" + container,
		"/kubepods/burstable/pod" + other + "/" + container, "/kubepods/pod" + other + "/" + container,
		"/kubepods/pod" + other + "/" + container + "/kubepods/pod" + uid + "/" + own, "/kubepods/besteffort/pod" + uid,
		"/..hidden", "/kubepods/..pod",
	} {
		seen := relative(root, target)
		if got := v.absolute(seen); got != target {
			t.Errorf("%s, seen as %s, is taken for %s", target, seen, got)
		}
		want, wantErr := View{}.Find("0::"+target+"\n", "/")
		got, err := v.Find("0::"+seen+"\n", "/")
		if got != want || fault.ReasonOf(err) != fault.ReasonOf(wantErr) && (err != nil || wantErr != nil) {
			t.Errorf("%s: %v %v, want %v %v", target, got, err, want, wantErr)
		}
	}
	for _, seen := range []string{"/../../../../..", "/../../../../../kubepods/pod" + other + "/" + container, "/../x/../y"} {
		if got, err := v.Find("0::"+seen+"\n", "/"); err == nil {
			t.Errorf("%s is taken for %v", seen, got)
		}
	}
	// A line of version 1 is the host's in any case.
	if _, err := v.Find("3:memory:/../../pod"+other+"/"+container+"\n", "/"); fault.ReasonOf(err) != "cgroup_namespace" {
		t.Error(err)
	}
}

// NEG-40: a pod that is not below the root is known for one by the names that the
// view puts back, too.
func TestPodsElsewhereAreKnownForPods(t *testing.T) {
	const uid = "7d1f9b3c-2a64-4e0f-9c55-0b8a4e6d21f0"
	own, container := strings.Repeat("0a", 32), strings.Repeat("1b", 32)
	v, err := newView("/kubelet/kubepods/besteffort/pod"+uid+"/"+own, "0::/\n")
	if err != nil {
		t.Fatal(err)
	}
	for content, want := range map[string]bool{
		"0::/../../pod" + uid + "/" + container + "\n":                true,
		"0::/../" + container + "\n":                                  true,
		"0::/../../../burstable/pod" + uid + "/" + container + "\n":   true,
		"0::/../../../../../system.slice/sshd.service\n":              false,
		"1:name=systemd:/kubepods/x\n0::/../../../../../init.scope\n": true,
		"0::/../../../../../kubepods\n":                               true,
		"nonsense":                                                    true,
	} {
		if owner, err := v.Find(content, "/"); err == nil && owner != (Owner{}) {
			t.Errorf("%s is of %v", content, owner)
		}
		if got := v.Elsewhere(content); got != want {
			t.Errorf("%s: %v", content, got)
		}
	}
	if (View{}).Elsewhere("0::/init.scope\n") || !(View{}).Elsewhere("0::/kubelet/kubepods/pod"+uid+"\n") {
		t.Error("the host's view is another")
	}
}

func TestAViewIsToldByWhereTheAgentIs(t *testing.T) {
	for name, tc := range map[string]struct {
		here, content string
		own           string
		ok            bool
	}{
		"in a namespace of its own": {"/a/b", "0::/\n", "/a/b", true},
		"below its root":            {"/a/b/c", "0::/c\n", "/a/b", true},
		"in the host's":             {"/a/b", "1:name=systemd:/a\n0::/a/b\n", "/", true},
		"in the host's root":        {"/", "0::/\n", "/", true},
		"somewhere else":            {"/a/b", "0::/c\n", "", false},
		"moved out of it":           {"/a", "0::/../x\n", "", false},
		"version 1 alone":           {"/a", "1:pids:/a\n", "", false},
	} {
		v, err := newView(tc.here, tc.content)
		if (err == nil) != tc.ok || tc.ok && path.Join("/", strings.Join(v.own, "/")) != tc.own || err != nil && fault.ReasonOf(err) != "config_invalid" {
			t.Errorf("%s: %v, %v", name, v, err)
		}
	}
	if _, err := OpenView("/nowhere"); fault.ReasonOf(err) != "config_invalid" {
		t.Error(err)
	}
	if v, err := OpenView(t.TempDir()); err != nil || len(v.own) != 0 {
		t.Errorf("no cgroups of version 2: %v, %v", v, err)
	}
}

// Whatever the namespace and the process, what the kernel shows is put together
// again.
func FuzzView(f *testing.F) {
	f.Add("/a/b/c", "/a/x/y")
	f.Add("/a", "/")
	f.Add("/", "/a")
	f.Fuzz(func(t *testing.T, root, target string) {
		root, target = path.Join("/", root), path.Join("/", target)
		v, err := newView(root, "0::/\n")
		if strings.ContainsAny(root+target, "\n\x00") {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := v.absolute(relative(root, target)); got != target {
			t.Errorf("%s, seen from %s, is taken for %s", target, root, got)
		}
	})
}

package cgroup

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// entry is one of testdata/corpus.txt.
type entry struct {
	name, root, content string
	want                Owner
	reason              string // of the refusal
}

func corpus(t testing.TB) []entry {
	t.Helper()
	data, err := os.ReadFile("testdata/corpus.txt")
	if err != nil {
		t.Fatal(err)
	}
	var entries []entry
	origins := map[string]bool{"live": true, "published": true, "rules": true, "spoof": true}
	for block := range strings.SplitSeq(string(data), "\n\n") {
		lines := strings.Split(strings.TrimSuffix(block, "\n"), "\n")
		name, found := strings.CutPrefix(lines[0], "== ")
		if !found {
			if !strings.HasPrefix(lines[0], "#") {
				t.Fatalf("no entry and no comment: %q", block)
			}
			continue
		}
		e, lines := entry{name: name, root: "/"}, lines[1:]
		if from, ok := strings.CutPrefix(lines[0], "from: "); !ok || !origins[from] {
			t.Fatalf("%s: where is it from?", e.name)
		}
		lines = lines[1:]
		if root, ok := strings.CutPrefix(lines[0], "root: "); ok {
			e.root, lines = root, lines[1:]
		}
		switch want := strings.Fields(lines[0]); {
		case len(want) == 4 && want[1] == "owner":
			e.want = Owner{want[2], want[3]}
		case len(want) == 3 && want[1] == "refused":
			e.reason = want[2]
		case len(want) != 2 || want[1] != "none":
			t.Fatalf("%s: what is expected? %q", e.name, lines[0])
		}
		for _, line := range lines[1:] {
			e.content += line + "\n"
		}
		entries = append(entries, e)
	}
	if len(entries) < 100 {
		t.Fatalf("only %d entries were read", len(entries))
	}
	return entries
}

// Pod and container come out of what each runtime and driver writes, and of
// nothing that is only made to look like it (NEG-40).
func TestCorpus(t *testing.T) {
	for _, e := range corpus(t) {
		t.Run(e.name, func(t *testing.T) {
			if err := CheckRoot(e.root); err != nil {
				t.Fatal(err)
			}
			got, err := View{}.Find(e.content, e.root)
			if got != e.want {
				t.Errorf("owner %+v, want %+v (%v)", got, e.want, err)
			}
			refused(t, err, e.reason)
		})
	}
}

// refused checks the reason, and that the text, which goes into logs, shows no
// name that a process may have given itself.
func refused(t *testing.T, err error, reason string) {
	t.Helper()
	if err == nil && reason == "" {
		return
	}
	if fault.ReasonOf(err) != reason || !errors.Is(err, fault.Denied) {
		t.Fatalf("%v, want %q", err, reason)
	}
	for _, part := range []string{"c0ffee00", "7d1f9b3c", "0::", "burstable"} {
		if strings.Contains(err.Error(), part) {
			t.Errorf("%v shows the path", err)
		}
	}
}

const container = "/kubepods/pod7d1f9b3c-2a64-4e0f-9c55-0b8a4e6d21f0/3f9c1e7a5d2b48060c1d7e9fa4b3528817d60e4c9b2af35810e7c6d94b8a1f23"

// What can't be written into the corpus.
func TestContentThatNoKernelWrites(t *testing.T) {
	many := func(lines int) string {
		var b strings.Builder
		for i := range lines {
			b.WriteString(strconv.Itoa(i+1) + ":name=h" + strconv.Itoa(i) + ":/\n")
		}
		return b.String()
	}
	for name, c := range map[string]struct{ content, reason string }{
		"most lines":               {many(maxLines-1) + "0::/\n", ""},
		"too many lines":           {many(maxLines) + "0::/\n", "cgroup_malformed"},
		"long path":                {"0::/" + strings.Repeat("a/", maxContent/2-3) + "a\n", ""},
		"too long":                 {"0::/" + strings.Repeat("a/", maxContent/2-2) + "a\n", "cgroup_malformed"},
		"NUL in a name":            {"0::" + container + "/a\x00b\n", "cgroup_malformed"},
		"NUL behind the container": {"0::" + container + "\x00\n", "cgroup_malformed"},
		"last line cut off":        {"1:cpu:/\n0::" + container, "cgroup_malformed"},
		"an empty line":            {"0::/\n\n", "cgroup_malformed"},
		"nothing but a line feed":  {"\n", "cgroup_malformed"},
		"carriage return":          {"0::" + container + "\r\n", "cgroup_unknown"},
		"space behind":             {"0::" + container + " \n", "cgroup_unknown"},
		"bytes that are no text":   {"0::/kubepods/pod\xff\xfe/x\n", "cgroup_unknown"},
		"digits that look alike":   {"0::" + strings.Replace(container, "3f9c", "３9c", 1) + "\n", "cgroup_unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := View{}.Find(c.content, "/")
			if got != (Owner{}) {
				t.Errorf("owner %+v", got)
			}
			refused(t, err, c.reason)
		})
	}
}

// A pod counts only if a hierarchy says so that is every container's; in any other a
// service may have made the name for itself (NEG-40).
func TestHierarchiesThatVouch(t *testing.T) {
	for hierarchy, vouches := range map[string]bool{
		"0:": true, "1:name=systemd": true, "1:memory": true, "1:pids": true, "1:cpu": true, "1:cpu,cpuacct": true, "1:cpuacct,cpu": true,
		"1:name=app": false, "1:cpuacct": false, "1:cpuset": false, "1:freezer": false, "1:net_cls,net_prio": false,
		"1:name=memory": false, "1:name=app.memory": false,
	} {
		got, err := View{}.Find(hierarchy+":"+container+"\n2:devices:/\n", "/")
		if (got != Owner{}) != vouches {
			t.Errorf("%s: owner %+v, %v", hierarchy, got, err)
		}
		if !vouches {
			refused(t, err, "cgroup_conflict")
		}
	}
}

func TestCheckRoot(t *testing.T) {
	for _, root := range []string{"/", "/kubelet", "/kubelet.slice", "/docker/" + strings.Repeat("a", 64), "/..a", "/kubepods/burstable/pod1/c/kubelet"} {
		if err := CheckRoot(root); err != nil {
			t.Errorf("%q: %v", root, err)
		}
	}
	for _, root := range []string{
		"", "kubelet", "/kubelet/", "//", "/a//b", "/..", "/../kubelet", "/a/..", "/a/./b", "/a\n0::/b", "/a\x00", "./a",
		"/kubepods", "/kubelet/kubepods", "/kubepods.slice", "/kubelet.slice/kubelet-kubepods.slice",
	} {
		if err := CheckRoot(root); fault.ReasonOf(err) != "config_invalid" || !errors.Is(err, fault.Precondition) {
			t.Errorf("%q: %v", root, err)
		}
	}
}

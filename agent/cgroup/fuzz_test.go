package cgroup

import (
	"strings"
	"testing"
)

// possible says whether a cgroup below another can have this path, relative to
// it: the file system has no such names as the others are.
func possible(below string) bool {
	if strings.ContainsAny(below, "\x00\n") {
		return false
	}
	for name := range strings.SplitSeq(below, "/") {
		if name == "" || name == "." || name == ".." {
			return false
		}
	}
	return true
}

// FuzzFind: whatever a workload makes below its container's cgroup, in any or all
// hierarchies, the owner stays the same (NEG-40); and whatever the content is, an
// answer is an owner in the right form, no owner, or a refusal.
func FuzzFind(f *testing.F) {
	suffixes := []string{
		"container", "x (deleted)", "..", "a/../b", "\n0::/", "\xff", "kubepods-pod" + strings.Repeat("a", 32) + ".slice:cri-containerd:" + strings.Repeat("b", 64),
		strings.TrimPrefix(container, "/"),
		"kubepods.slice/kubepods-pod" + strings.Repeat("a", 32) + ".slice/cri-containerd-" + strings.Repeat("b", 64) + ".scope",
	}
	for i, e := range corpus(f) {
		f.Add(e.content, e.root, suffixes[i%len(suffixes)], uint64(1)<<(i%10))
		f.Add(e.content, e.root, suffixes[(i+1)%len(suffixes)], ^uint64(0))
	}
	f.Fuzz(func(t *testing.T, content, root, below string, where uint64) {
		if CheckRoot(root) != nil {
			return
		}
		owner, err := View{}.Find(content, root)
		if owner == (Owner{}) {
			return
		}
		if err != nil {
			t.Fatalf("%+v beside %v", owner, err)
		}
		if n := len(owner.PodUID); n != 32 && n != 36 || !hex(owner.ContainerID, 64) {
			t.Fatalf("%+v in another form", owner)
		}
		changed := deeper(t, content, root, below, where)
		again, err := View{}.Find(changed, root)
		switch {
		case again != owner && again != Owner{}:
			t.Fatalf("%+v became %+v with\n%s", owner, again, changed)
		case possible(below) && len(changed) <= maxContent && again != owner:
			t.Fatalf("%+v is lost: %v, with\n%s", owner, err, changed)
		}
	})
}

// deeper moves a process into a cgroup below its container's, in those
// hierarchies that name a container and whose bit is set.
func deeper(t *testing.T, content, root, below string, where uint64) string {
	t.Helper()
	memberships, err := View{}.parse(content)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	i := 0
	for line := range strings.Lines(content) {
		line = strings.TrimSuffix(line, "\n")
		if owner, _ := ownerOf(memberships[i].path, root); owner != (Owner{}) && where>>(i%64)&1 == 1 {
			line += "/" + below
		}
		b.WriteString(line + "\n")
		i++
	}
	return b.String()
}

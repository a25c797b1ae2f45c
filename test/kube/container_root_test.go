//go:build kube && root

package kube

import (
	"crypto/rand"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/seed-caa81108/assay/test/harness"
)

// images builds the images of this source's programs, and returns the directory.
func images(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("../../out/tools/image", "-tag", "test", "-o", dir, bins).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: run make test-kube, which builds it\n%s", err, out)
	}
	return dir
}

const (
	serverImage = "docker.io/library/assay-server:test"
	agentImage  = "docker.io/library/assay-agent:test"
)

// container is a name as a runtime gives.
func containerID() string {
	id := make([]byte, 32)
	_, _ = rand.Read(id)
	return hex.EncodeToString(id)
}

// Where the kubelet and containerd put a container, by the kubelet's driver.
func cgroupfsDriver(pod *corev1.Pod, class string) string {
	return filepath.Join("/kubepods", class, "pod"+string(pod.UID), containerID())
}

func systemdDriver(pod *corev1.Pod, class string) string {
	top, above := "kubepods", "/kubepods.slice"
	if class != "" {
		top += "-" + class
		above += "/" + top + ".slice"
	}
	return above + "/" + top + "-pod" + strings.ReplaceAll(string(pod.UID), "-", "_") + ".slice/cri-containerd-" + containerID() + ".scope"
}

// fetch is a container that fetches its SVIDs. Its user is the image's: not root.
func fetch(a *harness.Agent, cgroup string) Container {
	return Container{
		Image:  serverImage,
		Cgroup: cgroup,
		Flags:  []string{"--read-only", "--mount", "type=bind,src=" + filepath.Dir(a.Socket()) + ",dst=/run/assay/public,options=rbind:ro"},
		Args:   []string{"/assay", "svid", "fetch", "--timeout", "10s"},
	}
}

// Containers of containerd and runc, where a kubelet would have them put, get the
// identities of their pods and of no other, on each way to mount cgroups. The API
// server, containerd, runc, server and agent are real. No kubelet is: the test
// binds pods to nodes, says that they run, and names their cgroups. The trees v1
// and hybrid are the kernel's; in v2 containerd and runc find version 2 alone and
// go by that, while the kernel goes on listing the hierarchies of version 1, with
// no pod in them. Lines of a kernel without those are in the corpus of
// agent/cgroup.
func TestContainersHaveTheirPodsIdentities(t *testing.T) {
	dir := images(t)
	forge := filepath.Join(dir, "forge")
	build := exec.Command("go", "build", "-o", forge, "./forge")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, tr := range []tree{treeV1, treeHybrid, treeV2} {
		t.Run(string(tr), func(t *testing.T) { testContainers(t, tr, dir, forge) })
	}
}

func testContainers(t *testing.T, tr tree, images, forge string) {
	s, r := cluster.NewSpace(t), NewRuntime(t, tr)
	r.Import(filepath.Join(images, "assay-server.tar"))
	r.Import(filepath.Join(images, "assay-agent.tar"))
	node, other := s.Node("a"), s.Node("b")
	s.Account("web")
	s.Account("db")
	site := s.site(t, "")
	a := s.agent(t, site, node, r.Root)
	web := s.Run(Pod{Name: "web-1", Node: node.Name, Account: "web"})
	db := s.Run(Pod{Name: "db-1", Node: node.Name, Account: "db"})
	elsewhere := s.Run(Pod{Name: "web-2", Node: other.Name, Account: "web"})
	id := func(account string) string { return "spiffe://example.org/ns/" + s.Namespace + "/sa/" + account }

	gets := func(what string, c Container, want string) {
		t.Helper()
		out, code := r.Run(c).Wait()
		if code != 0 || !strings.Contains(out, want+"\n") || strings.Count(out, "spiffe://example.org/ns/") != 1 {
			t.Errorf("%s: exit %d, want %s, got %s", what, code, want, out)
		}
	}
	gets("cgroupfs, burstable", fetch(a, cgroupfsDriver(web, "burstable")), id("web"))
	gets("cgroupfs, guaranteed", fetch(a, cgroupfsDriver(db, "")), id("db"))
	gets("systemd, besteffort", fetch(a, systemdDriver(web, "besteffort")), id("web"))
	gets("systemd, guaranteed", fetch(a, systemdDriver(db, "")), id("db"))

	// Whoever may make cgroups below its own can name them as it likes (NEG-40).
	for driver, path := range map[string]func(*corev1.Pod, string) string{"cgroupfs": cgroupfsDriver, "systemd": systemdDriver} {
		own, victim := path(web, "burstable"), path(db, "burstable")
		c := fetch(a, own)
		c.Image = agentImage // as root
		c.Flags = append(c.Flags, "--mount", "type=bind,src="+forge+",dst=/forge,options=rbind:ro",
			"--mount", "type=bind,src="+cgroupfs+",dst=/sys/fs/cgroup,options=rbind:rw")
		var dirs []string
		for _, hierarchy := range tr.hierarchiesWithPods() {
			dirs = append(dirs, filepath.Join(cgroupfs, hierarchy, r.Root, own, victim))
		}
		c.Args = append(append([]string{"/forge"}, dirs...), append([]string{"--"}, c.Args...)...)
		gets("forged below its own, "+driver, c, id("web"))
	}

	getsNothing := func(what string, c Container, reason string) {
		t.Helper()
		out, code := r.Run(c).Wait()
		if code == 0 || strings.Contains(out, "spiffe://") || !strings.Contains(out, reason) {
			t.Errorf("%s: exit %d, want %s, got %s", what, code, reason, out)
		}
	}
	getsNothing("in no pod", fetch(a, "/system/"+containerID()), "no_identity")
	getsNothing("a pod's name in another place", fetch(a, "/system"+cgroupfsDriver(db, "burstable")), "cgroup_unknown")
	// It could be bound to this node yet, and is waited for.
	getsNothing("a pod of another node", fetch(a, cgroupfsDriver(elsewhere, "burstable")), "error: ")
	if log := a.Log(); !strings.Contains(log, "pod_unknown") {
		t.Errorf("the agent does not say why a pod of another node gets nothing: %s", log)
	}

	c := fetch(a, cgroupfsDriver(web, ""))
	c.Args = []string{"/assay", "svid", "watch"}
	watch := r.Run(c)
	watch.Await("id=" + id("web") + " ")
	tr.expect(t, watch.Cgroups(), r.Root+c.Cgroup)
	s.Delete(web)
	watch.Await("no_identity")
}

// hierarchiesWithPods are some of those that name the pod.
func (tr tree) hierarchiesWithPods() []string {
	switch tr {
	case treeV1:
		return []string{"memory", "pids", "systemd"}
	case treeHybrid:
		return []string{"memory", "pids", "systemd", "unified"}
	}
	return []string{""}
}

// expect checks that the test is about the tree that it says.
func (tr tree) expect(t *testing.T, cgroups, path string) {
	t.Helper()
	for line := range strings.Lines(cgroups) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		v2 := fields[1] == ""
		if named := fields[2] == path; named != (v2 && tr != treeV1 || !v2 && tr != treeV2) {
			t.Errorf("in the tree %s a container is not expected to have the line %s", tr, line)
		}
	}
	if !strings.Contains(cgroups, "0::") {
		t.Errorf("a kernel without cgroups of version 2:\n%s", cgroups)
	}
}

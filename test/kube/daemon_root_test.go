//go:build kube && root

package kube

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/test/harness"
)

// The agent serves containers from one of its own, out of its image, in the
// namespaces that a pod of the host's PID namespace has. In version 2 of cgroups
// runtimes give a container a cgroup namespace, unless it is privileged: from
// there the agent tells pods by the host's cgroups, if they are mounted, and says
// so if it can't.
func TestAgentInAContainer(t *testing.T) {
	dir := images(t)
	own := []string{"--with-ns", "cgroup:"}
	for name, c := range map[string]struct {
		tree    tree
		flags   []string
		mounted bool // the host's cgroups
		works   bool
	}{
		"v1":                                {treeV1, nil, false, true},
		"v1, mounted":                       {treeV1, nil, true, true},
		"hybrid":                            {treeHybrid, nil, false, true},
		"v2":                                {treeV2, nil, false, true},
		"v2, mounted":                       {treeV2, nil, true, true},
		"v2, a cgroup namespace of its own": {treeV2, own, false, false},
		"v2, that and mounted":              {treeV2, own, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			s, r := cluster.NewSpace(t), NewRuntime(t, c.tree)
			r.Import(filepath.Join(dir, "assay-server.tar"))
			r.Import(filepath.Join(dir, "assay-agent.tar"))
			node := s.Node("a")
			s.Account("web")
			site := s.site(t, "")
			a, pod := s.newAgent(t, site, node, r.Root)
			flags := slices.Clone(c.flags)
			if c.mounted {
				a.More += "    host_cgroups: /host/sys/fs/cgroup\n"
				flags = append(flags, "--mount", "type=bind,src=/sys/fs/cgroup,dst=/host/sys/fs/cgroup,options=rbind:ro")
			}
			for _, dropped := range defaultCapabilities {
				flags = append(flags, "--cap-drop", dropped)
			}
			a.More += "  require_host_pid: true\n"
			config := a.Configure(harness.Token{})
			running := r.Run(Container{
				Image:  agentImage,
				Cgroup: cgroupfsDriver(pod, "besteffort"),
				Flags: append(flags, "--read-only", "--cap-add", "CAP_SYS_PTRACE",
					"--with-ns", hostNamespace("pid"), "--with-ns", hostNamespace("net"),
					"--mount", fmt.Sprintf("type=bind,src=%s,dst=%[1]s,options=rbind:rw", filepath.Dir(config))),
				Args: []string{"/assay-agent", "run", "--config", config},
			})
			a.Process = running.Process
			a.WaitReady(a.Ops)

			web := s.Run(Pod{Name: "web-1", Node: node.Name, Account: "web"})
			out, code := r.Run(fetch(a, cgroupfsDriver(web, "burstable"))).Wait()
			switch want := "spiffe://example.org/ns/" + s.Namespace + "/sa/web\n"; {
			case c.works && (code != 0 || !strings.Contains(out, want)):
				t.Errorf("exit %d, want %s, got %s", code, want, out)
			case !c.works && code == 0:
				t.Errorf("it works: %s", out)
			case !c.works:
				running.Await("cgroup_namespace")
			}
			if out, code := r.Run(fetch(a, "/system/"+containerID())).Wait(); code != 77 {
				t.Errorf("in no pod: exit %d, %s", code, out)
			}
		})
	}
}

// defaultCapabilities are those that a container has unless somebody says
// otherwise. The chart takes them from the agent.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_BIND_SERVICE",
	"CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// hostNamespace is the test's own, for ctr's --with-ns.
func hostNamespace(kind string) string {
	name := map[string]string{"net": "network"}[kind]
	if name == "" {
		name = kind
	}
	return fmt.Sprintf("%s:/proc/%d/ns/%s", name, os.Getpid(), kind)
}

// The server runs from its image as its user, who is not root, with what it
// writes mounted, and the tool is there by its name.
func TestServerInAContainer(t *testing.T) {
	r := NewRuntime(t, treeHybrid)
	r.Import(filepath.Join(images(t), "assay-server.tar"))
	var ports harness.Ports
	metrics := ports.Free(t)
	mounts := []string{"--read-only", "--with-ns", hostNamespace("net")}
	for path, mode := range map[string]os.FileMode{"/etc/assay-server": 0o700, "/var/lib/assay-server": 0o700, "/run/assay-server": 0o750} {
		dir := r.file(strings.ReplaceAll(path[1:], "/", "-"))
		if err := errors.Join(os.Mkdir(dir, mode), os.Chown(dir, 65532, 65532)); err != nil {
			t.Fatal(err)
		}
		mounts = append(mounts, "--mount", "type=bind,src="+dir+",dst="+path+",options=rbind:rw")
	}
	run := func(args ...string) *Running {
		return r.Run(Container{Image: serverImage, Cgroup: "/server", Flags: mounts, Args: args})
	}
	if out, code := run("/assay-server", "seal-key", "/etc/assay-server/seal.key").Wait(); code != 0 {
		t.Fatalf("exit %d, %s", code, out)
	}
	config := r.file("etc-assay-server/server.yaml")
	if err := errors.Join(os.WriteFile(config, fmt.Appendf(nil, `trust_domain: example.org
bootstrap: %s
seal_key_file: /etc/assay-server/seal.key
listen: 127.0.0.1:%d
metrics:
  listen: 127.0.0.1:%d
`, time.Now().UTC().Format(time.DateOnly), ports.Free(t), metrics), 0o600), os.Chown(config, 65532, 65532)); err != nil {
		t.Fatal(err)
	}
	server := run("/assay-server", "run", "--config", "/etc/assay-server/server.yaml")
	server.WaitReady(metrics)
	status, err := os.ReadFile("/proc/" + server.PID() + "/status")
	if err != nil || !strings.Contains(string(status), "\nUid:\t65532\t65532\t65532\t65532\n") {
		t.Errorf("it runs as somebody else (%v)\n%s", err, status)
	}
	out, err := r.ctr("tasks", "exec", "--exec-id", "status", server.ID, "assay", "status").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "example.org") {
		t.Errorf("assay status: %v, %s", err, out)
	}
	if err := r.ctr("tasks", "kill", "--signal", "SIGTERM", server.ID).Run(); err != nil {
		t.Error(err)
	}
	if out, code := server.Wait(); code != 0 {
		t.Errorf("it ended with %d, %s", code, out)
	}
	var stat syscall.Stat_t
	if err := syscall.Stat(r.file("var-lib-assay-server/store.db"), &stat); err != nil || stat.Uid != 65532 {
		t.Errorf("the store is of user %d, %v", stat.Uid, err)
	}
}

//go:build kube && root

package kube

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/seed-caa81108/assay/test/harness"
)

// agent starts the agent of a node, with the token of its pod there.
func (s *Space) agent(t testing.TB, site *harness.Site, node *corev1.Node, cgroupRoot string) *harness.Agent {
	t.Helper()
	a, _ := s.newAgent(t, site, node, cgroupRoot)
	return a.Start(harness.Token{})
}

// newAgent is an agent that can be started, and its pod.
func (s *Space) newAgent(t testing.TB, site *harness.Site, node *corev1.Node, cgroupRoot string) (*harness.Agent, *corev1.Pod) {
	t.Helper()
	pod := s.Run(Pod{Name: "agent-" + node.Name, Node: node.Name, Account: "assay-agent"})
	a := site.NewAgent("agent-" + node.Name)
	a.Cluster, a.TokenFile = "test", site.Write(node.Name+".token", s.Token("assay-agent", audience, pod))
	a.More = "attestation:\n  k8s:\n    cgroup_root: " + cgroupRoot + "\n"
	a.ID = "spiffe://example.org/assay/agent/k8s_psat/test/" + string(node.UID)
	return a, pod
}

// A pod has its identity by namespace and ServiceAccount without an entry, with
// its cluster in the certificate, for as long as it is there. The API server is
// real; the agent's and the workload's pods are bound to nodes without a kubelet,
// and their processes are in cgroups as a kubelet names them.
func TestAPodHasItsIdentity(t *testing.T) {
	s, cg := cluster.NewSpace(t), newCgroups(t)
	node, other := s.Node("a"), s.Node("b")
	s.Account("web")
	site := s.site(t, "")
	a := s.agent(t, site, node, cg.root)

	pod := s.Run(Pod{Name: "web-1", Node: node.Name, Account: "web"})
	elsewhere := s.Run(Pod{Name: "web-2", Node: other.Name, Account: "web"})
	w := cg.start(pod, a.Endpoint())
	want := fmt.Sprintf("svid spiffe://example.org/ns/%s/sa/web ", s.Namespace)
	if line := w.await("svid"); !strings.HasPrefix(line, want) || !strings.Contains(line, " ou=test") {
		t.Errorf("got %q, want %q", line, want)
	}
	// An entry that agrees comes after the identity, one that doesn't is refused.
	id := "spiffe://example.org/ns/" + s.Namespace + "/sa/web"
	_, stderr, code := site.Try("assay", "entry", "create", "--parent-id", a.ID, "--spiffe-id", id, "--selector", "k8s:ns:"+s.Namespace)
	if code != 65 || !strings.Contains(stderr, "entry_in_template_range") {
		t.Errorf("an entry that squats: exit %d, %s", code, stderr)
	}
	site.CLI("entry", "create", "--parent-id", a.ID, "--spiffe-id", "spiffe://example.org/extra", "--selector", "k8s:sa:web", "--selector", "k8s:ns:"+s.Namespace)
	w.await("svid " + id)
	w.await("svid spiffe://example.org/extra ")

	// A pod that is not on this node, and a process that is in none.
	cg.start(elsewhere, a.Endpoint()).await("denied Unavailable")
	cg.start(nil, a.Endpoint()).await("denied PermissionDenied")

	// The end of the pod is the end of its streams.
	s.Delete(pod)
	w.await("denied PermissionDenied")
	if log := a.Log(); strings.Contains(log, readFile(t, a.TokenFile)) { // NEG-18
		t.Error("the agent's log has its token")
	}
}

// While the API server gives no answer, pods keep what they have, also over a
// restart of the agent, and no new agent joins; then all goes on.
func TestIdentitiesOutlastTheAPIServer(t *testing.T) {
	s, cg := cluster.NewSpace(t), newCgroups(t)
	node, late := s.Node("a"), s.Node("late")
	s.Account("web")
	site := s.site(t, "")
	a := s.agent(t, site, node, cg.root)
	pod := s.Run(Pod{Name: "web-1", Node: node.Name, Account: "web"})
	cg.start(pod, a.Endpoint()).await("svid")
	latePod := s.Run(Pod{Name: "agent-late", Node: late.Name, Account: "assay-agent"})
	token := s.Token("assay-agent", audience, latePod)

	s.Stop()
	a.Restart(15)
	cg.start(pod, a.Endpoint()).await("svid")
	b := site.NewAgent("late")
	b.Cluster, b.TokenFile = "test", site.Write("late.token", token)
	b.Launch(harness.Token{})
	b.Eventually(time.Minute, "the agent hears why it can't join", func() error {
		if !strings.Contains(b.Log(), "kubernetes_unavailable") {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	usable := func(want float64) {
		t.Helper()
		site.Server.Eventually(3*time.Minute, "the metric to say whether pods are known", func() error {
			if got := harness.Metric(t, site.Ops, `assay_kubernetes_pod_index_usable{cluster="test"}`); got != want {
				return fmt.Errorf("it says %v", got)
			}
			return nil
		})
	}
	usable(0)
	s.Restart(t)
	usable(1)
	b.WaitReady(b.Ops)
	next := s.Run(Pod{Name: "web-3", Node: node.Name, Account: "web"})
	cg.start(next, a.Endpoint()).await("svid")
}

//go:build kube && root

package kube

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Entries may go by labels, owner and container of a pod: a change reaches the
// open stream. The test says what a kubelet would of the container.
func TestEntriesGoByLabelsAndContainers(t *testing.T) {
	s, cg := cluster.NewSpace(t), newCgroups(t)
	node := s.Node("a")
	s.Account("web")
	site := s.site(t, "")
	a := s.agent(t, site, node, cg.root)
	entry := func(name string, selectors ...string) {
		args := []string{"entry", "create", "--parent-id", a.ID, "--spiffe-id", "spiffe://example.org/" + name}
		for _, one := range selectors {
			args = append(args, "--selector", one)
		}
		site.CLI(args...)
	}
	entry("labelled", "k8s:ns:"+s.Namespace, "k8s:pod-label:color:blue", "k8s:pod-owner:ReplicaSet:web")
	entry("image", "k8s:ns:"+s.Namespace, "k8s:container-name:main", "k8s:container-image-digest:sha256:aa")
	entry("other", "k8s:ns:"+s.Namespace, "k8s:container-image-digest:sha256:bb")

	owner := metav1.OwnerReference{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "f00d"}
	pod := s.Run(Pod{Name: "web-1", Node: node.Name, Account: "web", Labels: map[string]string{"color": "blue"}, Owner: &owner})
	w := cg.start(pod, a.Endpoint())
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{
		Name: "main", Image: "registry.example/main:1", ImageID: "registry.example/main@sha256:aa", ContainerID: "containerd://" + containerOf,
	}}
	if _, err := s.Core.Pods(s.Namespace).UpdateStatus(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	own := "all /ns/" + s.Namespace + "/sa/web"
	w.await(own + " /labelled /image")

	patch := func(color string) {
		body := `{"metadata":{"labels":{"color":"` + color + `"}}}`
		if _, err := s.Core.Pods(s.Namespace).Patch(t.Context(), pod.Name, types.MergePatchType, []byte(body), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	patch("green")
	w.await(own + " /image")
	patch("blue")
	w.await(own + " /labelled /image")
	if strings.Contains(a.Log(), "spiffe://example.org/other ") {
		t.Error("an SVID was made for another image")
	}
}

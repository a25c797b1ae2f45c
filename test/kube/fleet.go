//go:build kube

package kube

import (
	"context"
	"path/filepath"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/test/harness"
)

// fleetLabel is what kwok knows its nodes by; its value is their space.
const fleetLabel = "assay-test-fleet"

// Fleet makes nodes whose kubelets kwok plays until the test ends: they are
// ready, a pod that is bound to one runs without further words, and is gone
// after it was deleted. It returns their names.
func (s *Space) Fleet(nodes int) []string {
	s.t.Helper()
	kwok, err := filepath.EvalSymlinks(filepath.Join(s.bins, "kwok"))
	if err != nil {
		s.t.Fatalf("%v: run make test-kube, which builds it", err)
	}
	mine := map[string]string{fleetLabel: s.Namespace}
	s.cleanup("fleet", func(ctx context.Context) error {
		return s.Core.Nodes().DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: fleetLabel + "=" + s.Namespace})
	})
	var names []string
	for i := range nodes {
		name := s.Namespace + "-fleet-" + strconv.Itoa(i)
		if _, err := s.Core.Nodes().Create(s.t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: mine}}, metav1.CreateOptions{}); err != nil {
			s.t.Fatalf("create node %s: %v", name, err)
		}
		names = append(names, name)
	}
	harness.Start(s.t, s.file("kwok.log"), nil, kwok, "--kubeconfig="+s.Kubeconfig(s.AdminToken),
		"--config="+filepath.Join(filepath.Dir(kwok), "stages.yaml"),
		"--manage-nodes-with-label-selector="+fleetLabel+"="+s.Namespace)
	return names
}

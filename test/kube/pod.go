//go:build kube

package kube

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Pod is what a test says of a pod; the rest is as good as any other.
type Pod struct {
	Name, Node, Account string
	Labels              map[string]string
	Owner               *metav1.OwnerReference
}

// Node makes a node; its name begins with the space's.
func (s *Space) Node(name string) *corev1.Node {
	s.t.Helper()
	node, err := s.Core.Nodes().Create(s.t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: s.Namespace + "-" + name}}, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatalf("create node %s: %v", name, err)
	}
	s.cleanup("node", func(ctx context.Context) error {
		return s.Core.Nodes().Delete(ctx, node.Name, metav1.DeleteOptions{})
	})
	return node
}

// Run makes a pod that is bound to its node, and says what the node's kubelet
// would: that it runs.
func (s *Space) Run(p Pod) *corev1.Pod {
	s.t.Helper()
	pod := s.Bind(p)
	pod.Status.Phase = corev1.PodRunning
	pod, err := s.Core.Pods(s.Namespace).UpdateStatus(s.t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		s.t.Fatalf("say that pod %s runs: %v", p.Name, err)
	}
	return pod
}

// Bind makes a pod that is bound to its node and pending until a kubelet, or
// the test, says that it runs.
func (s *Space) Bind(p Pod) *corev1.Pod {
	s.t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: p.Name, Labels: p.Labels},
		Spec: corev1.PodSpec{
			NodeName:           p.Node,
			ServiceAccountName: p.Account,
			Containers:         []corev1.Container{{Name: "main", Image: "registry.example/main:1"}},
		},
	}
	if p.Owner != nil {
		pod.OwnerReferences = []metav1.OwnerReference{*p.Owner}
	}
	pod, err := s.Core.Pods(s.Namespace).Create(s.t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatalf("create pod %s: %v", p.Name, err)
	}
	return pod
}

// Delete removes a pod at once, as its kubelet does when its processes ended.
func (s *Space) Delete(pod *corev1.Pod) {
	s.t.Helper()
	now := int64(0)
	options := metav1.DeleteOptions{GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: &pod.UID}}
	if err := s.Core.Pods(s.Namespace).Delete(s.t.Context(), pod.Name, options); err != nil {
		s.t.Fatalf("delete pod %s: %v", pod.Name, err)
	}
}

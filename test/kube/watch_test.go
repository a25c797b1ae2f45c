//go:build kube

package kube

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	coreclient "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/clientcmd"
)

// clientOf is a client that knows nothing but a kubeconfig.
func clientOf(t *testing.T, kubeconfig string) *coreclient.CoreV1Client {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	client, err := coreclient.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// next is the next event, which has to be of the kind and about the pod.
func next(t *testing.T, events watch.Interface, kind watch.EventType, name string) *corev1.Pod {
	t.Helper()
	event, open := <-events.ResultChan()
	pod, ok := event.Object.(*corev1.Pod)
	if !open || event.Type != kind || !ok || pod.Name != name {
		t.Fatalf("the watch has %s %+v, want %s %s", event.Type, event.Object, kind, name)
	}
	return pod
}

func TestWatchSeesThePodsOfOneNode(t *testing.T) {
	s := cluster.NewSpace(t)
	s.Account("watcher", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list", "watch"}})
	mine, other := s.Node("mine"), s.Node("other")

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	watcher := clientOf(t, s.Kubeconfig(s.Token("watcher", "", nil)))
	events, err := watcher.Pods("").Watch(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + mine.Name})
	if err != nil {
		t.Fatal(err)
	}
	defer events.Stop()

	s.Run(Pod{Name: "elsewhere", Node: other.Name})
	owner := metav1.OwnerReference{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "f00d"}
	pod := s.Run(Pod{Name: "here", Node: mine.Name, Account: "web", Labels: map[string]string{"app": "web"}, Owner: &owner})
	next(t, events, watch.Added, pod.Name)
	running := next(t, events, watch.Modified, pod.Name)
	if running.Status.Phase != corev1.PodRunning || running.Labels["app"] != "web" || running.Spec.ServiceAccountName != "web" ||
		len(running.OwnerReferences) != 1 || running.OwnerReferences[0].Name != "web" {
		t.Errorf("the pod is %+v", running)
	}
	s.Delete(pod)
	if marked := next(t, events, watch.Modified, pod.Name); marked.DeletionTimestamp == nil {
		t.Errorf("the pod is %+v, want one that is being deleted", marked)
	}
	next(t, events, watch.Deleted, pod.Name)
}

func TestAccountsMayDoWhatTheirRulesSay(t *testing.T) {
	s := cluster.NewSpace(t)
	s.Account("nobody")
	s.Account("reader", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}})
	s.Run(Pod{Name: "web-1", Node: s.Node("a").Name})

	nobody := clientOf(t, s.Kubeconfig(s.Token("nobody", "", nil)))
	if _, err := nobody.Pods(s.Namespace).List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("an account without rules: %v, want forbidden", err)
	}
	reader := clientOf(t, s.Kubeconfig(s.Token("reader", "", nil)))
	pods, err := reader.Pods(s.Namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(pods.Items) != 1 {
		t.Errorf("an account that may list: %v, %v", pods, err)
	}
	if err := reader.Pods(s.Namespace).Delete(t.Context(), "web-1", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("an account that may only list deletes: %v, want forbidden", err)
	}
}

func TestRestartKeepsObjectsAndEndsWatches(t *testing.T) {
	s := cluster.NewSpace(t)
	s.Account("watcher", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "watch"}})
	pod := s.Run(Pod{Name: "web-1", Node: s.Node("a").Name})
	watcher := clientOf(t, s.Kubeconfig(s.Token("watcher", "", nil)))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	events, err := watcher.Pods(s.Namespace).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer events.Stop()
	next(t, events, watch.Added, pod.Name)

	s.Stop()
	for event := range events.ResultChan() {
		if event.Type != watch.Error {
			t.Errorf("the watch of a stopped API server has %s", event.Type)
		}
	}
	if ctx.Err() != nil {
		t.Error("the watch outlived its API server")
	}
	if _, err := s.Core.Pods(s.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{}); err == nil {
		t.Error("a stopped API server answers")
	}
	s.Restart(t)

	// The same client with the same token, at the same address.
	again, err := watcher.Pods(s.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
	if err != nil || again.UID != pod.UID || again.Status.Phase != corev1.PodRunning {
		t.Errorf("after the restart: %+v, %v", again, err)
	}
}

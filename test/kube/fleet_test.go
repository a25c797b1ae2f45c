//go:build kube

package kube

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestFleetRunsAndEndsPods(t *testing.T) {
	const nodes, pods = 20, 100
	s := cluster.NewSpace(t)
	fleet := s.Fleet(nodes)
	for i := range pods {
		s.Bind(Pod{Name: fmt.Sprintf("web-%d", i), Node: fleet[i%nodes]})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	wait := func(check func() error) {
		t.Helper()
		if err := poll(ctx, nil, check); err != nil {
			t.Fatal(err)
		}
	}
	running := func(want int) func() error {
		return func() error {
			list, err := s.Core.Pods(s.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "status.phase=Running"})
			if err == nil && len(list.Items) != want {
				err = fmt.Errorf("%d pods run, want %d", len(list.Items), want)
			}
			return err
		}
	}
	wait(running(pods))
	wait(func() error {
		node, err := s.Core.Nodes().Get(ctx, fleet[0], metav1.GetOptions{})
		if err == nil && !slices.ContainsFunc(node.Status.Conditions, ready) {
			err = fmt.Errorf("the node is not ready: %+v", node.Status.Conditions)
		}
		return err
	})

	// With the time to stop that a pod has unless somebody says otherwise.
	if err := s.Core.Pods(s.Namespace).Delete(ctx, "web-0", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	wait(running(pods - 1))
}

func ready(c corev1.NodeCondition) bool {
	return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
}

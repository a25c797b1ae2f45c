//go:build kube && bench

package kube

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/test/harness"
)

// The cluster of make bench, and how many pods it measures.
const (
	benchNodes  = 100
	benchPods   = 5000
	benchProbes = 200
)

// From the binding of a pod to its node until the node's agent has its SVID, in a
// cluster of 5 000 pods on 100 nodes. API server, server and agents are real, all
// on this machine; kwok plays the kubelets.
func TestBenchPodToSVID(t *testing.T) {
	s := cluster.NewSpace(t)
	s.Account("web")
	site := s.site(t, "")
	fleet := s.Fleet(benchNodes)
	parallel := func(n int, do func(i int)) {
		var all sync.WaitGroup
		next := make(chan int)
		for range 8 {
			all.Go(func() {
				for i := range next {
					do(i)
				}
			})
		}
		for i := range n {
			next <- i
		}
		close(next)
		all.Wait()
	}
	agents := make([]*harness.Agent, benchNodes)
	for i, node := range fleet {
		pod := s.Bind(Pod{Name: "agent-" + strconv.Itoa(i), Node: node, Account: "assay-agent"})
		a := site.NewAgent("a" + strconv.Itoa(i))
		a.Cluster, a.TokenFile = "test", site.Write("a"+strconv.Itoa(i)+".psat", s.Token("assay-agent", audience, pod))
		a.Launch(harness.Token{})
		agents[i] = a
	}
	for _, a := range agents {
		a.WaitReady(a.Ops)
	}
	perNode := benchPods / benchNodes // its agent's included
	began := time.Now()
	parallel(benchPods-benchNodes, func(i int) {
		s.Bind(Pod{Name: "web-" + strconv.Itoa(i), Node: fleet[i%benchNodes], Account: "web"})
	})
	bound := time.Since(began)
	svids := func(i int) int { return int(harness.Metric(t, agents[i].Ops, "assay_agent_svids")) }
	await := func(i, want int) {
		agents[i].Eventually(2*time.Minute, "SVIDs", func() error {
			if got := svids(i); got < want {
				return fmt.Errorf("agent %d has %d SVIDs, want %d", i, got, want)
			}
			return nil
		})
	}
	for i := range agents {
		await(i, perNode)
	}
	filled := time.Since(began)

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	var took []time.Duration
	for i := range benchProbes {
		node := i % benchNodes
		want := svids(node) + 1
		pod, err := s.Core.Pods(s.Namespace).Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "probe-" + strconv.Itoa(i)},
			Spec: corev1.PodSpec{
				NodeName: fleet[node], ServiceAccountName: "web", Containers: []corev1.Container{{Name: "main", Image: "registry.example/main:1"}},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		at := time.Now()
		for svids(node) < want {
			if ctx.Err() != nil {
				t.Fatalf("no SVID for %s", pod.Name)
			}
		}
		took = append(took, time.Since(at))
	}
	slices.Sort(took)
	at := func(q float64) time.Duration { return took[int(q*float64(len(took)-1))].Round(100 * time.Microsecond) }
	_, _ = fmt.Fprintf(os.Stderr, `
%d pods on %d nodes, with an agent each
  pod bound -> SVID ready on its node   p50 %v  p99 %v  max %v  (%d pods, one after the other)
  all bound in %v, all SVIDs ready after %v
`, benchPods, benchNodes, at(0.5), at(0.99), at(1), benchProbes, bound.Round(time.Millisecond), filled.Round(time.Millisecond))
}

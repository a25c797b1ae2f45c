package kube

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/seed-caa81108/assay/pkg/selector"
)

// Pod is what of a pod is kept.
type Pod struct {
	// UID is that of cgroup names: the API's, or for a pod of a kubelet's own
	// manifest the hash that the kubelet made.
	UID            string
	Namespace      string
	Name           string
	ServiceAccount string
	Node           string
	Ended          bool      // it succeeded or failed
	DeletedAt      time.Time // when the time that it has to stop is over; zero: it is not deleted
}

// configHash is the annotation of a mirror pod: what the kubelet itself calls
// the static pod behind it.
const configHash = "kubernetes.io/config.hash"

func newPod(p *corev1.Pod) *Pod {
	out := &Pod{
		UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.Spec.ServiceAccountName, Node: p.Spec.NodeName,
		Ended: p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
	}
	if hash, ok := p.Annotations[configHash]; ok {
		out.UID = hash
	}
	if p.DeletionTimestamp != nil {
		out.DeletedAt = p.DeletionTimestamp.Time
	}
	return out
}

// grace is how long a pod counts after the time that it had to stop: its node
// may be slow.
const grace = 30 * time.Second

// lives says whether something may still run in the pod.
func (p *Pod) lives(now time.Time) bool {
	return !p.Ended && (p.DeletedAt.IsZero() || now.Before(p.DeletedAt.Add(grace)))
}

// Selectors are what entries can go by. All of it stays what it is for as long
// as the pod lives.
func (p *Pod) Selectors(cluster string) selector.Set {
	var list []selector.Selector
	for _, fact := range [][2]string{
		{"cluster", cluster},
		{"ns", p.Namespace},
		{"sa", p.ServiceAccount},
		{"pod-name", p.Name},
		{"pod-uid", p.UID},
		{"node-name", p.Node},
	} {
		list = append(list, selector.Selector{Type: "k8s", Value: fact[0] + ":" + fact[1]})
	}
	return selector.NewSet(list...)
}

func samePod(a, b *Pod) bool { return *a == *b }

// byUID sorts pods.
func byUID(pods []*Pod) {
	slices.SortFunc(pods, func(a, b *Pod) int {
		if a.UID < b.UID {
			return -1
		}
		return 1
	})
}

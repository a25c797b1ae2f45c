package kube

import (
	"regexp"
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

// The annotations of a mirror pod: what the kubelet itself calls the static pod
// behind it.
const (
	configHash   = "kubernetes.io/config.hash"
	configMirror = "kubernetes.io/config.mirror"
)

// A hash can't be taken for a UID, which has dashes.
var staticUID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// staticHash is the hash of a mirror pod; empty: it is none. Whoever makes a pod
// may annotate it as he likes, so only what the API server lets no other pod be
// counts: one without a ServiceAccount.
func staticHash(p *corev1.Pod) string {
	hash := p.Annotations[configHash]
	if p.Spec.ServiceAccountName != "" || hash != p.Annotations[configMirror] || !staticUID.MatchString(hash) {
		return ""
	}
	return hash
}

func newPod(p *corev1.Pod) *Pod {
	out := &Pod{
		UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.Spec.ServiceAccountName, Node: p.Spec.NodeName,
		Ended: p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
	}
	if hash := staticHash(p); hash != "" {
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

package kube

import (
	"maps"
	"regexp"
	"slices"
	"strings"
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
	Labels         map[string]string
	Owners         []Owner
	Containers     []Container
}

// Owner is what made a pod, such as a ReplicaSet.
type Owner struct{ Kind, Name, UID string }

// Container is one that runs in a pod, as its kubelet says: that is a moment
// after it has begun.
type Container struct {
	ID      string // as in the names of its cgroups
	Name    string
	Image   string // as it was asked for, or its ID
	ImageID string // with the digest, if the image came from a registry
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
	out.Labels = p.Labels
	for _, o := range p.OwnerReferences {
		out.Owners = append(out.Owners, Owner{o.Kind, o.Name, string(o.UID)})
	}
	for _, list := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for i := range list {
			if c, ok := newContainer(&list[i]); ok {
				out.Containers = append(out.Containers, c)
			}
		}
	}
	return out
}

// newContainer returns what is kept of a container that runs.
func newContainer(s *corev1.ContainerStatus) (Container, bool) {
	_, id, ok := strings.Cut(s.ContainerID, "://") // the runtime's name is before it
	if !ok || id == "" || s.State.Terminated != nil {
		return Container{}, false
	}
	image := s.ImageID
	if _, after, ok := strings.Cut(image, "://"); ok { // cri-dockerd's docker-pullable://
		image = after
	}
	return Container{ID: id, Name: s.Name, Image: s.Image, ImageID: image}, true
}

// grace is how long a pod counts after the time that it had to stop: its node
// may be slow.
const grace = 30 * time.Second

// lives says whether something may still run in the pod.
func (p *Pod) lives(now time.Time) bool {
	return !p.Ended && (p.DeletedAt.IsZero() || now.Before(p.DeletedAt.Add(grace)))
}

// Selectors are what entries can go by, of all processes of the pod. Labels may
// change while it runs, the rest stays.
func (p *Pod) Selectors(cluster string) selector.Set {
	list := []selector.Selector{
		fact("cluster", cluster), fact("ns", p.Namespace), fact("sa", p.ServiceAccount),
		fact("pod-name", p.Name), fact("pod-uid", p.UID), fact("node-name", p.Node),
	}
	for key, value := range p.Labels {
		list = append(list, fact("pod-label", key+":"+value))
	}
	for _, o := range p.Owners {
		list = append(list, fact("pod-owner", o.Kind+":"+o.Name), fact("pod-owner-uid", o.Kind+":"+o.UID))
	}
	return selectors(list)
}

// Selectors are what entries can go by besides those of the pod. The image is
// named as it was asked for and as it was found, and its digest by itself.
func (c Container) Selectors() selector.Set {
	list := []selector.Selector{fact("container-name", c.Name), fact("container-image", c.Image), fact("container-image", c.ImageID)}
	if at := strings.LastIndexByte(c.ImageID, '@'); strings.Contains(c.ImageID[at+1:], ":") {
		list = append(list, fact("container-image-digest", c.ImageID[at+1:]))
	}
	return selectors(list)
}

func fact(name, value string) selector.Selector {
	return selector.Selector{Type: "k8s", Value: name + ":" + value}
}

// selectors leaves out facts that are not known, and what no entry can ask for.
func selectors(list []selector.Selector) selector.Set {
	return selector.NewSet(slices.DeleteFunc(list, func(s selector.Selector) bool {
		_, value, _ := strings.Cut(s.Value, ":")
		return value == "" || s.Check() != nil
	})...)
}

// runs says whether a process to which all of these selectors apply can be in
// the pod.
func (p *Pod) runs(cluster string, wanted selector.Set) bool {
	all := p.Selectors(cluster)
	if all.Contains(wanted) {
		return true
	}
	return slices.ContainsFunc(p.Containers, func(c Container) bool {
		return selector.NewSet(slices.Concat(all, c.Selectors())...).Contains(wanted)
	})
}

func samePod(a, b *Pod) bool {
	return a.UID == b.UID && a.Namespace == b.Namespace && a.Name == b.Name && a.ServiceAccount == b.ServiceAccount && a.Node == b.Node &&
		a.Ended == b.Ended && a.DeletedAt.Equal(b.DeletedAt) &&
		maps.Equal(a.Labels, b.Labels) && slices.Equal(a.Owners, b.Owners) && slices.Equal(a.Containers, b.Containers)
}

// byUID sorts pods.
func byUID(pods []*Pod) {
	slices.SortFunc(pods, func(a, b *Pod) int {
		if a.UID < b.UID {
			return -1
		}
		return 1
	})
}

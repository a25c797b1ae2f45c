package kube

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/pkg/selector"
)

// full is a pod with all that entries can go by.
func full() *corev1.Pod {
	p := pod("web-1", "p-1", "a")
	p.Labels = map[string]string{"app": "web", "empty": ""}
	p.OwnerReferences = []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web", UID: "f00d"}}
	p.Status.InitContainerStatuses = []corev1.ContainerStatus{{
		Name: "setup", ContainerID: "containerd://01", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}},
	}}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{
		{Name: "main", ContainerID: "containerd://02", Image: "registry.example/web:1", ImageID: "registry.example/web@sha256:aa"},
		{Name: "proxy", ContainerID: "docker://03", Image: "proxy:2", ImageID: "docker-pullable://proxy@sha256:bb"},
		{Name: "local", ContainerID: "cri-o://04", Image: "sha256:cc", ImageID: "sha256:cc"},
		{Name: "waits"},
	}
	return p
}

func written(set selector.Set) []string {
	var out []string
	for _, s := range set {
		out = append(out, s.String())
	}
	return out
}

func TestSelectorsOfPodsAndContainers(t *testing.T) {
	p := newPod(full())
	want := []string{
		"k8s:cluster:prod", "k8s:node-name:a", "k8s:ns:shop", "k8s:pod-label:app:web", "k8s:pod-label:empty:", "k8s:pod-name:web-1",
		"k8s:pod-owner-uid:ReplicaSet:f00d", "k8s:pod-owner:ReplicaSet:web", "k8s:pod-uid:p-1", "k8s:sa:web",
	}
	if got := written(p.Selectors("prod")); !slices.Equal(got, want) {
		t.Errorf("the pod has %q", got)
	}
	got := map[string][]string{}
	for _, c := range p.Containers {
		got[c.ID] = written(c.Selectors())
	}
	for id, want := range map[string][]string{
		"02": {"k8s:container-image-digest:sha256:aa", "k8s:container-image:registry.example/web:1", "k8s:container-image:registry.example/web@sha256:aa", "k8s:container-name:main"},
		"03": {"k8s:container-image-digest:sha256:bb", "k8s:container-image:proxy:2", "k8s:container-image:proxy@sha256:bb", "k8s:container-name:proxy"},
		"04": {"k8s:container-image-digest:sha256:cc", "k8s:container-image:sha256:cc", "k8s:container-name:local"},
	} {
		if !slices.Equal(got[id], want) {
			t.Errorf("container %s has %q", id, got[id])
		}
	}
	if len(got) != 3 {
		t.Errorf("%d containers run", len(got))
	}
}

// The facts of two containers are not those of one, and none are those of a
// container that has ended.
func TestAnEntryIsForOneContainer(t *testing.T) {
	c := clustersOf(t, Config{}, watched(full()))
	at := Place{"prod", "uid-a"}
	for _, tc := range []struct {
		wanted []string
		runs   bool
	}{
		{[]string{"ns:shop", "pod-label:app:web", "container-name:main"}, true},
		{[]string{"container-name:proxy", "container-image-digest:sha256:bb"}, true},
		{[]string{"container-name:main", "container-image-digest:sha256:bb"}, false},
		{[]string{"pod-label:app:db"}, false},
		{[]string{"container-name:setup"}, false},
		{[]string{"container-name:waits"}, false},
	} {
		var wanted []selector.Selector
		for _, value := range tc.wanted {
			wanted = append(wanted, selector.Selector{Type: "k8s", Value: value})
		}
		if err := c.Runs(at, selector.NewSet(wanted...)); (err == nil) != tc.runs {
			t.Errorf("%q: %v", tc.wanted, err)
		}
	}
}

// A node's agent hears of what entries go by, and of nothing else.
func TestAChangeThatMattersIsTold(t *testing.T) {
	x := watched(full())
	f := x.follow("uid-a")
	defer f.Close()
	now := metav1.Now().Time
	if c, _ := f.look(now); len(c.Pods) != 1 {
		t.Fatalf("the snapshot is %+v", c)
	}
	for name, tc := range map[string]struct {
		change func(*corev1.Pod)
		told   bool
	}{
		"condition": {func(p *corev1.Pod) { p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady}} }, false},
		"restarts":  {func(p *corev1.Pod) { p.Status.ContainerStatuses[0].RestartCount = 2 }, false},
		"label":     {func(p *corev1.Pod) { p.Labels["app"] = "db" }, true},
		"owner":     {func(p *corev1.Pod) { p.OwnerReferences = nil }, true},
		"container": {func(p *corev1.Pod) { p.Status.ContainerStatuses[0].ContainerID = "containerd://05" }, true},
	} {
		x.setPod(full())
		f.look(now)
		p := full()
		tc.change(p)
		x.setPod(p)
		if c, told := f.look(now); told != tc.told {
			t.Errorf("%s: told %v: %+v", name, told, c)
		}
	}
}

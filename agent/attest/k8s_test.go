package attest

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// onePod knows the pod with this UID.
type onePod string

func (p onePod) AwaitPod(_ context.Context, uid string) error {
	if uid != string(p) {
		return fault.New(fault.NotReady, "pod_unknown", "no")
	}
	return nil
}

// NEG-40: a process is told to be in the container and pod whose cgroup it is in,
// or in none; one that can't be told apart has none at all.
func TestK8SSelectorsAreThoseOfThePod(t *testing.T) {
	const uid = "7d1f9b3c-2a64-4e0f-9c55-0b8a4e6d21f0"
	container := strings.Repeat("0a", 32)
	want := selector.NewSet(selector.Selector{Type: "k8s", Value: "container-id:" + container}, selector.Selector{Type: "k8s", Value: "pod-uid:" + uid})
	k, err := NewK8S(K8SConfig{}.WithDefaults(), onePod(uid))
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cgroup string
		want   string
		reason string
	}{
		"in the pod":       {"0::/kubepods/burstable/pod" + uid + "/" + container + "\n", want.Key(), ""},
		"nested in it":     {"0::/kubepods/burstable/pod" + uid + "/" + container + "/kubepods/burstable/podx/y\n", want.Key(), ""},
		"in none":          {"0::/system.slice/sshd.service\n", host.Key(), ""},
		"not below root":   {"0::/kubelet/kubepods/pod" + uid + "/" + container + "\n", "", "cgroup_unknown"},
		"in another":       {"0::/kubepods/pod00000000-2a64-4e0f-9c55-0b8a4e6d21f0/" + container + "\n", "", "pod_unknown"},
		"in two":           {"1:pids:/kubepods/pod" + uid + "/" + container + "\n0::/kubepods/pod00000000-2a64-4e0f-9c55-0b8a4e6d21f0/" + container + "\n", "", "cgroup_conflict"},
		"beside the pod":   {"0::/kubepods/burstable/pod" + uid + "\n", "", "cgroup_unknown"},
		"in a namespace":   {"0::/../../pod" + uid + "/" + container + "\n", "", "cgroup_namespace"},
		"nothing readable": {"x", "", "cgroup_malformed"},
	} {
		set, err := k.Selectors(t.Context(), Process{Cgroup: tc.cgroup})
		if tc.reason == "" && (err != nil || set.Key() != tc.want) || tc.reason != "" && fault.ReasonOf(err) != tc.reason {
			t.Errorf("%s: %v, %v", name, set, err)
		}
	}
	if _, err := NewK8S(K8SConfig{CgroupRoot: "kubelet"}, onePod("")); fault.ReasonOf(err) != "config_invalid" {
		t.Error(err)
	}

	// What the caller hears of it tells nothing of the pod.
	a := newAttestor(t, nil)
	a.sources = []namedSource{{"k8s", k}}
	_, err = a.attest(t.Context(), Process{Cgroup: "0::/kubepods/burstable/pod" + uid + "\n"})
	if !errors.Is(err, fault.Denied) || fault.SafeText(err) != "no identity issued" {
		t.Errorf("told %v", err)
	}
	if _, err = a.attest(t.Context(), Process{Cgroup: "0::/kubepods/pod00000000-2a64-4e0f-9c55-0b8a4e6d21f0/" + container + "\n"}); !errors.Is(err, fault.NotReady) {
		t.Errorf("told %v", err)
	}
}

package attest

import (
	"context"

	"github.com/seed-caa81108/assay/agent/cgroup"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// K8SConfig is the agent's `attestation.k8s` section.
type K8SConfig struct {
	// CgroupRoot is the cgroup that holds the kubelet's kubepods, as in
	// /proc/<pid>/cgroup: "/" unless the kubelet has a --cgroup-root or runs in
	// a container, as in kind. Default /.
	CgroupRoot string `yaml:"cgroup_root"`
	// HostCgroups is where the host's /sys/fs/cgroup is mounted in the agent's
	// container, which need not be privileged then. It may be mounted read-only.
	// Default none: the agent sees cgroups as the host does.
	HostCgroups string `yaml:"host_cgroups"`
}

// WithDefaults returns c with its zero fields filled.
func (c K8SConfig) WithDefaults() K8SConfig {
	if c.CgroupRoot == "" {
		c.CgroupRoot = "/"
	}
	return c
}

// Pods know the pods of this node.
type Pods interface {
	// AwaitPod returns when the pod with this UID is known, or why it can't be
	// told what it is.
	AwaitPod(ctx context.Context, uid string) error
}

// K8S tells in which container of which pod of Kubernetes a process is. The
// kernel says which, by the process's cgroup, and that stays. What the pod and
// the container are, Pods say; that may change.
type K8S struct {
	root string
	view cgroup.View
	pods Pods
}

// NewK8S returns the source of k8s selectors.
func NewK8S(cfg K8SConfig, pods Pods) (*K8S, error) {
	if err := cgroup.CheckRoot(cfg.CgroupRoot); err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "config_invalid", "attestation.k8s.cgroup_root: "+fault.SafeText(err))
	}
	k := &K8S{root: cfg.CgroupRoot, pods: pods}
	if cfg.HostCgroups != "" {
		var err error
		if k.view, err = cgroup.OpenView(cfg.HostCgroups); err != nil {
			return nil, err
		}
	}
	return k, nil
}

// host stands for a process of the node that is in no pod.
var host = selector.NewSet(selector.Selector{Type: "k8s", Value: "host:true"})

// Selectors implements Source.
func (k *K8S) Selectors(ctx context.Context, p Process) (selector.Set, error) {
	owner, err := k.view.Find(p.Cgroup, k.root)
	switch {
	case err != nil:
		return nil, err
	case owner == cgroup.Owner{} && k.view.Elsewhere(p.Cgroup):
		// Not where the configured root says: better nothing than a pod that
		// passes for a program of the node.
		return nil, fault.New(fault.Denied, "cgroup_unknown",
			"the process is among pods that are not below attestation.k8s.cgroup_root: set it to the cgroup that holds the kubelet's kubepods")
	case owner == cgroup.Owner{}:
		return host, nil
	}
	if err := k.pods.AwaitPod(ctx, owner.PodUID); err != nil {
		return nil, err
	}
	return selector.NewSet(
		selector.Selector{Type: "k8s", Value: "pod-uid:" + owner.PodUID},
		selector.Selector{Type: "k8s", Value: "container-id:" + owner.ContainerID},
	), nil
}

// Package cgroup tells which container of which Kubernetes pod a process is in,
// by the names of its cgroups.
//
// It owns the rules by which the kubelet, containerd, CRI-O and cri-dockerd name
// cgroups, for both drivers (systemd and cgroupfs). It trusts the names between
// the configured root and the container's own cgroup, because root makes those.
// What is below the container's cgroup is of the workload's making and never
// looked at: whoever may make cgroups there can give them any name, also that of
// another pod. So the outermost pod and container count, at the one place where
// the kubelet puts them, and a name that only looks like one anywhere else is
// nothing.
//
// Order of steps, for the content of /proc/<pid>/cgroup:
//
//  1. The list is read strictly: what no kernel writes is refused.
//  2. Each path is judged alone. Not below the root, or below it and not among the
//     pods: it says nothing. Among the pods: it names a container, or the
//     process is refused.
//  3. All hierarchies that say something must say the same, and one of those that
//     runtimes always use must be among them.
//
// In a cgroup namespace of its own, as runtimes make it on hosts with cgroup v2
// for containers that aren't privileged, the kernel gives the agent paths relative
// to its own cgroup, /../../pod…, with the names above left out. A View puts them
// back; without one such a path is refused. Where kubelet and agent share a
// namespace below the host's, as in the nodes of kind, its paths are complete.
package cgroup

import (
	"path"
	"slices"
	"strings"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Owner is the container that a process is in. The zero value stands for none.
type Owner struct {
	// PodUID is a UUID, 36 characters in lower case, or for a pod out of a
	// kubelet's manifest file the hash of that manifest, 32 hexadecimal digits:
	// the annotation kubernetes.io/config.hash of its mirror pod.
	PodUID string
	// ContainerID is the runtime's: 64 hexadecimal digits in lower case.
	ContainerID string
}

// Find returns the owner of the process whose /proc/<pid>/cgroup has this
// content, or the zero Owner if the process is in no pod. The root is the cgroup
// that holds the kubelet's kubepods, "/" unless the kubelet runs with another
// --cgroup-root or in a container; it has passed CheckRoot. Nothing is read here:
// the content is what agent/attest read of a process that it holds, all lines of
// one moment, and compares before each message.
//
// A process that can't be told for sure is refused, as a fault of kind Denied
// whose text names the rule and no path: cgroup_malformed, cgroup_namespace,
// cgroup_unknown or cgroup_conflict.
func (v View) Find(content, root string) (Owner, error) {
	memberships, err := v.parse(content)
	if err != nil {
		return Owner{}, err
	}
	var found Owner
	vouched := false
	for _, m := range memberships {
		owner, err := ownerOf(m.path, root)
		switch {
		case err != nil:
			return Owner{}, err
		case owner == Owner{}:
			continue
		case found != Owner{} && found != owner:
			return Owner{}, errConflict()
		}
		found = owner
		vouched = vouched || m.vouches()
	}
	if found != (Owner{}) && !vouched {
		return Owner{}, errConflict()
	}
	return found, nil
}

// Elsewhere says whether a process that Find takes for one of no pod is among pods
// all the same, in cgroups of pods that are not below the root: no program of the
// host is in cgroups named like those.
func (v View) Elsewhere(content string) bool {
	memberships, err := v.parse(content)
	return err != nil || slices.ContainsFunc(memberships, func(m membership) bool { return strings.Contains(m.path, kubepods) })
}

// CheckRoot says whether root can be given to Find. The fault of kind Precondition
// says what is wrong with it.
func CheckRoot(root string) error {
	switch {
	case !strings.HasPrefix(root, "/") || path.Clean(root) != root || strings.ContainsAny(root, "\x00\n"):
		return fault.New(fault.Precondition, "config_invalid",
			`the cgroup root is an absolute path as in /proc/<pid>/cgroup, without "." and ".." and a slash at its end, such as / or /kubelet`)
	case path.Base(root) == kubepods || strings.HasSuffix(root, kubepods+slice):
		return fault.New(fault.Precondition, "config_invalid",
			"the cgroup root is the cgroup above kubepods, not kubepods itself: leave its last element out")
	}
	return nil
}

func errConflict() error {
	return fault.New(fault.Denied, "cgroup_conflict",
		"the process's cgroups name different containers, or one only where runtimes need not put it: start it through the kubelet alone")
}

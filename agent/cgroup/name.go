package cgroup

import (
	"slices"
	"strings"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	kubepods = "kubepods"
	slice    = ".slice"
	scope    = ".scope"
	// unexpanded stands in the middle of a name that containerd meant for
	// systemd (slice:prefix:container) and runc took for a directory's, as happens
	// where the kubelet's driver is systemd and containerd's is not.
	unexpanded = ":cri-containerd:"
)

// The pods of these classes are one level further down than guaranteed ones.
var classes = []string{"burstable", "besteffort"}

// ownerOf judges one clean, absolute path. The zero Owner without an error means
// that the process is not among the pods below root.
func ownerOf(path, root string) (Owner, error) {
	below, ok := strings.CutPrefix(path, strings.TrimSuffix(root, "/"))
	if !ok || !strings.HasPrefix(below, "/") {
		return Owner{}, nil
	}
	// At most kubepods, class, pod, container, and all that is below in one.
	names := strings.SplitN(below[1:], "/", 5)
	var pod, container string
	switch first, top := names[0], slicePrefix(root)+kubepods; {
	case first == kubepods:
		pod, container = inDirectories(names[1:])
	case first == top+slice:
		pod, container = inSlices(top, names[1:])
	case strings.Contains(first, unexpanded):
		pod, container = inOneName(first)
	default:
		return Owner{}, nil
	}
	if pod == "" || container == "" {
		return Owner{}, fault.New(fault.Denied, "cgroup_unknown",
			"the process is among the pods' cgroups, but in no container as containerd, CRI-O or cri-dockerd name it: run the pod with one of those")
	}
	return Owner{pod, container}, nil
}

// slicePrefix is what systemd puts before the name of each slice in root: its
// own name, as in kubelet.slice/kubelet-kubepods.slice.
func slicePrefix(root string) string {
	name, ok := strings.CutSuffix(root[strings.LastIndexByte(root, '/')+1:], slice)
	if !ok {
		return ""
	}
	return name + "-"
}

// inDirectories reads names of the cgroupfs driver:
// [<class>/]pod<uid>/<container>.
func inDirectories(names []string) (pod, container string) {
	if len(names) > 2 && slices.Contains(classes, names[0]) {
		names = names[1:]
	}
	if len(names) < 2 {
		return "", ""
	}
	uid, isPod := strings.CutPrefix(names[0], "pod")
	if !isPod {
		return "", ""
	}
	return podUID(uid, '-'), containerID(names[1])
}

// inSlices reads names of the systemd driver below the slice top:
// [<top>-<class>.slice/]<top>[-<class>]-pod<uid>.slice/<container>.
func inSlices(top string, names []string) (pod, container string) {
	if len(names) > 2 {
		class := slices.IndexFunc(classes, func(c string) bool { return names[0] == top+"-"+c+slice })
		if class >= 0 {
			top, names = top+"-"+classes[class], names[1:]
		}
	}
	if len(names) < 2 {
		return "", ""
	}
	rest, isPod := strings.CutPrefix(names[0], top+"-pod")
	uid, isSlice := strings.CutSuffix(rest, slice)
	if !isPod || !isSlice {
		return "", ""
	}
	return podUID(uid, '_'), containerID(names[1])
}

// inOneName reads [<prefix>-]kubepods[-<class>]-pod<uid>.slice:cri-containerd:<container>.
// The prefix stands for the kubelet's --cgroup-root, which is not where runc
// puts such a cgroup.
func inOneName(name string) (pod, container string) {
	name, container, _ = strings.Cut(name, unexpanded)
	prefix, rest, _ := strings.Cut(name, kubepods+"-")
	if prefix != "" && !strings.HasSuffix(prefix, "-") {
		return "", ""
	}
	for _, class := range classes {
		if after, ok := strings.CutPrefix(rest, class+"-"); ok {
			rest = after
			break
		}
	}
	rest, isPod := strings.CutPrefix(rest, "pod")
	uid, isSlice := strings.CutSuffix(rest, slice)
	if !isPod || !isSlice || !hex(container, 64) {
		return "", ""
	}
	return podUID(uid, '_'), container
}

// podUID returns the UID of a pod as the API server writes it, or nothing if s is
// none. Slices have another separator, as "-" is a step of the hierarchy there.
func podUID(s string, separator byte) string {
	if hex(s, 32) { // the hash of a static pod's manifest
		return s
	}
	groups := strings.Split(s, string(separator))
	if len(groups) != 5 {
		return ""
	}
	for i, length := range []int{8, 4, 4, 4, 12} {
		if !hex(groups[i], length) {
			return ""
		}
	}
	return strings.Join(groups, "-")
}

// containerID returns the runtime's id of the container whose cgroup has this
// name, or nothing if the name is no container's. CRI-O's conmon, for one, is in
// crio-conmon-<id> beside the container that it watches.
func containerID(name string) string {
	id, isScope := strings.CutSuffix(name, scope)
	if isScope {
		runtime := slices.IndexFunc(runtimes, func(r string) bool { return strings.HasPrefix(id, r) })
		if runtime < 0 {
			return ""
		}
		id = id[len(runtimes[runtime]):]
	} else {
		id = strings.TrimPrefix(id, "crio-")
	}
	if !hex(id, 64) {
		return ""
	}
	return id
}

// What runtimes put before the container's id to name its scope.
var runtimes = []string{"cri-containerd-", "crio-", "docker-"}

// hex says whether s is so many hexadecimal digits in lower case.
func hex(s string, digits int) bool {
	return len(s) == digits && strings.Trim(s, "0123456789abcdef") == ""
}

package cgroup

import (
	"slices"
	"strings"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	// maxContent is more than the kernel writes for a process of any pod: a line
	// for each of 14 hierarchies, whose paths have at most 4096 bytes.
	maxContent = 64 << 10
	maxLines   = 64
)

// membership is one line of /proc/<pid>/cgroup: where a process is in one
// hierarchy.
type membership struct {
	controllers string // comma-separated, "name=…" last; empty for cgroup v2
	path        string // absolute, clean
}

// vouches says whether runtimes put every container's processes into this
// hierarchy, and hosts give nobody else the top of it. Others, such as one that
// was mounted by name for some service, may object and not speak up alone.
func (m membership) vouches() bool {
	if m.controllers == "" {
		return true
	}
	for c := range strings.SplitSeq(m.controllers, ",") {
		if slices.Contains([]string{"name=systemd", "memory", "pids", "cpu"}, c) {
			return true
		}
	}
	return false
}

// parse reads the content of /proc/<pid>/cgroup: lines of
// hierarchy:controllers:path. No name holds a line feed, the kernel sees to that.
func (v View) parse(content string) ([]membership, error) {
	if len(content) > maxContent || strings.IndexByte(content, 0) >= 0 {
		return nil, errMalformed()
	}
	var list []membership
	var seen []string
	for line := range strings.Lines(content) {
		fields := strings.SplitN(line, ":", 3)
		if len(fields) != 3 || len(list) == maxLines {
			return nil, errMalformed()
		}
		id, m := fields[0], membership{controllers: fields[1]}
		var whole bool
		m.path, whole = strings.CutSuffix(fields[2], "\n")
		if !whole || !number(id) || slices.Contains(seen, id) || (id == "0") != (m.controllers == "") {
			return nil, errMalformed()
		}
		if m.controllers == "" {
			m.path = v.absolute(m.path)
		}
		if err := checkPath(m.path); err != nil {
			return nil, err
		}
		list, seen = append(list, m), append(seen, id)
	}
	return list, nil
}

// number says whether s is a hierarchy's id as the kernel prints it.
func number(s string) bool {
	if s == "" || len(s) > 10 || s[0] == '0' && s != "0" {
		return false
	}
	return strings.Trim(s, "0123456789") == ""
}

// checkPath refuses what is relative to the reader's cgroup namespace, which the
// kernel begins with as many /.. as there are levels to climb, and what it never
// writes.
func checkPath(path string) error {
	below, absolute := strings.CutPrefix(path, "/")
	switch {
	case !absolute:
		return errMalformed()
	case below == "":
		return nil
	case below == ".." || strings.HasPrefix(below, "../"):
		return fault.New(fault.Denied, "cgroup_namespace",
			"the agent sees cgroups from inside a cgroup namespace of its own, so this process's are not known: mount the host's /sys/fs/cgroup and name it in attestation.k8s.host_cgroups, or run the agent's container privileged")
	}
	for name := range strings.SplitSeq(below, "/") {
		if name == "" || name == "." || name == ".." {
			return errMalformed()
		}
	}
	return nil
}

func errMalformed() error {
	return fault.New(fault.Denied, "cgroup_malformed",
		"the list of the process's cgroups is not as a kernel writes it: make sure that /proc is the kernel's own")
}

package cgroup

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// View is from where cgroups of version 2 are seen. The zero View is the host's.
type View struct {
	// own are the names from the host's root down to that of the cgroup namespace
	// that this process is in.
	own []string
}

// OpenView finds out from where this process sees cgroups, given a directory at
// which the host has its cgroups mounted: a mount shows all names, from whatever
// namespace it is looked at. This process has to be in the host's PID namespace.
//
// Where that directory is not of version 2, runtimes give nobody a cgroup
// namespace, and the answer is the host's View.
func OpenView(host string) (View, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(host, &st); err != nil {
		return View{}, fault.Wrap(fault.Precondition, err, "config_invalid", "attestation.k8s.host_cgroups: "+host+" can't be read: mount the host's /sys/fs/cgroup there")
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return View{}, nil
	}
	here, err := find(host, os.Getpid())
	if err != nil {
		return View{}, fault.Wrap(fault.Precondition, err, "config_invalid",
			"attestation.k8s.host_cgroups: this process is in no cgroup of "+host+": mount the host's /sys/fs/cgroup there, whole, and run the agent in the host's PID namespace")
	}
	content, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return View{}, err
	}
	v, err := newView(here, string(content))
	if err != nil {
		return View{}, err
	}
	// In a part of the host's cgroups names above the agent's are left out, and its
	// first process is not there.
	first, err := find(host, 1)
	if err != nil {
		return View{}, errElsewhere()
	}
	if content, err = os.ReadFile("/proc/1/cgroup"); err != nil {
		return View{}, err
	}
	if !v.shows(first, string(content)) {
		return View{}, errElsewhere()
	}
	return v, nil
}

// shows says whether what the kernel says of a process in this cgroup is read as
// that.
func (v View) shows(cgroup, content string) bool {
	seen, ok := unified(content)
	return ok && v.absolute(seen) == cgroup
}

// unified returns the path of version 2 out of the content of /proc/<pid>/cgroup.
func unified(content string) (string, bool) {
	for line := range strings.Lines(content) {
		if seen, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			return seen, true
		}
	}
	return "", false
}

// newView tells the namespace by where its process is in the host's view, and in
// its own.
func newView(here, content string) (View, error) {
	within, ok := unified(content)
	if !ok {
		return View{}, errElsewhere()
	}
	above, ok := strings.CutSuffix(here, strings.TrimSuffix(within, "/"))
	if !ok {
		return View{}, errElsewhere()
	}
	if above = strings.Trim(above, "/"); above == "" {
		return View{}, nil
	}
	return View{own: strings.Split(above, "/")}, nil
}

func errElsewhere() error {
	return fault.New(fault.Precondition, "config_invalid",
		"attestation.k8s.host_cgroups: cgroups there are not those that the kernel says: mount the host's /sys/fs/cgroup there, whole")
}

// find returns the cgroup below root that a process is in, "/" for root itself.
func find(root string, pid int) (string, error) {
	found := ""
	err := filepath.WalkDir(root, func(dir string, d fs.DirEntry, err error) error { //nolint:gosec // G703: the operator names it
		switch {
		case err != nil:
			return nil //nolint:nilerr // cgroups come and go
		case !d.IsDir():
			return nil
		case !holds(filepath.Join(dir, "cgroup.procs"), pid):
			return nil
		}
		found = path.Join("/", strings.TrimPrefix(dir, root))
		return filepath.SkipAll
	})
	if err == nil && found == "" {
		err = errors.New("there is no such process")
	}
	return found, err
}

func holds(list string, pid int) bool {
	file, err := os.Open(list)
	if err != nil {
		return false
	}
	defer func() { _ = file.Close() }()
	wanted := strconv.Itoa(pid)
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if lines.Text() == wanted {
			return true
		}
	}
	return false
}

// absolute turns a path of version 2 as this process sees it into the host's. The
// kernel begins it with as many /.. as there are levels to climb from the
// namespace's root. More than there are is no path of this host.
func (v View) absolute(seen string) string {
	if len(v.own) == 0 {
		return seen
	}
	above := v.own
	for {
		rest, up := strings.CutPrefix(seen, "/..")
		if !up || rest != "" && rest[0] != '/' || len(above) == 0 {
			break
		}
		seen, above = rest, above[:len(above)-1]
	}
	if len(above) == 0 {
		if seen == "" {
			return "/"
		}
		return seen
	}
	if seen == "/" {
		seen = ""
	}
	return "/" + strings.Join(above, "/") + seen
}

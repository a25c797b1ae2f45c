package attest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// process holds one process by its pidfd. Connections of the same process share
// it where the kernel tells processes apart by the pidfd's inode.
type process struct {
	pid     int32
	info    bool   // PIDFD_GET_INFO works
	exePath string // of the kernel's link to the program
	inode   uint64 // zero: not shared

	// Guarded by processes.mu.
	refs   int
	newest *facts

	// mu keeps the descriptors open while they are in use: a number that was
	// closed may be another file by then.
	mu     sync.RWMutex
	closed bool
	pidfd  int // -1 in a build without pidfds
	cgroup int // -1 unless a hierarchy of cgroup v1 has to be read
}

// facts is what Check compares. Connections of one process share it as long as
// nothing changed.
type facts struct {
	process  Process
	cgroupID uint64 // zero: compare the file
	exe      exeID  // zero: the agent may not read it
	selectors
}

func (p *process) descriptors() int {
	n := 0
	for _, fd := range []int{p.pidfd, p.cgroup} {
		if fd >= 0 {
			n++
		}
	}
	return n
}

// enter keeps the descriptors open until leave; it fails once they are closed.
func (p *process) enter() bool {
	p.mu.RLock()
	if p.closed {
		p.mu.RUnlock()
		return false
	}
	return true
}

func (p *process) leave() { p.mu.RUnlock() }

// alive must come after all reading by pid: then what was read was of this
// process.
func (p *process) alive() error {
	if pinned && ended(p.pidfd) {
		return errGone
	}
	return nil
}

// owner returns the effective ids of the process and the id of its cgroup, zero
// if the kernel does not tell.
func (p *process) owner() (id, uint64, error) {
	if p.info {
		var info pidfdInfo
		err := getInfo(p.pidfd, &info)
		return id{info.euid, info.egid}, info.cgroupID, err
	}
	ids, err := effectiveIDs(p.pid)
	return ids, 0, err
}

// observe takes the facts of a process. Group ids are those of the connect.
func (p *process) observe(groups []uint32) (*facts, error) {
	ids, cgroupID, err := p.owner()
	if err != nil {
		return nil, err
	}
	f := &facts{process: Process{PID: p.pid, UID: ids.uid, GID: ids.gid, Groups: groups}, cgroupID: cgroupID}
	content, err := readProc(p.pid, "cgroup")
	if err != nil {
		return nil, err
	}
	f.process.Cgroup = string(content)
	if !unified(f.process.Cgroup) {
		f.cgroupID = 0 // it tells of the v2 hierarchy only
	}
	switch f.exe, err = statExe(p.exePath); {
	case err == nil, errors.Is(err, os.ErrPermission):
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH):
		return nil, errGone // the leader has exited
	default:
		return nil, fmt.Errorf("identify program: %w", err)
	}
	f.process.program = program{p.exePath, f.exe}
	// The reading above took a moment; take the facts only if all are of one.
	again, cgroupAgain, err := p.owner()
	if err != nil {
		return nil, err
	}
	if again != ids || cgroupAgain != cgroupID {
		return nil, errChanged
	}
	return f, p.alive()
}

// unified says whether a process is in cgroup v2 and in nothing else.
func unified(content string) bool {
	return strings.HasPrefix(content, "0::") && strings.Count(content, "\n") == 1
}

var errChanged = errors.New("the process is not what it was")

// same compares what is now with the facts. Its caller holds enter.
func (p *process) same(f *facts) error {
	ids, cgroupID, err := p.owner()
	if err != nil {
		return err
	}
	if ids.uid != f.process.UID || ids.gid != f.process.GID {
		return errChanged
	}
	if f.cgroupID != 0 {
		if cgroupID != f.cgroupID {
			return errChanged
		}
	} else if err := p.sameCgroup(f.process.Cgroup); err != nil {
		return err
	}
	if f.exe != (exeID{}) {
		if exe, err := statExe(p.exePath); err != nil || exe != f.exe {
			return errChanged
		}
	}
	return nil
}

// maxCgroup bounds /proc/<pid>/cgroup; 13 hierarchies with long names of
// containers come to about 3 KB.
const maxCgroup = 16 << 10

var cgroupBuffers = sync.Pool{New: func() any { return new([maxCgroup]byte) }}

func (p *process) sameCgroup(want string) error {
	if p.cgroup < 0 {
		content, err := readProc(p.pid, "cgroup")
		if err != nil {
			return err
		}
		if string(content) != want {
			return errChanged
		}
		return nil
	}
	buf := cgroupBuffers.Get().(*[maxCgroup]byte)
	defer cgroupBuffers.Put(buf)
	n, err := unix.Pread(p.cgroup, buf[:], 0)
	if err == unix.ESRCH {
		return errGone
	} else if err != nil {
		return fmt.Errorf("read cgroup: %w", err)
	}
	if !bytes.Equal(buf[:n], []byte(want)) {
		return errChanged
	}
	return nil
}

func (p *process) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, fd := range []*int{&p.pidfd, &p.cgroup} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// processes are the processes held, each once.
type processes struct {
	mu      sync.Mutex
	byInode map[uint64]*process
	open    int // descriptors
}

// hold pins the process at the other end of a socket and says how many
// descriptors that took. The caller gives it back with release.
func (ps *processes) hold(k kernel, sock int, pid int32) (*process, int, error) {
	p := &process{pid: pid, exePath: procPath(pid, "exe"), refs: 1, pidfd: -1, cgroup: -1}
	if !pinned {
		return p, 0, nil
	}
	var err error
	if k.peerPidfd {
		p.pidfd, err = peerPidfd(sock)
	} else {
		p.pidfd, err = pidfdByPID(pid)
	}
	if err != nil {
		return nil, 0, err
	}
	p.info = k.info
	if k.pidfs {
		var st unix.Stat_t
		if err := unix.Fstat(p.pidfd, &st); err != nil {
			p.close()
			return nil, 0, fmt.Errorf("stat pidfd: %w", err)
		}
		p.inode = st.Ino
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if held := ps.byInode[p.inode]; held != nil {
		p.close()
		held.refs++
		return held, 0, nil
	}
	if p.inode != 0 {
		p.keepCgroupOpen()
		ps.byInode[p.inode] = p
	}
	ps.open += p.descriptors()
	return p, p.descriptors(), nil
}

// keepCgroupOpen saves most of what Check costs on hosts with cgroup v1, for one
// descriptor per process. The file is this process's, not a later one's of the
// same pid: observe ends with a look at the pidfd, and gives up if it has ended.
func (p *process) keepCgroupOpen() {
	content, err := readProc(p.pid, "cgroup")
	if err != nil || unified(string(content)) || len(content) >= maxCgroup {
		return
	}
	if fd, err := unix.Open(procPath(p.pid, "cgroup"), unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		p.cgroup = fd
	}
}

// settle returns the facts to use for a new connection: the ones that earlier
// connections of the process share, if they still hold.
func (ps *processes) settle(p *process, f *facts) *facts {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if old := p.newest; old != nil && old.equal(f) {
		return old
	}
	p.newest = f
	return f
}

func (f *facts) equal(g *facts) bool {
	return f.cgroupID == g.cgroupID && f.exe == g.exe && f.process.PID == g.process.PID &&
		f.process.UID == g.process.UID && f.process.GID == g.process.GID &&
		f.process.Cgroup == g.process.Cgroup && slices.Equal(f.process.Groups, g.process.Groups)
}

func (ps *processes) release(p *process) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if p.refs--; p.refs > 0 {
		return
	}
	if p.inode != 0 {
		delete(ps.byInode, p.inode)
	}
	ps.open -= p.descriptors()
	p.close()
}

func (ps *processes) descriptors() int {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.open
}

package attest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernel is what this kernel offers; tests switch parts of it off to run the
// ways of older ones.
type kernel struct {
	peerPidfd bool // SO_PEERPIDFD, 6.5
	pidfs     bool // a pidfd's inode names its process, 6.9
	info      bool // PIDFD_GET_INFO, 6.13
}

// pidfdInfo is the first published version of struct pidfd_info.
type pidfdInfo struct {
	mask         uint64
	cgroupID     uint64
	pid, tgid    uint32
	ppid         uint32
	ruid, rgid   uint32
	euid, egid   uint32
	suid, sgid   uint32
	fsuid, fsgid uint32
	exitCode     int32
}

const (
	pidfdInfoWanted = unix.PIDFD_INFO_PID | unix.PIDFD_INFO_CREDS | unix.PIDFD_INFO_CGROUPID
	// PIDFD_GET_INFO carries the size of the caller's struct, as every
	// extensible ioctl does; x/sys defines it for a longer, later version.
	ioctlSizeShift = 16
	ioctlSizeMask  = 0x3fff << ioctlSizeShift
	pidfdGetInfo   = unix.PIDFD_GET_INFO&^ioctlSizeMask | unix.PIDFD_INFO_SIZE_VER0<<ioctlSizeShift
	// Without 64-bit inodes two processes could share one.
	wideInodes = unsafe.Sizeof(uintptr(0)) == 8
)

// errGone says that the process asked about has ended.
var errGone = errors.New("the process has ended")

func probeKernel() (kernel, error) {
	var k kernel
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return k, fmt.Errorf("open a pidfd of this process: %w", err)
	}
	defer unix.Close(self)
	k.info = getInfo(self, new(pidfdInfo)) == nil
	var fs unix.Statfs_t
	k.pidfs = unix.Fstatfs(self, &fs) == nil && int64(fs.Type) == unix.PID_FS_MAGIC && wideInodes //nolint:unconvert // Type is an int32 on some architectures
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return k, fmt.Errorf("make a socket pair: %w", err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	if fd, err := unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
		k.peerPidfd = true
		unix.Close(fd)
	}
	return k, nil
}

func getInfo(pidfd int, info *pidfdInfo) error {
	*info = pidfdInfo{mask: pidfdInfoWanted}
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(pidfd), pidfdGetInfo, uintptr(unsafe.Pointer(info)))
		switch errno {
		case unix.EINTR:
			continue
		case 0:
			if info.mask&pidfdInfoWanted != pidfdInfoWanted {
				return errGone
			}
			return nil
		case unix.ESRCH:
			return errGone
		}
		return fmt.Errorf("ask pidfd for info: %w", errno)
	}
}

// ended says whether the process behind a pidfd has exited, reaped or not: its
// pidfd is readable then. Signal 0 would call a zombie alive.
func ended(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err == unix.EINTR {
			continue
		}
		return err != nil || n != 0
	}
}

// peerPidfd opens a pidfd of the process that connected. The kernel sets
// close-on-exec on every pidfd.
func peerPidfd(sock int) (int, error) {
	fd, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	switch err {
	case nil:
		return fd, nil
	case unix.ESRCH, unix.EINVAL, unix.ENODATA: // reaped, by age of kernel
		return -1, errGone
	}
	return -1, fmt.Errorf("get pidfd of peer: %w", err)
}

// pidfdByPID is the way of kernels before 6.5. Equal start times around the
// open show that one process had the pid all the while; that it is the one that
// connected is likely, not certain.
func pidfdByPID(pid int32) (int, error) {
	before, err := startTime(pid)
	if err != nil {
		return -1, err
	}
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err == unix.ESRCH {
		return -1, errGone
	} else if err != nil {
		return -1, fmt.Errorf("open pidfd: %w", err)
	}
	if after, err := startTime(pid); err != nil || after != before {
		unix.Close(fd)
		return -1, errGone
	}
	return fd, nil
}

// maxGroups is how many supplementary groups a caller may have. The kernel lets
// users with a range of group numbers take 65536, and each gives selectors.
const maxGroups = 1024

// peerGroups returns the supplementary groups of the process that connected, as
// they were then: all, or an error.
func peerGroups(sock int) ([]uint32, error) {
	for size := 64; ; {
		groups := make([]uint32, size)
		length := uint32(size * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(sock), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&length)), 0)
		switch errno {
		case 0:
			return groups[: length/4 : length/4], nil
		case unix.ERANGE: // length now holds what is needed
			if size = int(length / 4); size > maxGroups {
				return nil, errTooManyGroups
			}
			continue
		case unix.ENODATA:
			return nil, nil
		}
		return nil, fmt.Errorf("get groups of peer: %w", errno)
	}
}

func procPath(pid int32, name string) string {
	return "/proc/" + strconv.Itoa(int(pid)) + "/" + name
}

func readProc(pid int32, name string) ([]byte, error) {
	data, err := os.ReadFile(procPath(pid, name))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return nil, errGone
	}
	return data, err
}

func startTime(pid int32) (string, error) {
	_, start, err := stat(pid)
	return start, err
}

// stat returns the state and the start time of a process or of what is left of
// one.
func stat(pid int32) (state, start string, err error) {
	data, err := readProc(pid, "stat")
	if err != nil {
		return "", "", err
	}
	return parseStat(data)
}

// parseStat returns the state and the start time out of /proc/<pid>/stat. The
// second field is the program's name, which may hold spaces and parentheses.
func parseStat(data []byte) (state, start string, err error) {
	const stateField, startField = 0, 19 // counted from behind the name
	end := bytes.LastIndexByte(data, ')')
	fields := strings.Fields(string(data[end+1:]))
	if end < 0 || len(fields) <= startField {
		return "", "", errors.New("parse stat of process: too few fields")
	}
	return fields[stateField], fields[startField], nil
}

// effectiveIDs reads what PIDFD_GET_INFO tells on newer kernels.
func effectiveIDs(pid int32) (id, error) {
	data, err := readProc(pid, "status")
	if err != nil {
		return id{}, err
	}
	return parseStatus(data)
}

func parseStatus(data []byte) (id, error) {
	var got id
	var seen int
	for line := range strings.Lines(string(data)) {
		for prefix, field := range map[string]*uint32{"Uid:": &got.uid, "Gid:": &got.gid} {
			rest, ok := strings.CutPrefix(line, prefix)
			if !ok {
				continue
			}
			values := strings.Fields(rest) // real, effective, saved, filesystem
			if len(values) != 4 {
				return id{}, errors.New("parse status of process: ids expected")
			}
			n, err := strconv.ParseUint(values[1], 10, 32)
			if err != nil {
				return id{}, fmt.Errorf("parse status of process: %w", err)
			}
			*field = uint32(n)
			seen++
		}
	}
	if seen != 2 {
		return id{}, errors.New("parse status of process: no ids")
	}
	return got, nil
}

// exeID identifies an executable: where it is and when it was made, as an inode
// number alone may be used again.
type exeID struct {
	major, minor uint32
	inode        uint64
	born         unix.StatxTimestamp
}

// statExe identifies the program that a process runs. It follows the kernel's
// own reference, so the file may be deleted or out of our mount namespace.
func statExe(path string) (exeID, error) {
	var st unix.Statx_t
	for {
		err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO|unix.STATX_BTIME, &st)
		if err == unix.EINTR {
			continue
		} else if err != nil {
			return exeID{}, err
		}
		return exeID{st.Dev_major, st.Dev_minor, st.Ino, st.Btime}, nil
	}
}

package durable

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// lockName is the file in a locked directory that carries the lock.
const lockName = "lock"

// LockDir takes the directory for this process, or fails at once with reason
// data_dir_locked and, if it can be found out, the name of the process that
// has it. The kernel drops the lock when the process ends, however it ends; the
// lock file stays.
func LockDir(dir string) (unlock func() error, err error) {
	path := filepath.Join(dir, lockName)
	if err := CheckWritable(path); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, diskError("open", path, err)
	}
	if err := lockFile(f); err != nil {
		defer func() { _ = f.Close() }()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fault.Wrap(fault.Conflict, err, "data_dir_locked",
				fmt.Sprintf("%s is in use by %s: stop it, or configure another directory", dir, holder(f)))
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	// For whoever comes second. It is a hint: the lock itself is the kernel's.
	if err := writePID(f); err != nil {
		_ = f.Close()
		return nil, diskError("write", path, err)
	}
	return sync.OnceValue(f.Close), nil
}

func lockFile(f *os.File) error {
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

func writePID(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// holder names the process whose pid is in the lock file.
func holder(f *os.File) string {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 32))
	if err != nil {
		return "another process"
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 0 {
		return "another process"
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return fmt.Sprintf("another process (pid %d, maybe in another container)", pid)
	}
	return fmt.Sprintf("process %d (%s)", pid, strings.TrimSpace(string(comm)))
}

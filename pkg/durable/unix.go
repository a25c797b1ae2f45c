package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	// maxSocketPath is what fits into the kernel's sun_path with its final NUL.
	maxSocketPath = 107
	// bindSuffix is the length of what is appended for the time before rename.
	bindSuffix = 5
	// MaxSocketPath is how many bytes the path of a socket may have.
	MaxSocketPath = maxSocketPath - bindSuffix
	// backlog is cut down by the kernel to net.core.somaxconn.
	backlog = 4096
)

// Listener is a Unix socket that takes its name away when it is closed.
// Connections are *net.UnixConn; their LocalAddr is the name under which the
// socket was bound, which is the path and a suffix.
type Listener struct {
	*net.UnixListener
	path  string
	inode fs.FileInfo
	once  sync.Once
}

// ListenUnix puts a listening socket at path with exactly this mode.
//
// The path must pass CheckWritable, and what is there may only be a socket on
// which nobody listens any more. The steps are: bind under a temporary name,
// set the mode, listen, rename into place. So the path always has a socket with
// the right mode that answers, and a dead one is replaced without a gap.
func ListenUnix(path string, perm fs.FileMode) (*Listener, error) {
	if len(path) > MaxSocketPath {
		return nil, fault.Newf(fault.Precondition, "socket_path_too_long",
			"socket path %s has %d bytes, at most %d work: choose a shorter directory", path, len(path), MaxSocketPath)
	}
	if err := CheckWritable(path); err != nil {
		return nil, err
	}
	if err := checkVacant(path); err != nil {
		return nil, err
	}
	temp := path + "." + randomHex((bindSuffix-1)/2)
	ln, err := bindUnix(temp, perm)
	if err != nil {
		return nil, diskError("listen on", path, err)
	}
	inode, err := os.Lstat(temp)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = ln.Close()
		_ = os.Remove(temp)
		return nil, diskError("listen on", path, err)
	}
	return &Listener{UnixListener: ln, path: path, inode: inode}, nil
}

// Addr returns the path that clients use.
func (l *Listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// InPlace says whether the path still leads to this socket.
func (l *Listener) InPlace() bool {
	info, err := os.Lstat(l.path)
	return err == nil && os.SameFile(info, l.inode)
}

// Close stops listening and removes the socket, unless another one took its
// place in the meantime.
func (l *Listener) Close() error {
	l.once.Do(func() {
		if l.InPlace() {
			_ = os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}

// checkVacant returns nil if there is nothing at path but, at most, a socket
// that nobody listens on.
func checkVacant(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return diskError("look at", path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return untrusted(path, "is in the way and is no socket: remove it, or configure another path")
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	switch err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOENT):
		return nil
	case err == nil, errors.Is(err, unix.EAGAIN): // EAGAIN: it listens and its queue is full
		return fault.Newf(fault.Conflict, "socket_in_use", "another process listens on %s: stop it, or configure another path", path)
	default:
		return diskError("probe", path, err)
	}
}

// bindUnix returns a listener bound to path. The mode is set between bind and
// listen: until then nobody can connect.
func bindUnix(path string, perm fs.FileMode) (*net.UnixListener, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer func() { _ = f.Close() }() // the listener has a duplicate
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, err
	}
	ln, err := listenWithMode(f, fd, path, perm)
	if err != nil {
		_ = os.Remove(path)
		return nil, err
	}
	return ln, nil
}

func listenWithMode(f *os.File, fd int, path string, perm fs.FileMode) (*net.UnixListener, error) {
	if err := os.Chmod(path, perm.Perm()); err != nil {
		return nil, err
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return nil, err
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	return ln.(*net.UnixListener), nil
}

package main

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// peer is a daemon as the tool reaches it.
type peer struct {
	name             string // for messages
	network, address string // as net.Dial takes them
	// open says that the socket is for everybody, as the agent makes it: who
	// is kept out is so by something that is wrong.
	open bool

	// Of a server over the network: who we are to it, who it has to be, and
	// why the last handshake failed.
	as, is spiffeid.ID
	failed *atomic.Pointer[error]
}

func (p peer) String() string { return p.name + " " + p.address }

// named adds to a refusal whom it is about: which of several identities was
// used is not told by the command line.
func (p peer) named(err error) error {
	if p.as.IsZero() || fault.ReasonOf(err) != "operator_not_allowed" {
		return err
	}
	return reword(err, fault.SafeText(err)+"; it is "+p.as.String())
}

// reachable tries the peer's address once, to say what is wrong with it.
func (p peer) reachable() error {
	conn, err := net.DialTimeout(p.network, p.address, time.Second)
	if err != nil {
		return err
	}
	return conn.Close()
}

// unreachable explains a failed connection by what the kernel says about it.
func (p peer) unreachable() error {
	err := p.reachable()
	switch {
	case err == nil && !p.as.IsZero():
		return fault.New(fault.NotReady, "unavailable", p.String()+" takes connections but ends them: does it know the roots of your certificate, "+p.as.String()+"? See its log")
	case err == nil:
		return fault.New(fault.NotReady, "unavailable", p.String()+" takes connections but gives no answer: see its log")
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.NotReady, "unreachable", p.String()+" does not exist: start the daemon, or name another with --socket")
	case errors.Is(err, fs.ErrPermission):
		return p.denied()
	case errors.Is(err, syscall.ECONNREFUSED) && !p.isSocket():
		return fault.New(fault.NotReady, "unreachable", p.String()+" is not a socket: name the daemon's own with --socket")
	case errors.Is(err, syscall.ECONNREFUSED):
		return fault.New(fault.NotReady, "unreachable", "nobody listens on "+p.String()+": start the daemon")
	}
	return fault.Wrap(fault.NotReady, err, "unreachable", "can't connect to "+p.String())
}

func (p peer) isSocket() bool {
	if p.network != "unix" {
		return true
	}
	info, err := os.Stat(p.address)
	return err != nil || info.Mode().Type() == fs.ModeSocket
}

// denied says what keeps this process from the peer's socket.
func (p peer) denied() error {
	next := "run as root or as a member of its group"
	if p.open {
		next = "the socket's own mode keeps it out: the agent gives it 0666, so restart the agent"
		if dir := closedDir(p.address); dir != "" {
			next = "the directory " + dir + " keeps it out: let this user pass it (chmod o+x)"
		}
	}
	return fault.New(fault.Denied, "socket_denied", "no permission for "+p.String()+": "+next)
}

// closedDir returns the first directory on the way to path, from the root on,
// that does not let this process through; nothing if all do.
func closedDir(path string) string {
	dir := filepath.Dir(path)
	if dir != path {
		if closed := closedDir(dir); closed != "" {
			return closed
		}
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrPermission) {
		return dir
	}
	return ""
}

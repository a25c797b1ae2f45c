package durable

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func listen(t *testing.T, path string, mode fs.FileMode) *Listener {
	t.Helper()
	ln, err := ListenUnix(path, mode)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// roundTrip proves that the listener serves who dials path.
func roundTrip(t *testing.T, ln *Listener, path string) {
	t.Helper()
	client, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, ok := conn.(*net.UnixConn); !ok {
		t.Errorf("connection is a %T", conn)
	}
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
}

func TestListenUnixServesWithItsModeAndTakesItsNameAway(t *testing.T) {
	dir := t.TempDir()
	for _, mode := range []fs.FileMode{0o600, 0o660, 0o666} {
		path := filepath.Join(dir, "api.sock")
		var ln *Listener
		withUmask(0o077, func() { ln = listen(t, path, mode) })
		info, err := os.Lstat(path)
		if err != nil || info.Mode() != fs.ModeSocket|mode {
			t.Errorf("mode %v, %v, want %v", info.Mode(), err, mode)
		}
		if got := names(t, dir); len(got) != 1 || ln.Addr().String() != path || !ln.InPlace() {
			t.Errorf("%v, %v", got, ln.Addr())
		}
		roundTrip(t, ln, path)
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
		if got := names(t, dir); len(got) != 0 {
			t.Errorf("left behind: %v", got)
		}
	}
}

func TestListenUnixReplacesADeadSocketOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	first := listen(t, path, 0o600)
	_, err := ListenUnix(path, 0o600)
	wantReason(t, err, "socket_in_use")
	roundTripLater := first // still whole after the attempt
	if conn, err := roundTripLater.Accept(); err != nil {
		t.Fatal(err)
	} else {
		_ = conn.Close() // the probe
	}
	roundTrip(t, first, path)

	if err := first.UnixListener.Close(); err != nil { // dies without cleaning up
		t.Fatal(err)
	}
	second := listen(t, path, 0o600)
	roundTrip(t, second, path)
	if first.InPlace() {
		t.Error("the first listener takes the second's socket for its own")
	}
	_ = first.Close()
	roundTrip(t, second, path) // its name is still there
}

func TestListenUnixTakesAFullQueueForAlive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api.sock")
	ln := listen(t, path, 0o600)
	raw, err := ln.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 0) }); err != nil {
		t.Fatal(err)
	}
	for range 3 { // the queue takes one, or a few
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(fd) }()
		_ = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	}
	_, err = ListenUnix(path, 0o600)
	wantReason(t, err, "socket_in_use")
}

// NEG-44
func TestListenUnixRefusesWhatIsInTheWay(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file.sock")
	mustWrite(t, file, "precious", 0o600)
	_, err := ListenUnix(file, 0o600)
	wantReason(t, err, "path_untrusted")
	_, err = ListenUnix(symlink(t, file, dir, "link.sock"), 0o600)
	wantReason(t, err, "path_untrusted")
	_, err = ListenUnix(filepath.Join(mkdir(t, 0o777, dir, "wide"), "api.sock"), 0o600)
	wantReason(t, err, "path_untrusted")
	_, err = ListenUnix(filepath.Join(dir, "none", "api.sock"), 0o600)
	wantReason(t, err, "path_missing")
	if mustRead(t, file) != "precious" || len(names(t, dir)) != 3 {
		t.Errorf("something changed: %v", names(t, dir))
	}
}

func TestSocketPathLimitCountsTheTemporaryName(t *testing.T) {
	dir := t.TempDir()
	pad := maxSocketPath - bindSuffix - len(dir) - 1
	if pad <= 0 {
		t.Fatalf("temporary directory %s is too deep for this test", dir)
	}
	fits := filepath.Join(dir, strings.Repeat("s", pad))
	roundTrip(t, listen(t, fits, 0o600), fits)
	_, err := ListenUnix(fits+"s", 0o600)
	wantReason(t, err, "socket_path_too_long")
	if !strings.Contains(fault.SafeText(err), "102") {
		t.Errorf("no limit in %v", err)
	}
	if _, err := os.Lstat(fits + "s"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("something was made")
	}
}

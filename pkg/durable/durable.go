// Package durable writes files that survive a power cut, and decides which
// places on the disk may be trusted.
//
// It owns: the one way in which Assay replaces a file (WriteFile), locks a
// directory (LockDir), makes one (MkdirPrivate) and puts a Unix socket in
// place (ListenUnix), and the rules for paths:
//
//   - What we write (CheckWritable): every directory on the way belongs to
//     root or to us, and nobody but root, us and groups of ours can write to
//     it. The last element is no symbolic link and obeys the same rule.
//   - What we only read (CheckReadable): the target belongs to root or to us
//     and strangers can't write to it. Symbolic links are followed, because
//     Kubernetes builds its Secret volumes of them.
//   - What is secret (ReadSecret): as what we read, and strangers have no
//     access at all; a group of ours may read and nothing else.
//
// Sticky directories of root's, such as /tmp, may stand on the way to what we
// write, though anybody can make files in them: nobody can rename or remove
// what is ours there, and each element below is checked like any other. None
// of Assay's default paths leads through one, so a path that does was named by
// somebody in the configuration, which is what the exception asks for.
//
// It trusts the kernel and root. Because nobody else can change a checked
// path, checking first and using later is safe.
package durable

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// WriteFile replaces the file at path by one with these bytes and exactly this
// mode, whatever the umask. After a crash at any moment the path has the old
// content or the new one, whole; after return it has the new one for good.
//
// The path must pass CheckWritable. The steps are: open a new file next to it
// (O_EXCL, O_NOFOLLOW), fchmod, write, fsync, close, rename, fsync of the
// directory. A crash may leave the new file under its temporary name, which
// starts with a dot and ends in .tmp; Sweep removes it.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
	temp, err := writeTemp(path, perm, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
	if err != nil {
		return err
	}
	if err := Rename(temp, path); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return nil
}

// CreateFile makes a file of what write writes, with exactly this mode. It
// replaces nothing: a path that exists is fault.Exists with reason file_exists.
// After a crash at any moment, or an error, the path has the whole content or
// does not exist. The path must pass CheckWritable.
func CreateFile(path string, perm fs.FileMode, write func(io.Writer) error) error {
	exists := fault.New(fault.Exists, "file_exists", path+" is there already: choose another name")
	if _, err := os.Lstat(path); err == nil {
		return exists // before the work, not only after it
	}
	temp, err := writeTemp(path, perm, write)
	if err != nil {
		return err
	}
	err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) { // not every network file system can
		err = os.Link(temp, path)
		_ = os.Remove(temp)
	}
	if err == nil {
		return SyncDir(dirOf(path))
	}
	_ = os.Remove(temp)
	if errors.Is(err, fs.ErrExist) {
		return exists
	}
	return diskError("create", path, err)
}

// writeTemp writes a file next to path, makes it durable and returns its name.
// What write returns is returned as it is.
func writeTemp(path string, perm fs.FileMode, write func(io.Writer) error) (_ string, err error) {
	if err := CheckWritable(path); err != nil {
		return "", err
	}
	temp := tempName(path)
	f, err := createNew(temp, perm)
	if err != nil {
		return "", diskError("create", path, err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(temp)
		}
	}()
	out := &diskWriter{file: f, path: path}
	if err := write(out); err != nil {
		return "", err
	}
	if err := f.Sync(); err != nil {
		return "", diskError("sync", path, err)
	}
	if err := f.Close(); err != nil {
		return "", diskError("close", path, err)
	}
	return temp, nil
}

// diskWriter says of which file an error of writing is.
type diskWriter struct {
	file *os.File
	path string
}

func (w *diskWriter) Write(p []byte) (int, error) {
	n, err := w.file.Write(p)
	if err != nil {
		err = diskError("write", w.path, err)
	}
	return n, err
}

// Sweep removes what crashes in WriteFile(path, ...) left behind. The directory
// is checked, and nobody else writes path meanwhile.
func Sweep(path string) error {
	dir, base := dirOf(path), filepath.Base(path)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return diskError("list", dir, err)
	}
	for _, e := range entries {
		name, ours := strings.CutPrefix(e.Name(), "."+base+".")
		random, temp := strings.CutSuffix(name, tempSuffix)
		if _, err := hex.DecodeString(random); !ours || !temp || err != nil || len(random) != 2*tempRandom || !e.Type().IsRegular() {
			continue
		}
		left := filepath.Join(dir, e.Name())
		if err := os.Remove(left); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return diskError("remove", left, err)
		}
	}
	return nil
}

// Rename moves a synced file into place, within one directory, and makes the
// move durable.
func Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return diskError("rename", to, err)
	}
	return SyncDir(dirOf(to))
}

// SyncDir makes the names in a directory durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return diskError("open", dir, err)
	}
	err = d.Sync()
	if closeErr := d.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return diskError("sync", dir, err)
	}
	return nil
}

// createNew makes a file that did not exist and that is not reached through a
// link, with exactly this mode.
func createNew(path string, perm fs.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, perm.Perm())
	if err != nil {
		return nil, err
	}
	// The umask took bits away; the descriptor is ours alone until the rename.
	if err := f.Chmod(perm.Perm()); err != nil {
		_ = f.Close()
		_ = os.Remove(path)
		return nil, err
	}
	return f, nil
}

const (
	tempRandom = 8 // bytes
	tempSuffix = ".tmp"
)

// tempName returns a name in path's directory that nobody can plant ahead.
func tempName(path string) string {
	dir, base := filepath.Split(path)
	return dir + "." + base + "." + randomHex(tempRandom) + tempSuffix
}

// dirOf is filepath.Dir without its textual removal of "..", which means
// something else after a symbolic link.
func dirOf(path string) string {
	dir, _ := filepath.Split(path)
	if dir == "" {
		return "."
	}
	return dir
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b)
}

// diskError puts a kind on the errors that a user can do something about.
func diskError(verb, path string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fault.Wrap(fault.Exhausted, err, "disk_full", "no space left for "+path+": make room on its file system")
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return fault.Wrap(fault.Precondition, err, "path_missing", path+" does not exist, or its directory doesn't: make it, or correct the configuration")
	case errors.Is(err, fs.ErrPermission):
		return fault.Wrap(fault.Denied, err, "path_denied", "no permission for "+path+": change its owner or mode, or run as another user")
	case errors.Is(err, syscall.EROFS):
		return fault.Wrap(fault.Precondition, err, "path_read_only", path+" is on a read-only file system: choose another place")
	}
	return fmt.Errorf("%s %s: %w", verb, path, err)
}

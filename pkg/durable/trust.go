package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// maxLinks is the kernel's own limit of symbolic links in one path.
const maxLinks = 40

// CheckWritable says whether path is a place that we may write to, by the
// rules in the package comment. The last element need not exist; the
// directories on the way must. The error's reason is path_untrusted, its text
// names the offending element and how to mend it.
func CheckWritable(path string) error {
	me := self()
	final, err := me.checkParents(path)
	if err != nil {
		return err
	}
	info, err := os.Lstat(final)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return diskError("look at", final, err)
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return untrusted(final, "is a symbolic link: replace it by what it points to, or configure that path")
	}
	if info.Mode().Type() == fs.ModeSocket {
		// To write to a socket is to connect to it: that others may is its
		// purpose. What counts is whose it is.
		return me.checkOwner(final, info)
	}
	return me.checkOwnAndWrite(final, info, ofPath(final))
}

// CheckReadable says whether the content at path, links followed, was put
// there by root or by us.
func CheckReadable(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return diskError("look at", path, err)
	}
	return self().checkOwnAndWrite(path, info, ofPath(path))
}

// ReadTrusted returns the content of a regular file of at most max bytes that
// nobody can write but root and us, links followed. Others may read it.
func ReadTrusted(path string, max int64) ([]byte, error) {
	return readChecked(path, max, func(fs.FileInfo, attribute) error { return nil })
}

// ReadSecret returns the content of a regular file of at most max bytes that
// nobody can read but root, us and, at most, a group of ours.
func ReadSecret(path string, max int64) ([]byte, error) {
	return readChecked(path, max, func(info fs.FileInfo, get attribute) error {
		strangers, groups, err := self().access(info, get)
		if err != nil {
			return err
		}
		if strangers != 0 || groups&^accessRead != 0 {
			return untrusted(path, fmt.Sprintf("is a secret, but its mode %04o gives access to others: chmod 0600 %s", info.Mode().Perm(), path))
		}
		return nil
	})
}

// readChecked reads a file of ours that passes check.
func readChecked(path string, max int64, check func(fs.FileInfo, attribute) error) ([]byte, error) {
	// O_NONBLOCK: opening a named pipe must not wait for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, diskError("open", path, err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat() // of what was opened, not of what the name means by now
	if err != nil {
		return nil, diskError("look at", path, err)
	}
	if !info.Mode().IsRegular() {
		return nil, untrusted(path, "is not a regular file: put the content into one")
	}
	if err := self().checkOwnAndWrite(path, info, ofFile(f)); err != nil {
		return nil, err
	}
	if err := check(info, ofFile(f)); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, diskError("read", path, err)
	}
	if int64(len(data)) > max {
		return nil, fault.Newf(fault.Invalid, "file_too_large", "%s has more than %d bytes: it is not the file that is meant", path, max)
	}
	return data, nil
}

// MkdirPrivate makes the directory and those above it that are missing, each
// with exactly this mode, and checks by the rules for what we write. The mode
// of a directory that exists is left alone.
func MkdirPrivate(dir string, perm fs.FileMode) error {
	dir, err := absolute(dir)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := makeDir(dir, perm); err != nil {
			return err
		}
	}
	if err := CheckWritable(dir); err != nil {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return diskError("look at", dir, err)
	}
	if !info.IsDir() {
		return untrusted(dir, "is not a directory: remove it, or configure another path")
	}
	return nil
}

// makeDir makes one missing directory after those above it.
func makeDir(dir string, perm fs.FileMode) error {
	parent := dirOf(strings.TrimRight(dir, "/"))
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
		if err := makeDir(parent, perm); err != nil {
			return err
		}
	}
	if err := CheckWritable(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, perm.Perm()); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil // somebody was faster: the caller checks what is there
		}
		return diskError("make", dir, err)
	}
	if err := os.Chmod(dir, perm.Perm()); err != nil { // the umask took bits away
		return diskError("set mode of", dir, err)
	}
	return SyncDir(parent)
}

// identity is who "we" are.
type identity struct {
	uid  uint32
	gids []uint32
}

func self() identity {
	me := identity{uid: uint32(os.Geteuid()), gids: []uint32{uint32(os.Getegid())}}
	groups, err := os.Getgroups()
	if err != nil {
		return me // fewer groups: stricter
	}
	for _, g := range groups {
		me.gids = append(me.gids, uint32(g))
	}
	return me
}

// checkParents walks path as the kernel would, checks every directory and link
// on the way, and returns the physical path of the last element.
func (me identity) checkParents(path string) (string, error) {
	path, err := absolute(path)
	if err != nil {
		return "", err
	}
	at, todo, links := "/", elements(path), 0
	if err := me.checkDir(at); err != nil || len(todo) == 0 {
		return at, err
	}
	for len(todo) > 1 {
		name := todo[0]
		todo = todo[1:]
		if name == ".." {
			at = filepath.Dir(at)
			continue
		}
		next := filepath.Join(at, name)
		info, err := os.Lstat(next)
		if err != nil {
			return "", diskError("look at", next, err)
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			if err := me.checkDir(next); err != nil {
				return "", err
			}
			at = next
			continue
		}
		// In a sticky directory a link may be anybody's.
		if err := me.checkOwner(next, info); err != nil {
			return "", err
		}
		if links++; links > maxLinks {
			return "", untrusted(path, "leads through too many symbolic links: configure the path that is meant")
		}
		target, err := os.Readlink(next)
		if err != nil {
			return "", diskError("read link", next, err)
		}
		if filepath.IsAbs(target) {
			at = "/"
		}
		todo = append(elements(target), todo...)
	}
	if todo[0] == ".." {
		return filepath.Dir(at), nil
	}
	return filepath.Join(at, todo[0]), nil
}

// checkDir checks a directory on the way to something that we write.
func (me identity) checkDir(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return diskError("look at", dir, err)
	}
	if !info.IsDir() {
		return diskError("look at", dir, syscall.ENOTDIR)
	}
	if info.Mode()&fs.ModeSticky != 0 && owner(info) == 0 {
		return nil
	}
	return me.checkOwnAndWrite(dir, info, ofPath(dir))
}

func (me identity) checkOwnAndWrite(path string, info fs.FileInfo, get attribute) error {
	if err := me.checkOwner(path, info); err != nil {
		return err
	}
	strangers, _, err := me.access(info, get)
	if err != nil {
		return err
	}
	if strangers&accessWrite != 0 {
		return untrusted(path, fmt.Sprintf("can be written by others (mode %04o): chmod go-w %s", info.Mode().Perm(), path))
	}
	return nil
}

func (me identity) checkOwner(path string, info fs.FileInfo) error {
	if uid := owner(info); uid != 0 && uid != me.uid {
		return untrusted(path, fmt.Sprintf("belongs to uid %d, not to root or to uid %d: chown it, or configure another path", uid, me.uid))
	}
	return nil
}

func (me identity) isMyGroup(gid uint32) bool { return slices.Contains(me.gids, gid) }

func owner(info fs.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }

// absolute is filepath.Abs without its textual removal of "..", which means
// something else after a symbolic link.
func absolute(path string) (string, error) {
	if filepath.IsAbs(path) {
		return path, nil
	}
	if path == "" {
		return "", fault.New(fault.Precondition, "path_missing", "a path is empty: set it in the configuration")
	}
	wd, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find working directory: %w", err)
	}
	return wd + "/" + path, nil
}

func elements(path string) []string {
	return slices.DeleteFunc(strings.Split(path, "/"), func(e string) bool { return e == "" || e == "." })
}

func untrusted(path, text string) error {
	return fault.New(fault.Precondition, "path_untrusted", path+" "+text)
}

package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// Key, chain and roots belong together, but a program reads them one by one.
// So each set of files is a directory of its own, and all stable names lead
// through one link that is replaced in one step, as in a Kubernetes Secret
// volume:
//
//	DIR/svid.pem               -> .assay/current/svid.pem
//	DIR/.assay/current         -> set-4QX...
//	DIR/.assay/set-4QX.../     svid.pem svid_key.pem bundle.pem
//	DIR/.assay/lock            held by the one program that writes here
//
// A reader that wants to be sure of one set across a change resolves
// .assay/current once and reads below it: the set before the current one stays.
const (
	innerDir    = ".assay"
	currentLink = "current"
	setPrefix   = "set-"
	tempSuffix  = ".tmp"
)

// file is one file of a set.
type file struct {
	name string
	data []byte
	perm fs.FileMode
}

// output is a directory that this process writes sets of files to.
type output struct {
	dir    string // absolute
	inner  string
	unlock func() error
}

// openOutput takes a directory for this process, making it with mode 0700 if
// it is missing.
func openOutput(dir string) (*output, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("find directory: %w", err)
	}
	if err := durable.MkdirPrivate(abs, 0o700); err != nil {
		return nil, err
	}
	inner := filepath.Join(abs, innerDir)
	// Open to those whom the outer directory lets in: only keys are secret,
	// and their files say so.
	if err := durable.MkdirPrivate(inner, 0o755); err != nil {
		return nil, err
	}
	unlock, err := durable.LockDir(inner)
	if err != nil {
		return nil, err
	}
	return &output{dir: abs, inner: inner, unlock: unlock}, nil
}

func (o *output) close() { _ = o.unlock() }

// publish replaces the whole set. A crash at any moment leaves the old set or
// the new one under the stable names, never a mixture; what it leaves behind
// besides is swept by the next call.
func (o *output) publish(files []file) error {
	set, err := o.writeSet(files)
	if err != nil {
		return err
	}
	if err := o.link(files); err != nil { // new names lead nowhere until the switch
		o.discard(set)
		return err
	}
	before, err := o.switchTo(set)
	if err != nil {
		o.discard(set)
		return err
	}
	return o.sweep(files, set, before)
}

// discard removes a set that did not become the current one, so that tries on a
// full disk don't pile up.
func (o *output) discard(set string) {
	current, err := os.Readlink(filepath.Join(o.inner, currentLink))
	if current == set || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return
	}
	_ = os.RemoveAll(filepath.Join(o.inner, set))
}

// writeSet writes the files into a new directory and returns its name.
func (o *output) writeSet(files []file) (string, error) {
	set := setPrefix + rand.Text()
	path := filepath.Join(o.inner, set)
	if err := durable.MkdirPrivate(path, 0o755); err != nil {
		return "", err
	}
	for _, f := range files {
		if err := durable.WriteFile(filepath.Join(path, f.name), f.data, f.perm); err != nil {
			o.discard(set)
			return "", err
		}
	}
	return set, nil
}

// link makes each stable name lead through the current link.
func (o *output) link(files []file) error {
	for _, f := range files {
		target := filepath.Join(innerDir, currentLink, f.name)
		path := filepath.Join(o.dir, f.name)
		if have, err := os.Readlink(path); err == nil && have == target {
			continue
		}
		if err := replaceLink(target, path); err != nil {
			return err
		}
	}
	return nil
}

// switchTo makes a set the current one and returns the one before.
func (o *output) switchTo(set string) (before string, err error) {
	path := filepath.Join(o.inner, currentLink)
	before, err = os.Readlink(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", diskFault("read link", path, err)
	}
	return before, replaceLink(set, path)
}

// replaceLink puts a symbolic link in place of whatever file has its name.
func replaceLink(target, path string) error {
	temp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+rand.Text()+tempSuffix)
	if err := os.Symlink(target, temp); err != nil {
		return diskFault("make link", path, err)
	}
	if err := durable.Rename(temp, path); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return nil
}

// sweep removes what no name needs any more: sets but the current one and the
// one before, stable names of files that the set no longer has, and leftovers
// of a crash.
func (o *output) sweep(files []file, keep ...string) error {
	inner, err := os.ReadDir(o.inner)
	if err != nil {
		return diskFault("list", o.inner, err)
	}
	for _, entry := range inner {
		name := entry.Name()
		old := strings.HasPrefix(name, setPrefix) && !slices.Contains(keep, name)
		if old || isLeftover(name, currentLink) {
			if err := os.RemoveAll(filepath.Join(o.inner, name)); err != nil {
				return diskFault("remove", filepath.Join(o.inner, name), err)
			}
		}
	}
	return o.sweepNames(files)
}

func (o *output) sweepNames(files []file) error {
	names := make([]string, 0, len(files))
	for _, f := range files {
		names = append(names, f.name)
	}
	outer, err := os.ReadDir(o.dir)
	if err != nil {
		return diskFault("list", o.dir, err)
	}
	for _, entry := range outer {
		path := filepath.Join(o.dir, entry.Name())
		target, err := os.Readlink(path)
		if err != nil || filepath.Dir(target) != filepath.Join(innerDir, currentLink) {
			continue // not a link of ours
		}
		if slices.Contains(names, entry.Name()) {
			continue
		}
		if err := os.Remove(path); err != nil {
			return diskFault("remove", path, err)
		}
	}
	return durable.SyncDir(o.dir)
}

// isLeftover says whether name is a temporary name that replaceLink makes for
// base.
func isLeftover(name, base string) bool {
	return strings.HasPrefix(name, "."+base+".") && strings.HasSuffix(name, tempSuffix)
}

// diskFault says what a person can do about a failed file operation.
func diskFault(verb, path string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fault.New(fault.Exhausted, "disk_full", "no space left for "+path+": make room on its file system")
	case errors.Is(err, fs.ErrPermission):
		return fault.New(fault.Denied, "path_denied", "no permission to "+verb+" "+path)
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.Precondition, "path_missing", path+" does not exist")
	}
	return fmt.Errorf("%s %s: %w", verb, path, err)
}

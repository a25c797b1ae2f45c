package durable

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Permission bits of one class.
const (
	accessRead  = 4
	accessWrite = 2
)

// access returns what strangers may do with a file, and what groups of ours
// may. Strangers are all but root, the owner, us and our groups; the owner is
// checkOwner's business.
//
// With a POSIX access list the group bits of the mode are only the upper bound
// of several grants. The list matters in practice: systemd hands credentials
// to a service as root's files with a list that names the service's user.
func (me identity) access(info fs.FileInfo, get attribute) (strangers, groups uint32, err error) {
	st := info.Sys().(*syscall.Stat_t)
	strangers = st.Mode & 7
	group := st.Mode >> 3 & 7
	if group == 0 {
		return strangers, 0, nil
	}
	list, err := readACL(get)
	if err != nil {
		return 0, 0, fmt.Errorf("read access list of %s: %w", info.Name(), err)
	}
	if list == nil {
		list = []aclEntry{{tag: aclGroupOwner, perm: group}}
	}
	for _, e := range list {
		perm := e.perm & group
		switch {
		case e.tag == aclUser && (e.id == 0 || e.id == me.uid):
		case e.tag == aclGroupOwner && me.isMyGroup(st.Gid), e.tag == aclGroup && me.isMyGroup(e.id):
			groups |= perm
		case e.tag == aclUser, e.tag == aclGroupOwner, e.tag == aclGroup:
			strangers |= perm
		}
	}
	return strangers, groups, nil
}

// Tags of the entries that matter here; see acl(5) and the kernel's
// posix_acl_xattr.h.
const (
	aclUser       = 0x02
	aclGroupOwner = 0x04
	aclGroup      = 0x08

	aclVersion   = 2
	aclAttribute = "system.posix_acl_access"
)

type aclEntry struct {
	tag  uint16
	perm uint32
	id   uint32
}

// attribute reads an extended attribute into a buffer, like getxattr(2).
type attribute func(name string, buf []byte) (int, error)

func ofPath(path string) attribute {
	return func(name string, buf []byte) (int, error) { return unix.Getxattr(path, name, buf) }
}

func ofFile(f *os.File) attribute {
	return func(name string, buf []byte) (int, error) { return unix.Fgetxattr(int(f.Fd()), name, buf) }
}

// readACL returns the access list of a file, nil if it has none.
func readACL(get attribute) ([]aclEntry, error) {
	buf := make([]byte, 1024)
	n, err := get(aclAttribute, buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 64<<10) // no attribute is larger
		n, err = get(aclAttribute, buf)
	}
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseACL(buf[:n])
}

func parseACL(b []byte) ([]aclEntry, error) {
	if len(b) < 4 || (len(b)-4)%8 != 0 || binary.LittleEndian.Uint32(b) != aclVersion {
		return nil, errors.New("unknown format of access list")
	}
	list := make([]aclEntry, 0, (len(b)-4)/8)
	for b = b[4:]; len(b) > 0; b = b[8:] {
		list = append(list, aclEntry{
			tag:  binary.LittleEndian.Uint16(b),
			perm: uint32(binary.LittleEndian.Uint16(b[2:])),
			id:   binary.LittleEndian.Uint32(b[4:]),
		})
	}
	return list, nil
}

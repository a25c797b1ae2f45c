package durable

import (
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// stranger makes path belong to somebody else: by chown where the tests run as
// root, else by looking at it with the eyes of another user.
func stranger(t *testing.T, path string) identity {
	t.Helper()
	if os.Geteuid() != 0 {
		return identity{uid: uint32(os.Geteuid()) + 1}
	}
	if err := os.Lchown(path, 4242, 4242); err != nil {
		t.Fatal(err)
	}
	return self()
}

func mkdir(t *testing.T, mode fs.FileMode, elem ...string) string {
	t.Helper()
	dir := filepath.Join(elem...)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, mode); err != nil {
		t.Fatal(err)
	}
	return dir
}

func symlink(t *testing.T, target string, elem ...string) string {
	t.Helper()
	link := filepath.Join(elem...)
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	return link
}

// NEG-44
func TestCheckWritable(t *testing.T) {
	root := t.TempDir()
	good := mkdir(t, 0o750, root, "good")
	wide := mkdir(t, 0o777, root, "wide")
	below := mkdir(t, 0o700, wide, "below")
	stickyOurs := mkdir(t, 0o777|fs.ModeSticky, root, "sticky")
	mustWrite(t, filepath.Join(good, "file"), "x", 0o600)
	mustWrite(t, filepath.Join(good, "readable"), "x", 0o644)
	mustWrite(t, filepath.Join(good, "loose"), "x", 0o602)
	symlink(t, "file", good, "link")
	symlink(t, "nothing", good, "dangling")
	symlink(t, good, root, "to_good")
	symlink(t, "wide", root, "to_wide")
	symlink(t, "loop", root, "loop")
	inner := mkdir(t, 0o700, good, "inner")
	symlink(t, inner, root, "to_inner")

	const ok = ""
	cases := []struct{ name, path, reason string }{
		{"new file", good + "/new", ok},
		{"existing file", good + "/file", ok},
		{"readable for all is not written by all", good + "/readable", ok},
		{"writable for all", good + "/loose", "path_untrusted"},
		{"directory itself", good, ok},
		{"trailing slash", good + "/", ok},
		{"wide directory itself", wide, "path_untrusted"},
		{"file in a wide directory", wide + "/new", "path_untrusted"},
		{"safe directory below a wide one", below + "/new", "path_untrusted"},
		{"last element is a link", good + "/link", "path_untrusted"},
		{"last element is a dangling link", good + "/dangling", "path_untrusted"},
		{"last element is a link with a slash", root + "/to_good/", "path_untrusted"},
		{"link on the way to a good place", root + "/to_good/new", ok},
		{"link on the way to a wide place", root + "/to_wide/new", "path_untrusted"},
		{"links in circles", root + "/loop/new", "path_untrusted"},
		{"missing directory", root + "/missing/new", "path_missing"},
		{"file as directory", good + "/file/new", "path_missing"},
		{"dot dot goes up where the kernel does", root + "/to_inner/../file", ok},
		{"dot dot at the end", inner + "/..", ok},
		{"dot dot through a wide directory", wide + "/../good/new", "path_untrusted"},
		{"empty path", "", "path_missing"},
		{"the root directory", "/", ok},
	}
	if os.Geteuid() == 0 { // the exception is for root's directories
		cases = append(cases, struct{ name, path, reason string }{"sticky", stickyOurs + "/new", ok})
	} else {
		cases = append(cases, struct{ name, path, reason string }{"sticky", stickyOurs + "/new", "path_untrusted"})
	}
	for _, c := range cases {
		err := CheckWritable(c.path)
		switch {
		case c.reason == ok && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.reason != ok && (err == nil || fault.ReasonOf(err) != c.reason):
			t.Errorf("%s: got %v, want %s", c.name, err, c.reason)
		}
	}
	t.Chdir(good)
	if err := CheckWritable("new"); err != nil {
		t.Errorf("relative path: %v", err)
	}
	if err := CheckWritable("../wide/new"); fault.ReasonOf(err) != "path_untrusted" {
		t.Errorf("relative path into a wide directory: %v", err)
	}
}

// NEG-44: the message names the path and how to mend it.
func TestRefusalNamesThePathAndTheMend(t *testing.T) {
	wide := mkdir(t, 0o777, t.TempDir(), "wide")
	text := fault.SafeText(CheckWritable(wide + "/key"))
	if !strings.HasPrefix(text, wide+" ") || !strings.Contains(text, "chmod go-w "+wide) {
		t.Errorf("got %q", text)
	}
}

// NEG-44: things of another uid, and links of another uid in sticky places.
func TestForeignOwnersAreRefused(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	mustWrite(t, file, "x", 0o600)
	sub := mkdir(t, 0o700, dir, "sub")
	link := symlink(t, sub, dir, "link")
	for _, path := range []string{file, sub, link} {
		me := stranger(t, path)
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		wantReason(t, me.checkOwner(path, info), "path_untrusted")
	}
	me := stranger(t, sub)
	_, err := me.checkParents(filepath.Join(sub, "new"))
	wantReason(t, err, "path_untrusted")
	_, err = me.checkParents(filepath.Join(link, "new"))
	wantReason(t, err, "path_untrusted")
	if os.Geteuid() == 0 { // the public functions look with our own eyes
		wantReason(t, CheckWritable(file), "path_untrusted")
		wantReason(t, CheckReadable(file), "path_untrusted")
		wantReason(t, MkdirPrivate(sub, 0o700), "path_untrusted")
		_, err = ReadSecret(file, 10)
		wantReason(t, err, "path_untrusted")
	}
}

func TestOnlyOurGroupsMayWrite(t *testing.T) {
	dir := mkdir(t, 0o770, t.TempDir(), "team")
	info, err := os.Lstat(dir)
	if err != nil {
		t.Fatal(err)
	}
	gid := info.Sys().(*syscall.Stat_t).Gid
	ours := identity{uid: uint32(os.Geteuid()), gids: []uint32{gid + 7, gid}}
	if err := ours.checkDir(dir); err != nil {
		t.Errorf("group of ours: %v", err)
	}
	theirs := identity{uid: uint32(os.Geteuid()), gids: []uint32{gid + 7}}
	wantReason(t, theirs.checkDir(dir), "path_untrusted")
}

func TestCheckReadableFollowsLinks(t *testing.T) {
	// The shape of a Kubernetes Secret volume, whose directory anybody may
	// write to by its mode.
	vol := mkdir(t, 0o777|fs.ModeSticky, t.TempDir(), "secret")
	mkdir(t, 0o755, vol, "..2026_11_23")
	mustWrite(t, filepath.Join(vol, "..2026_11_23", "token"), "x", 0o644)
	symlink(t, "..2026_11_23", vol, "..data")
	token := symlink(t, "..data/token", vol, "token")
	if err := CheckReadable(token); err != nil {
		t.Errorf("secret volume: %v", err)
	}
	if err := os.Chmod(filepath.Join(vol, "..data", "token"), 0o646); err != nil {
		t.Fatal(err)
	}
	wantReason(t, CheckReadable(token), "path_untrusted")
	wantReason(t, CheckReadable(filepath.Join(vol, "none")), "path_missing")
}

// NEG-44: secret with mode 0644, and all the others.
func TestReadSecretDemandsItsMode(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "seal.key")
	for mode := fs.FileMode(0); mode <= 0o777; mode++ {
		mustWrite(t, path, "secret", mode)
		got, err := ReadSecret(path, 6)
		switch {
		case mode&0o400 == 0 && os.Geteuid() != 0:
			if err == nil {
				t.Errorf("%04o: read without permission", mode)
			}
		case mode&0o037 != 0:
			if fault.ReasonOf(err) != "path_untrusted" || got != nil {
				t.Errorf("%04o: got %q, %v", mode, got, err)
			}
		case err != nil || string(got) != "secret":
			t.Errorf("%04o: got %q, %v", mode, got, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestReadSecretRefusesWhatIsNoSuchFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "seal.key")
	mustWrite(t, path, "q~xw~zk", 0o600)
	_, err := ReadSecret(path, 6)
	wantReason(t, err, "file_too_large")
	if strings.Contains(err.Error(), "q~x") {
		t.Error("the error shows the secret")
	}
	_, err = ReadSecret(dir, 6)
	wantReason(t, err, "path_untrusted")
	_, err = ReadSecret(filepath.Join(dir, "none"), 6)
	wantReason(t, err, "path_missing")
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = ReadSecret(pipe, 6) // must not wait for a writer either
	wantReason(t, err, "path_untrusted")
	if got, err := ReadSecret(symlink(t, path, dir, "link"), 7); err != nil || string(got) != "q~xw~zk" {
		t.Errorf("through a link: %q, %v", got, err)
	}
}

func TestMkdirPrivateMakesTheWayWithExactModes(t *testing.T) {
	root := t.TempDir()
	withUmask(0o077, func() {
		if err := MkdirPrivate(filepath.Join(root, "run", "public"), 0o755); err != nil {
			t.Fatal(err)
		}
	})
	for _, dir := range []string{"run", "run/public"} {
		info, err := os.Stat(filepath.Join(root, dir))
		if err != nil || info.Mode().Perm() != 0o755 {
			t.Errorf("%s: %v, %v", dir, info, err)
		}
	}
	kept := mkdir(t, 0o711, root, "kept")
	if err := MkdirPrivate(kept, 0o700); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(kept); err != nil || info.Mode().Perm() != 0o711 {
		t.Errorf("mode of a directory that existed was changed: %v, %v", info, err)
	}
	mustWrite(t, filepath.Join(root, "file"), "x", 0o600)
	wantReason(t, MkdirPrivate(filepath.Join(root, "file"), 0o700), "path_untrusted")
	wantReason(t, MkdirPrivate(symlink(t, kept, root, "link"), 0o700), "path_untrusted")
	wide := mkdir(t, 0o777, root, "wide")
	wantReason(t, MkdirPrivate(wide, 0o700), "path_untrusted")
	wantReason(t, MkdirPrivate(filepath.Join(wide, "a", "b"), 0o700), "path_untrusted")
	if got := names(t, wide); len(got) != 0 {
		t.Errorf("made %v in an untrusted directory", got)
	}
}

// acl builds the attribute that the kernel keeps, from its public format.
func acl(entries ...aclEntry) []byte {
	b := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, uint16(e.perm))
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// The group bits of a file with an access list are a mask, not a grant: a
// credential that systemd gives to a service must be readable, one that names
// anybody else must not.
func TestAccessListsAreLookedThrough(t *testing.T) {
	path := filepath.Join(t.TempDir(), "credential")
	mustWrite(t, path, "x", 0o440)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	gid := info.Sys().(*syscall.Stat_t).Gid
	me := identity{uid: 1000, gids: []uint32{gid + 1}}
	base := []aclEntry{{tag: 1, perm: 4}, {tag: aclGroupOwner}, {tag: 0x10, perm: 4}, {tag: 0x20}}
	cases := []struct {
		name              string
		list              []byte
		strangers, groups uint32
	}{
		{"no list", nil, 4, 0},
		{"names us", acl(append(base, aclEntry{aclUser, 4, 1000})...), 0, 0},
		{"names root", acl(append(base, aclEntry{aclUser, 4, 0})...), 0, 0},
		{"names somebody", acl(append(base, aclEntry{aclUser, 4, 1001})...), 4, 0},
		{"mask cuts", acl(append(base, aclEntry{aclUser, 6, 1001})...), 4, 0},
		{"group of ours", acl(append(base, aclEntry{aclGroup, 4, gid + 1})...), 0, 4},
		{"other group", acl(append(base, aclEntry{aclGroup, 4, gid + 2})...), 4, 0},
	}
	for _, c := range cases {
		get := func(_ string, buf []byte) (int, error) {
			if c.list == nil {
				return 0, unix.ENODATA
			}
			return copy(buf, c.list), nil
		}
		strangers, groups, err := me.access(info, get)
		if err != nil || strangers != c.strangers || groups != c.groups {
			t.Errorf("%s: strangers %o, groups %o, %v; want %o, %o", c.name, strangers, groups, err, c.strangers, c.groups)
		}
	}
	for _, bad := range [][]byte{{}, {2, 0, 0}, {1, 0, 0, 0}, append(acl(), 1)} {
		if _, err := parseACL(bad); err == nil {
			t.Errorf("%v was parsed", bad)
		}
	}
	long := acl(make([]aclEntry, 500)...)
	list, err := readACL(func(_ string, buf []byte) (int, error) {
		if len(buf) < len(long) {
			return 0, unix.ERANGE
		}
		return copy(buf, long), nil
	})
	if err != nil || len(list) != 500 {
		t.Errorf("long list: %d entries, %v", len(list), err)
	}
}

// What is read and not secret: others may see it, and nobody may change it.
func TestReadTrustedDemandsThatOthersCantWrite(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ca.pem")
	mustWrite(t, path, "public", 0o644)
	if got, err := ReadTrusted(symlink(t, path, dir, "link"), 6); err != nil || string(got) != "public" {
		t.Errorf("through a link: %q, %v", got, err)
	}
	_, err := ReadTrusted(path, 5)
	wantReason(t, err, "file_too_large")
	for _, mode := range []fs.FileMode{0o646, 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		got, err := ReadTrusted(path, 6)
		wantReason(t, err, "path_untrusted")
		if got != nil {
			t.Errorf("%04o: read %q", mode, got)
		}
	}
	_, err = ReadTrusted(dir, 6)
	wantReason(t, err, "path_untrusted")
	_, err = ReadTrusted(filepath.Join(dir, "none"), 6)
	wantReason(t, err, "path_missing")
}

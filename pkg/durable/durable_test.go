package durable

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func wantReason(t *testing.T, err error, reason string) {
	t.Helper()
	if err == nil || fault.ReasonOf(err) != reason {
		t.Fatalf("got %v, want reason %s", err, reason)
	}
}

func mustWrite(t *testing.T, path, content string, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range list {
		out = append(out, e.Name())
	}
	return out
}

// withUmask runs f under a umask that would spoil modes. The umask belongs to
// the whole process: tests that call this don't run in parallel.
func withUmask(mask int, f func()) {
	old := syscall.Umask(mask)
	defer syscall.Umask(old)
	f()
}

func TestWriteFileReplacesContentAndModeWhateverTheUmask(t *testing.T) {
	for _, mask := range []int{0, 0o022, 0o777} {
		path := filepath.Join(t.TempDir(), "key")
		for _, mode := range []fs.FileMode{0o600, 0o644, 0o640} {
			withUmask(mask, func() {
				if err := WriteFile(path, []byte(mode.String()), mode); err != nil {
					t.Fatal(err)
				}
			})
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if info.Mode() != mode || mustRead(t, path) != mode.String() {
				t.Errorf("umask %o: mode %v, content %q, want %v", mask, info.Mode(), mustRead(t, path), mode)
			}
		}
		if got := names(t, filepath.Dir(path)); len(got) != 1 {
			t.Errorf("left behind: %v", got)
		}
	}
}

// A reader that opened the old file keeps it, one that opens later gets the
// new one: nobody ever sees a mixture.
func TestWriteFileIsAtomicForReaders(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bundle")
	contents := [][]byte{bytes.Repeat([]byte("a"), 64<<10), bytes.Repeat([]byte("b"), 64<<10)}
	if err := WriteFile(path, contents[0], 0o600); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			for range 20 {
				if err := WriteFile(path, contents[w], 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 200 {
		got := []byte(mustRead(t, path))
		if !bytes.Equal(got, contents[0]) && !bytes.Equal(got, contents[1]) {
			t.Fatalf("torn read of %d bytes", len(got))
		}
	}
	wg.Wait()
	if got := names(t, filepath.Dir(path)); len(got) != 1 {
		t.Errorf("left behind: %v", got)
	}
}

// NEG-44: the target of a planted link keeps its bytes.
func TestWriteFileRefusesALinkInItsPlace(t *testing.T) {
	dir := t.TempDir()
	victim, path := filepath.Join(dir, "victim"), filepath.Join(dir, "key")
	mustWrite(t, victim, "precious", 0o600)
	if err := os.Symlink(victim, path); err != nil {
		t.Fatal(err)
	}
	wantReason(t, WriteFile(path, []byte("new"), 0o600), "path_untrusted")
	if mustRead(t, victim) != "precious" {
		t.Error("the target of the link was written")
	}
}

// NEG-44: pre-planted temporary name.
func TestTemporaryFileIsNeverOpenedThroughAPlantedName(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	mustWrite(t, victim, "precious", 0o600)
	link, dangling, file := filepath.Join(dir, "link"), filepath.Join(dir, "dangling"), filepath.Join(dir, "file")
	if err := errors.Join(os.Symlink(victim, link), os.Symlink(filepath.Join(dir, "nothing"), dangling)); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, file, "there", 0o600)
	for _, planted := range []string{link, dangling, file} {
		if f, err := createNew(planted, 0o600); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s was opened: %v, %v", planted, f, err)
		}
	}
	if mustRead(t, victim) != "precious" || len(names(t, dir)) != 4 {
		t.Errorf("something changed: %q, %v", mustRead(t, victim), names(t, dir))
	}
	if a, b := tempName("/x/key"), tempName("/x/key"); a == b || filepath.Dir(a) != "/x" {
		t.Errorf("temporary names can be foreseen: %s, %s", a, b)
	}
}

func TestWriteFileLeavesNothingBehindWhenItFails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	if err := os.Mkdir(path, 0o700); err != nil { // the rename can't replace a directory
		t.Fatal(err)
	}
	if err := WriteFile(path, []byte("x"), 0o600); err == nil {
		t.Fatal("wrote over a directory")
	}
	if got := names(t, dir); len(got) != 1 {
		t.Errorf("left behind: %v", got)
	}
	wantReason(t, WriteFile(filepath.Join(dir, "none", "key"), nil, 0o600), "path_missing")
}

func TestDiskErrorsSayWhatToDo(t *testing.T) {
	cases := map[error]string{
		syscall.ENOSPC: "disk_full", syscall.EDQUOT: "disk_full", syscall.ENOENT: "path_missing",
		syscall.EACCES: "path_denied", syscall.EPERM: "path_denied", syscall.EROFS: "path_read_only",
		syscall.EIO: "internal",
	}
	for cause, reason := range cases {
		err := diskError("write", "/x", &fs.PathError{Op: "write", Path: "/x", Err: cause})
		if fault.ReasonOf(err) != reason || !errors.Is(err, cause) {
			t.Errorf("%v: got %v, want %s", cause, err, reason)
		}
	}
}

func TestLockDirExcludesASecondHolderAndNamesTheFirst(t *testing.T) {
	dir := t.TempDir()
	unlock, err := LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = LockDir(dir)
	wantReason(t, err, "data_dir_locked")
	comm := strings.TrimSpace(mustRead(t, "/proc/self/comm"))
	if text := fault.SafeText(err); !strings.Contains(text, dir) || !strings.Contains(text, comm) {
		t.Errorf("%q names neither %s nor %s", text, dir, comm)
	}
	if err := errors.Join(unlock(), unlock()); err != nil { // twice does no harm
		t.Fatal(err)
	}
	again, err := LockDir(dir)
	if err != nil {
		t.Fatalf("after unlock: %v", err)
	}
	if err := again(); err != nil {
		t.Fatal(err)
	}
}

func TestHolderIsAHintThatNeverFails(t *testing.T) {
	for content, want := range map[string]string{
		"": "another process", "x\n": "another process", "-3": "another process",
		"4194305\n": "another process (pid 4194305, maybe in another container)", // above pid_max
	} {
		path := filepath.Join(t.TempDir(), lockName)
		mustWrite(t, path, content, 0o600)
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := holder(f); got != want {
			t.Errorf("%q: got %q, want %q", content, got, want)
		}
		_ = f.Close()
	}
}

func TestLockDirRefusesALinkAsLockFile(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	mustWrite(t, victim, "precious", 0o600)
	if err := os.Symlink(victim, filepath.Join(dir, lockName)); err != nil {
		t.Fatal(err)
	}
	_, err := LockDir(dir)
	wantReason(t, err, "path_untrusted")
	if mustRead(t, victim) != "precious" {
		t.Error("the target of the link was written")
	}
}

// What a kill in WriteFile leaves behind is swept; what only looks like it is
// not.
func TestSweepRemovesLeftoversOfItsFileAlone(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "keys.json")
	temp := func(base, random string) string { return filepath.Join(dir, "."+base+"."+random+".tmp") }
	keep := []string{
		path, temp("other.json", "0123456789abcdef"), temp("keys.json", "0123456789abcde"), temp("keys.json", "0123456789abcdeg"),
		temp("keys.json", "x.0123456789abcdef"), filepath.Join(dir, ".keys.json.tmp"), filepath.Join(dir, "keys.json.0123456789abcdef.tmp"),
	}
	gone := []string{temp("keys.json", "0123456789abcdef"), filepath.Join(dir, filepath.Base(tempName(path)))}
	for _, file := range append(slices.Clone(keep), gone...) {
		if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	folder := temp("keys.json", "00000000deadbeef")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Sweep(path); err != nil {
		t.Fatal(err)
	}
	for _, file := range append(keep, folder) {
		if _, err := os.Lstat(file); err != nil {
			t.Errorf("%s is gone", file)
		}
	}
	for _, file := range gone {
		if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there", file)
		}
	}
}

func TestCreateFileMakesAWholeNewFileOrNone(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	text := func(s string) func(io.Writer) error {
		return func(w io.Writer) error {
			_, err := io.WriteString(w, s)
			return err
		}
	}
	old := syscall.Umask(0o777)
	err := CreateFile(path, 0o600, text("one"))
	syscall.Umask(old)
	info, serr := os.Stat(path)
	if err != nil || serr != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v, %v", err, serr, info)
	}
	// What is there, a link included, stays, whenever it came.
	ran := false
	err = CreateFile(path, 0o600, func(io.Writer) error { ran = true; return nil })
	if fault.ReasonOf(err) != "file_exists" || ran {
		t.Errorf("existing: %v, written %v", err, ran)
	}
	late := filepath.Join(dir, "late")
	err = CreateFile(late, 0o600, func(io.Writer) error { return os.Symlink("nowhere", late) })
	if fault.ReasonOf(err) != "file_exists" {
		t.Errorf("made meanwhile: %v", err)
	}
	broken := errors.New("broken")
	if err := CreateFile(filepath.Join(dir, "g"), 0o600, func(w io.Writer) error { return errors.Join(text("half")(w), broken) }); !errors.Is(err, broken) {
		t.Errorf("broken: %v", err)
	}
	left, err := os.ReadDir(dir)
	if got, _ := os.ReadFile(path); err != nil || len(left) != 2 || string(got) != "one" {
		t.Errorf("left %v with %q, %v", left, got, err)
	}
}

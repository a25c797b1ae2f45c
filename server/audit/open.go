package audit

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	defaultMaxBytes = 100 << 20
	defaultKeep     = 10
)

// Open opens the log, makes it if there is none, and goes on where it ended:
//  1. check who may write to the path, open the file and lock it;
//  2. find the last whole line, in the newest older file if this one has none;
//  3. continue its number and hash, or refuse a line that can't be read;
//  4. replace what an interrupted write left behind it by a line saying so.
func Open(cfg Config, log *slog.Logger) (*Log, error) {
	switch {
	case cfg.Path == "":
		return nil, fault.New(fault.Precondition, "config_invalid", "audit.path is missing: name a file")
	case cfg.MaxBytes < 0 || cfg.Keep < 0:
		return nil, fault.New(fault.Precondition, "config_invalid", "audit.max_bytes and audit.keep can't be negative: leave them out for 100 MiB and 10 files")
	}
	l := &Log{path: cfg.Path, maxBytes: cfg.MaxBytes, keep: cfg.Keep, build: buildID(), log: log, disk: realDisk(), turn: make(chan struct{}, 1)}
	if l.maxBytes == 0 {
		l.maxBytes = defaultMaxBytes
	}
	if l.keep == 0 {
		l.keep = defaultKeep
	}
	l.rotateAt = l.maxBytes
	if err := durable.CheckWritable(l.path); err != nil {
		return nil, fmt.Errorf("check audit log: %w", err)
	}
	if err := l.open(); err != nil {
		return nil, err
	}
	l.turn <- struct{}{}
	return l, nil
}

func (l *Log) open() (err error) {
	// Not O_APPEND: a repair overwrites in place, and every write says where.
	l.file, err = os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return refused(err, "open audit log")
	}
	defer func() {
		if err != nil {
			_ = l.file.Close() // the error that made us close it is the one to tell
		}
	}()
	info, err := l.file.Stat()
	if err != nil {
		return fmt.Errorf("look at audit log: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o022 != 0 {
		return fault.Newf(fault.Precondition, "path_untrusted", "%s must be a regular file that only its owner writes: chmod 600 it", l.path)
	}
	if err := lock(l.file); err != nil {
		return fault.Wrap(fault.Conflict, err, "audit_in_use", l.path+" is open in another process: stop that one, or configure another path")
	}
	if err := syncDir(l.path); err != nil { // the file may be new, or new since a crash
		return err
	}
	torn, err := l.resume(info.Size())
	if err != nil || torn == 0 {
		return err
	}
	return l.repair(torn)
}

// resume sets the writer's state to the end of the last whole line and returns
// the number of bytes behind it.
func (l *Log) resume(size int64) (torn int64, err error) {
	line, end, err := lastLine(l.file, size)
	if err != nil {
		return 0, corrupt(l.path, err)
	}
	l.size = end
	if end == 0 {
		return size, l.resumeOlder()
	}
	return size - end, l.follow(line, l.path)
}

// resumeOlder goes on from the newest older file: the current one has no line.
func (l *Log) resumeOlder() error {
	numbers, err := rotated(l.path)
	if err != nil || len(numbers) == 0 {
		return err
	}
	path := numbered(l.path, numbers[0])
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return refused(err, "open older audit log")
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("look at older audit log: %w", err)
	}
	line, end, err := lastLine(f, info.Size())
	if err == nil && end != info.Size() {
		err = errors.New("its last line is not finished")
	}
	if err != nil {
		return corrupt(path, err)
	}
	if end == 0 {
		return corrupt(path, errors.New("it is empty"))
	}
	return l.follow(line, path)
}

func (l *Log) follow(line []byte, path string) error {
	at, err := parseLink(line)
	if err == nil && at.seq == 1 && at.prev != (digest{}) {
		err = errNotALine // the first of all follows none
	}
	if err != nil {
		return corrupt(path, err)
	}
	l.seq, l.head, l.reached = at.seq, sha256.Sum256(line), at.revision
	return nil
}

// repair replaces the torn bytes behind the last line by a line that tells of
// them. It overwrites before it cuts, so that a crash in between leaves either
// the torn bytes or the line.
func (l *Log) repair(torn int64) error {
	after := l.seq
	note := Line{
		Origin: Origin{Actor: Actor{Kind: "server"}},
		Action: "audit_repaired",
		Why:    Why{Rule: fmt.Sprintf("torn_line: %d bytes removed behind line %d", torn, after)},
		Result: Result{Code: "ok"},
	}
	body := appendLine(nil, &note)
	seq, head, err := l.chain(&batch{body: body, ends: []int{len(body)}})
	if err != nil {
		return err
	}
	if _, err := l.disk.write(l.file, l.buf, l.size); err != nil {
		return refused(err, "repair audit log")
	}
	end := l.size + int64(len(l.buf))
	if err := l.disk.truncate(l.file, end); err != nil {
		return refused(err, "repair audit log")
	}
	if err := l.disk.sync(l.file); err != nil {
		return refused(err, "repair audit log")
	}
	l.seq, l.head, l.size = seq, head, end
	l.log.LogAttrs(context.Background(), slog.LevelWarn, "audit log ended in an unfinished line: removed it; what it stood for was never answered",
		slog.String("path", l.path), slog.Int64("bytes", torn), slog.Uint64("after_seq", after))
	return nil
}

func corrupt(path string, cause error) error {
	return fault.Wrap(fault.Precondition, cause, "audit_corrupt",
		path+" can't be continued, its last line is damaged: move it and its older files aside and keep them, then start again")
}

// refused turns an error of the system at start into a fault.
func refused(err error, verb string) error {
	switch {
	case noSpace(err):
		return errFull(err)
	case errors.Is(err, os.ErrPermission):
		return fault.Wrap(fault.Denied, err, "audit_not_permitted", "the audit log can't be opened: let this user own the file and its directory")
	case errors.Is(err, unix.ELOOP):
		return fault.Wrap(fault.Precondition, err, "path_untrusted", "the audit log is a symbolic link: name the file itself")
	}
	return fault.Wrap(fault.NotReady, fmt.Errorf("%s: %w", verb, err), "audit_failed", "the audit log can't be opened: see the cause in the log")
}

// buildID names the code that writes the lines.
func buildID() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	id, dirty := info.Main.Version, ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision" && len(s.Value) >= 12:
			id = s.Value[:12]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+dirty"
		}
	}
	return id + dirty
}

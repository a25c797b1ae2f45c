package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// rotate begins a new file. The chain goes on in it. Until the old file is
// renamed a failure only postpones the rotation: a file that is too long is
// better than an act that is not recorded.
func (l *Log) rotate(ctx context.Context) error {
	next, err := create(l.fresh())
	if err != nil {
		l.postpone(ctx, err)
		return nil
	}
	if err := l.shift(); err != nil {
		_ = next.Close() // empty, nothing to lose
		l.postpone(ctx, err)
		return nil
	}
	if err := os.Rename(l.fresh(), l.path); err != nil {
		_ = next.Close()
		if back := os.Rename(numbered(l.path, 1), l.path); back != nil {
			return l.fail(errors.Join(err, back))
		}
		l.postpone(ctx, err)
		return nil
	}
	if err := l.adopt(next); err != nil {
		return err
	}
	l.prune(ctx)
	return nil
}

// succeed begins a new file where the old one is gone from its path.
func (l *Log) succeed() error {
	next, err := create(l.fresh())
	if err == nil {
		if err = os.Rename(l.fresh(), l.path); err == nil {
			return l.adopt(next)
		}
		_ = next.Close()
	}
	if noSpace(err) {
		return l.noSpace(err)
	}
	return fault.Wrap(fault.NotReady, err, "audit_failed", "a new audit log can't be made where the old one was moved away: mend its directory")
}

// adopt goes on in a new file once its name is durable: a synced line in a file
// without a durable name would be lost with the power.
func (l *Log) adopt(next *os.File) error {
	if err := syncDir(l.path); err != nil {
		_ = next.Close()
		return l.fail(err)
	}
	_ = l.file.Close() // all of it is synced
	l.file, l.size, l.rotateAt = next, 0, l.maxBytes
	return nil
}

// postpone goes on in the old file and tries again after another eighth.
func (l *Log) postpone(ctx context.Context, cause error) {
	l.log.LogAttrs(ctx, slog.LevelError, "audit log can't be rotated: the current file grows on",
		slog.String("path", l.path), slog.Int64("bytes", l.size), slog.Any("error", cause))
	l.rotateAt = l.size + max(l.maxBytes/8, int64(len(l.buf)))
}

// fresh is the name under which a new file is made. Such a file is empty: lines
// are written under the final name only.
func (l *Log) fresh() string { return l.path + ".new" }

// shift renames path to path.1, path.1 to path.2 and so on up to the first free
// number. If none is free the oldest is overwritten.
func (l *Log) shift() error {
	free := 1
	for ; free < l.keep; free++ {
		if _, err := os.Lstat(numbered(l.path, free)); errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	for n := free; n > 1; n-- {
		if err := os.Rename(numbered(l.path, n-1), numbered(l.path, n)); err != nil {
			return fmt.Errorf("rename older audit log: %w", err)
		}
	}
	if err := os.Rename(l.path, numbered(l.path, 1)); err != nil {
		return fmt.Errorf("rename audit log: %w", err)
	}
	return nil
}

// prune removes older files beyond the number that is kept: after a start with
// a smaller one they would stay for good.
func (l *Log) prune(ctx context.Context) {
	numbers, err := rotated(l.path)
	for _, n := range numbers {
		if n > l.keep {
			err = errors.Join(err, os.Remove(numbered(l.path, n)))
		}
	}
	if err != nil {
		l.log.LogAttrs(ctx, slog.LevelWarn, "old audit logs can't be removed", slog.String("path", l.path), slog.Any("error", err))
	}
}

// create makes an empty, locked file. An empty one that a crash left is removed
// first.
func create(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove unused audit log: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create audit log: %w", err)
	}
	if err := lock(f); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// lock keeps a second process from writing to the same file: two writers would
// break the chain.
func lock(f *os.File) error {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("lock audit log: %w", err)
	}
	return nil
}

func syncDir(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("open audit directory: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("sync audit directory: %w", err)
	}
	return nil
}

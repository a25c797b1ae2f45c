package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Spooled is a backup in a file without a name, which is gone when it is
// closed. Reading it starts at its beginning.
type Spooled struct {
	*os.File
	Header  Header
	Records uint64
	Bytes   int64
}

// Spool writes a backup of src into a file in the directory: whoever fetches it
// may be slow, and must not hold up commits.
func Spool(ctx context.Context, dir string, src source, h Header, mac MAC) (_ *Spooled, err error) {
	f, err := os.CreateTemp(dir, "backup-*.tmp")
	if err != nil {
		return nil, refused(err)
	}
	s := &Spooled{File: f}
	defer func() {
		if err != nil {
			err = errors.Join(refused(err), f.Close())
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, err
	}
	if s.Header, s.Records, err = Write(ctx, f, src, h, mac); err != nil {
		return nil, err
	}
	if s.Bytes, err = f.Seek(0, io.SeekCurrent); err != nil {
		return nil, err
	}
	_, err = f.Seek(0, io.SeekStart)
	return s, err
}

func refused(err error) error {
	if _, ok := errors.AsType[*fault.Fault](err); ok || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fault.Wrap(fault.Exhausted, err, "backup_no_space", "no space for the backup in the server's data directory, which needs as much as the store for a moment: make room there")
	}
	return fault.Wrap(fault.NotReady, fmt.Errorf("spool backup: %w", err), "backup_failed", "the server can't write the backup: see its log")
}

package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
)

const boltFile = "store.db"

// FirstRevision is that of a store in which nothing was ever written.
const FirstRevision = 1

// BoltConfig says where a Bolt lives.
type BoltConfig struct {
	// Dir is the directory for the file store.db and for the lock. It is made
	// if it is missing. No other process may use it at the same time.
	Dir string
	// Log gets a line when the store opens and one if it fails. Default: none.
	Log *slog.Logger
	// NoSync leaves out the syncs of commits. For tests only: a power cut
	// destroys the store.
	NoSync bool
}

// OpenBolt opens the store in a directory, or makes one where there is none.
// The steps are:
//
//  1. check and lock the directory;
//  2. if there is no file: make one under another name, sync, rename, so that
//     a file with this name is always whole;
//  3. read the whole file and refuse it ("store_corrupt", "store_newer",
//     unchanged to the last bit) if bbolt could stumble over it, or would
//     quietly fall back to an older state;
//  4. hand the open file to bbolt.
func OpenBolt(cfg BoltConfig) (*Bolt, error) {
	if err := durable.MkdirPrivate(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	unlock, err := durable.LockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	b, err := openLocked(cfg)
	if err != nil {
		return nil, errors.Join(err, unlock())
	}
	b.unlock = unlock
	return b, nil
}

func openLocked(cfg BoltConfig) (*Bolt, error) {
	path := filepath.Join(cfg.Dir, boltFile)
	if err := durable.CheckWritable(path); err != nil {
		return nil, err
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if err := create(path, cfg.NoSync, nil); err != nil {
			return nil, err
		}
	}
	f, size, err := openFile(path)
	if err != nil {
		return nil, err
	}
	h, err := inspect(f, size)
	if err != nil {
		_ = f.Close()
		return nil, unreadable(path, err)
	}
	db, err := openDB(f, cfg.NoSync)
	if err != nil {
		_ = f.Close()
		return nil, unreadable(path, err)
	}
	b := &Bolt{
		log: cfg.Log, path: path, db: db, update: db.Update,
		history: newHistory(h.revision),
		writer:  make(chan struct{}, 1),
		ended:   make(chan struct{}), failed: make(chan struct{}),
	}
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	err = db.View(func(tx *bbolt.Tx) error {
		b.durable.Store(int64(tx.ID()))
		return nil
	})
	if err != nil {
		return nil, errors.Join(unreadable(path, err), db.Close())
	}
	b.log.LogAttrs(context.Background(), slog.LevelInfo, "store opened",
		slog.String("path", path), slog.Int64("revision", h.revision), slog.Time("last_commit", h.time))
	return b, nil
}

// create makes a store, an empty one or what fill makes of it. bbolt can leave a
// broken file when the power fails while it makes one, hence the other name.
func create(path string, noSync bool, fill func(*bbolt.DB) error) error {
	temp := path + ".new"
	// What a crash left, or a link that was planted: the link goes, not its target.
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return unreadable(temp, err)
	}
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return unreadable(temp, err)
	}
	if err := f.Chmod(0o600); err != nil {
		_ = f.Close()
		return unreadable(temp, err)
	}
	db, err := openDB(f, noSync)
	if err != nil {
		_ = f.Close()
		return unreadable(temp, err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		meta, err := tx.CreateBucket([]byte(metaBucket))
		if err != nil {
			return err
		}
		if _, err := tx.CreateBucket([]byte(recordsBucket)); err != nil {
			return err
		}
		return meta.Put([]byte(headKey), head{revision: FirstRevision, time: time.Now()}.encode())
	})
	var refused error
	if err == nil && fill != nil {
		refused = fill(db)
	}
	if err == nil && refused == nil {
		err = db.Sync()
	}
	if err := errors.Join(err, db.Close()); err != nil {
		return unreadable(temp, err)
	}
	if refused != nil {
		return errors.Join(refused, os.Remove(temp))
	}
	return durable.Rename(temp, path)
}

// openFile opens what is there and never makes anything.
func openFile(path string) (*os.File, int64, error) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, 0, unreadable(path, err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = damaged("it is not a regular file")
	}
	if err != nil {
		_ = f.Close()
		return nil, 0, unreadable(path, err)
	}
	return f, info.Size(), nil
}

// openDB lets bbolt have exactly this file, whatever its name leads to by now.
func openDB(f *os.File, noSync bool) (db *bbolt.DB, err error) {
	err = guard(func() (err error) {
		db, err = bbolt.Open(f.Name(), 0o600, &bbolt.Options{
			OpenFile:     func(string, int, os.FileMode) (*os.File, error) { return f, nil },
			Timeout:      1, // don't wait for bbolt's own lock; ours is held
			PageSize:     pageSize,
			FreelistType: bbolt.FreelistMapType,
			NoSync:       noSync,
			NoStatistics: true,
		})
		return err
	})
	return db, err
}

// unreadable explains why a store can't be opened.
func unreadable(path string, err error) error {
	if _, ok := errors.AsType[*crash](err); ok {
		err = &damage{text: "bbolt can't read it", cause: err}
	}
	if errors.Is(err, berrors.ErrTimeout) {
		return fault.Wrap(fault.Conflict, err, "data_dir_locked", path+" is open in another program: stop it")
	}
	if explained := explain(path, err); explained != err {
		return explained
	}
	if noSpace(err) {
		return fault.Wrap(fault.Exhausted, err, "store_full", "no space left for "+path+": make room on its file system")
	}
	return fault.Wrap(fault.NotReady, err, "store_unreadable",
		fmt.Sprintf("%s can't be opened or read: look at its disk, owner and mode", path))
}

// explain turns what is wrong with a file into what to do about it.
func explain(path string, err error) error {
	if d, ok := errors.AsType[*damage](err); ok {
		return fault.Wrap(fault.Precondition, err, "store_corrupt", fmt.Sprintf(
			"the store %s is damaged (%s) and was left as it is: move it away and restore a backup into the empty data directory", path, d.text))
	}
	if errors.Is(err, errNewer) {
		return fault.Wrap(fault.Precondition, err, "store_newer",
			fmt.Sprintf("the store %s was written by a newer program: run that one, or restore a backup of this one", path))
	}
	return err
}

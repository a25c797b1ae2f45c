package store

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// Moment is a point in a store's history.
type Moment struct {
	Revision int64
	Time     time.Time // of the commit that made it
}

// Revision is the store's newest revision.
func (b *Bolt) Revision() int64 {
	b.history.mu.RLock()
	defer b.history.mu.RUnlock()
	return b.history.newest
}

// Moment is the newest point in the store's history.
func (b *Bolt) Moment(ctx context.Context) (at Moment, err error) {
	enough := errors.New("the moment is all that is asked for")
	err = b.Snapshot(ctx, func(m Moment) error {
		at = m
		return enough
	}, nil)
	if errors.Is(err, enough) {
		err = nil
	}
	return at, err
}

// Snapshot calls begin with the moment that it shows and then visit for every
// record as of that moment, in the order of the keys' bytes. A record's value
// is valid during the call only.
//
// While it runs, a commit that has to grow the file waits: neither function may
// wait for anybody.
func (b *Bolt) Snapshot(ctx context.Context, begin func(Moment) error, visit func(Record) error) error {
	return b.view(ctx, func(tx *bbolt.Tx) error {
		h, err := decodeHead(tx.Bucket([]byte(metaBucket)).Get([]byte(headKey)))
		if err != nil {
			return err
		}
		if err := begin(Moment{Revision: h.revision, Time: h.time}); err != nil {
			return err
		}
		return tx.Bucket([]byte(recordsBucket)).ForEach(func(key, item []byte) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			revision, value, err := decodeRecord(key, item)
			if err != nil {
				return err
			}
			return visit(Record{Key: string(key), Value: value, Revision: revision})
		})
	})
}

// Records yields the records that Snapshot would visit; an error is the last
// pair. It is for a caller that has the store for itself.
func (b *Bolt) Records(ctx context.Context) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		left := errors.New("the loop was left")
		err := b.Snapshot(ctx, func(Moment) error { return nil }, func(r Record) error {
			if !yield(r, nil) {
				return left
			}
			return nil
		})
		if err != nil && !errors.Is(err, left) {
			yield(Record{}, err)
		}
	}
}

// loadBatch is how many records of Load share a transaction.
const loadBatch = 10_000

// Load makes a store in a directory that has none: with these records, each
// keeping its revision, at the given moment. Records come in the order of the
// keys' bytes, none of them newer than the store; an error among them ends it
// and is returned. If Load fails the directory has no store.
func Load(cfg BoltConfig, at Moment, records iter.Seq2[Record, error]) error {
	if err := durable.MkdirPrivate(cfg.Dir, 0o700); err != nil {
		return err
	}
	unlock, err := durable.LockDir(cfg.Dir)
	if err != nil {
		return err
	}
	path := filepath.Join(cfg.Dir, boltFile)
	if err := CheckVacant(cfg.Dir); err != nil {
		return errors.Join(err, unlock())
	}
	return errors.Join(create(path, cfg.NoSync, func(db *bbolt.DB) error {
		return writing(path, load(db, at, records))
	}), unlock())
}

// writing words an error of the disk; one of the records is words already.
func writing(path string, err error) error {
	if _, ok := errors.AsType[*fault.Fault](err); ok || err == nil {
		return err
	}
	return unreadable(path, err)
}

// CheckVacant refuses a directory that has a store.
func CheckVacant(dir string) error {
	path := filepath.Join(dir, boltFile)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fault.New(fault.Exists, "store_exists", "there is a store already, "+path+": move it away first, it is not written over")
}

func load(db *bbolt.DB, at Moment, records iter.Seq2[Record, error]) error {
	next, stop := iter.Pull2(records)
	defer stop()
	h := head{revision: at.Revision, time: at.Time}
	last := ""
	for more := true; more; {
		err := db.Update(func(tx *bbolt.Tx) error {
			bucket := tx.Bucket([]byte(recordsBucket))
			bucket.FillPercent = 0.9 // in order
			for range loadBatch {
				rec, err, ok := next()
				if !ok {
					more = false
					break
				}
				if err != nil {
					return err
				}
				if rec.Key <= last || len(rec.Key) > MaxKeyBytes || rec.Revision < 1 || rec.Revision > at.Revision {
					return fault.Newf(fault.Invalid, "record_invalid", "record %q of revision %d can't follow %q in a store of revision %d", rec.Key, rec.Revision, last, at.Revision)
				}
				last = rec.Key
				item := encodeRecord(rec.Key, rec.Revision, rec.Value)
				h.tally.add(item)
				if err := bucket.Put([]byte(rec.Key), item); err != nil {
					return err
				}
			}
			return tx.Bucket([]byte(metaBucket)).Put([]byte(headKey), h.encode())
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Install gives the store in the directory from the place of the one in the
// directory to, whose lock the caller holds; that one, if there is one, keeps
// its content under the name that is returned. At no moment is there no store,
// or half of one.
func Install(from, to string) (kept string, err error) {
	path := filepath.Join(to, boltFile)
	if _, err := os.Lstat(path); err == nil {
		kept = path + ".before-" + time.Now().UTC().Format("20060102T150405Z")
		if err := os.Link(path, kept); err != nil {
			return "", unreadable(path, err)
		}
	}
	return kept, durable.Rename(filepath.Join(from, boltFile), path)
}

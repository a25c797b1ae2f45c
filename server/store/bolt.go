package store

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"log/slog"
	"sync"
	"sync/atomic"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Bolt is the driver for one server: a bbolt file in a directory of its own.
//
// A commit's revision is the last one plus one; making the file is revision 1.
// History is in memory: after reopening, it starts at the current revision.
type Bolt struct {
	log     *slog.Logger
	path    string
	db      *bbolt.DB
	unlock  func() error
	update  func(func(*bbolt.Tx) error) error // db.Update; tests let it fail
	history *history

	// writer holds one token: whoever put it in may write what is in the queue.
	writer chan struct{}
	queue  queue
	// durable is the newest transaction that is known to be on the disk.
	// bbolt shows a commit to readers a moment before it is.
	durable atomic.Int64

	mu      sync.Mutex
	err     error         // why the store answers nothing more
	crashed bool          // bbolt panicked: it may hold its locks for ever
	ended   chan struct{} // closed when err is set
	failed  chan struct{} // closed when it is set by anything but Close

	closing  sync.Once
	closeErr error
}

var _ KV = (*Bolt)(nil)

// Failed is closed when the store can't go on: after a commit of unknown
// outcome, or when bbolt crashed over its file. The process has to end then,
// with Err's answer as the reason.
func (b *Bolt) Failed() <-chan struct{} { return b.failed }

// Err says why the store answers nothing more; nil while it does.
func (b *Bolt) Err() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// Get returns the record under key.
func (b *Bolt) Get(ctx context.Context, key string) (Record, error) {
	var rec Record
	err := b.view(ctx, func(tx *bbolt.Tx) (err error) {
		item := tx.Bucket([]byte(recordsBucket)).Get([]byte(key))
		if item == nil {
			return fault.New(fault.NotFound, "record_unknown", "there is no such record")
		}
		rec, err = copyRecord([]byte(key), item)
		return err
	})
	return rec, err
}

// List returns a page of records.
func (b *Bolt) List(ctx context.Context, prefix, after string, limit int) (Page, error) {
	var page Page
	err := b.view(ctx, func(tx *bbolt.Tx) error {
		h, err := decodeHead(tx.Bucket([]byte(metaBucket)).Get([]byte(headKey)))
		if err != nil {
			return err
		}
		page = Page{Revision: h.revision}
		c := tx.Bucket([]byte(recordsBucket)).Cursor()
		key, item := c.Seek([]byte(max(prefix, after)))
		if key != nil && string(key) == after {
			key, item = c.Next()
		}
		for ; key != nil && bytes.HasPrefix(key, []byte(prefix)); key, item = c.Next() {
			if limit > 0 && len(page.Records) == limit {
				page.More = true
				return nil
			}
			rec, err := copyRecord(key, item)
			if err != nil {
				return err
			}
			page.Records = append(page.Records, rec)
		}
		return nil
	})
	if err != nil {
		return Page{}, err
	}
	return page, nil
}

func copyRecord(key, item []byte) (Record, error) {
	revision, value, err := decodeRecord(key, item)
	if err != nil {
		return Record{}, err
	}
	return Record{Key: string(key), Value: bytes.Clone(value), Revision: revision}, nil
}

// Watch reads the history.
func (b *Bolt) Watch(ctx context.Context, prefix string, from int64) iter.Seq2[Batch, error] {
	return func(yield func(Batch, error) bool) {
		for at := from; ; {
			batches, changed, err := b.next(ctx, at)
			if err != nil {
				yield(Batch{}, err)
				return
			}
			for _, batch := range batches {
				at = batch.Revision
				if mine := under(prefix, batch); len(mine.Events) > 0 && !yield(mine, nil) {
					return
				}
			}
			if len(batches) > 0 {
				continue
			}
			select {
			case <-changed:
			case <-ctx.Done():
			case <-b.ended:
			}
		}
	}
}

// next is the history as long as watcher and store live.
func (b *Bolt) next(ctx context.Context, after int64) ([]Batch, <-chan struct{}, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	if err := b.Err(); err != nil {
		return nil, nil, err
	}
	return b.history.since(after)
}

// Close waits for the commit under way, then gives file and directory back.
// What is called later, and every Watch, answers "store_closed".
func (b *Bolt) Close() error {
	b.closing.Do(func() { b.closeErr = b.shutDown() })
	return b.closeErr
}

func (b *Bolt) shutDown() error {
	b.end(fault.New(fault.NotReady, "store_closed", "the store is closed: the server is stopping"))
	b.writer <- struct{}{} // and never out again: nobody else writes
	b.mu.Lock()
	crashed := b.crashed
	b.mu.Unlock()
	var err error
	if !crashed {
		err = guard(b.db.Close)
	}
	return errors.Join(err, b.unlock())
}

// acquire waits for the turn to write, or to have nobody write.
func (b *Bolt) acquire(ctx context.Context) (release func(), err error) {
	if ctx.Err() == nil {
		select {
		case b.writer <- struct{}{}:
			release = func() { <-b.writer }
			if err := b.Err(); err != nil {
				release()
				return nil, err
			}
			return release, nil
		case <-b.ended:
			return nil, b.Err()
		case <-ctx.Done():
		}
	}
	return nil, busy(ctx)
}

var errNotDurable = errors.New("the newest commit is not durable yet")

// view runs f in a read transaction that shows nothing that isn't durable. The
// rare reader that meets a commit between its last write and its last sync
// waits for that commit to end.
func (b *Bolt) view(ctx context.Context, f func(*bbolt.Tx) error) error {
	if err := b.Err(); err != nil {
		return err
	}
	if err := b.read(f); !errors.Is(err, errNotDurable) {
		return err
	}
	release, err := b.acquire(ctx)
	if err != nil {
		return err
	}
	release = sync.OnceFunc(release)
	defer release()
	return b.read(func(tx *bbolt.Tx) error {
		release() // what tx shows is durable now: f may take its time
		return f(tx)
	})
}

func (b *Bolt) read(f func(*bbolt.Tx) error) error {
	err := guard(func() error {
		return b.db.View(func(tx *bbolt.Tx) error {
			if int64(tx.ID()) > b.durable.Load() {
				return errNotDurable
			}
			return f(tx)
		})
	})
	if c, ok := errors.AsType[*crash](err); ok {
		b.fail(explain(b.path, &damage{text: "it can't be read any more", cause: err}), c)
		return b.Err()
	}
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		return b.Err() // closed since view looked
	}
	return explain(b.path, err)
}

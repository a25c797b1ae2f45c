package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"syscall"

	"go.etcd.io/bbolt"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// checkLimits is the part of the contract that needs no store.
func checkLimits(ifs []Precondition, writes []Write) error {
	invalid := func(text string, args ...any) error {
		return fault.Newf(fault.Invalid, "store_commit_invalid", text, args...)
	}
	switch {
	case len(writes) == 0:
		return invalid("a commit needs a write")
	case len(writes) > MaxWrites || len(ifs) > MaxWrites:
		return invalid("%d writes and %d preconditions in one commit, at most %d each: split it", len(writes), len(ifs), MaxWrites)
	}
	for _, p := range ifs {
		if len(p.Key) == 0 || len(p.Key) > MaxKeyBytes || p.Revision < 0 {
			return invalid("a precondition has no key, one over %d bytes, or a negative revision", MaxKeyBytes)
		}
	}
	total, seen := 0, make(map[string]bool, len(writes))
	for _, w := range writes {
		if len(w.Key) == 0 || len(w.Key) > MaxKeyBytes {
			return invalid("a write has no key, or one over %d bytes", MaxKeyBytes)
		}
		if seen[w.Key] {
			return invalid("a key occurs twice in one commit")
		}
		seen[w.Key] = true
		total += len(w.Key) + len(w.Value)
	}
	if total > MaxCommitBytes {
		return invalid("%d bytes in one commit, at most %d: split it", total, MaxCommitBytes)
	}
	return nil
}

// check holds a commit to its preconditions.
func (p *pending) check(records *bbolt.Bucket) error {
	for _, want := range p.ifs {
		if err := holds(want, records.Get([]byte(want.Key))); err != nil {
			return err
		}
	}
	return nil
}

// apply writes a commit under the next revision.
func (p *pending) apply(records *bbolt.Bucket, h *head) error {
	h.revision++
	p.batch = Batch{Revision: h.revision, Time: h.time}
	for _, w := range p.writes {
		if err := p.write(records, w, &h.tally); err != nil {
			return fmt.Errorf("write record: %w", err)
		}
	}
	return nil
}

func (p *pending) write(records *bbolt.Bucket, w Write, all *tally) error {
	key := []byte(w.Key)
	old := records.Get(key)
	if old == nil && w.Delete {
		return nil
	}
	if old != nil {
		if _, err := unseal(key, old); err != nil {
			return err
		}
		all.remove(old)
	}
	event := Event{Record: Record{Key: w.Key, Revision: p.batch.Revision}, Deleted: w.Delete}
	if w.Delete {
		p.batch.Events = append(p.batch.Events, event)
		return records.Delete(key)
	}
	item := encodeRecord(w.Key, event.Revision, w.Value)
	all.add(item)
	event.Value = item[revisionBytes : len(item)-checksumBytes]
	p.batch.Events = append(p.batch.Events, event)
	return records.Put(key, item)
}

// holds compares a precondition with the stored item, nil if there is none.
func holds(p Precondition, item []byte) error {
	var revision int64
	if item != nil {
		var err error
		if revision, _, err = decodeRecord([]byte(p.Key), item); err != nil {
			return err
		}
	}
	if revision != p.Revision {
		return fault.Wrap(fault.Conflict, fmt.Errorf("record %q has revision %d, not %d", p.Key, revision, p.Revision),
			"store_conflict", "somebody else changed the record: read it again and retry")
	}
	return nil
}

// full says that a transaction failed for want of space and that it is certain
// that nothing was written.
//
// An error of bbolt's commit does not say that: when only its last sync fails,
// later reads show the commit, and a power cut may or may not take it back. So
// certain is only "no space" together with a new read that does not show the
// transaction. bbolt hands on a few errors as mere text, such as those of
// growing the file: they count as unknown too.
func (b *Bolt) full(t *transaction, err error) bool {
	return noSpace(err) && t.id != 0 && !b.shows(t.id)
}

func storeFull(path string, err error) error {
	// The text goes to peers: where the file lies is for the log.
	return fault.Wrap(fault.Exhausted, fmt.Errorf("write %s: %w", path, err), "store_full",
		"no space left for the server's store, nothing was written: make room on its file system")
}

// unknown stops the store, since nobody can tell whether a transaction that
// failed with err is on the disk.
func (b *Bolt) unknown(err error) error {
	crashed, _ := errors.AsType[*crash](err)
	unknown := fault.Wrap(fault.NotReady, fmt.Errorf("%w: %w", ErrUnknown, err), "store_commit_unknown",
		"after an error of the disk it is not known whether the change was made: look again when the server has restarted")
	b.fail(unknown, crashed)
	return unknown
}

func noSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// shows says whether a new read shows the transaction; true if in doubt.
func (b *Bolt) shows(transaction int) bool {
	shown := true
	err := guard(func() error {
		return b.db.View(func(tx *bbolt.Tx) error {
			shown = tx.ID() >= transaction
			return nil
		})
	})
	return err != nil || shown
}

// fail stops the store for good: what is in memory may differ from what is on
// the disk, and only a new start can tell.
func (b *Bolt) fail(err error, c *crash) {
	stack := ""
	if c != nil {
		stack = string(c.stack)
		b.mu.Lock()
		b.crashed = true
		b.mu.Unlock()
	}
	if !b.end(err) {
		return
	}
	close(b.failed)
	b.log.LogAttrs(context.Background(), slog.LevelError, "store stopped",
		slog.String("path", b.path), slog.String("reason", fault.ReasonOf(err)),
		slog.String("error", err.Error()), slog.String("stack", stack))
}

// end makes err the answer to everything from now on, unless there is one.
func (b *Bolt) end(err error) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return false
	}
	b.err = err
	close(b.ended)
	return true
}

// crash is a panic out of bbolt, or a fault of its memory map: the file shrank,
// the disk can't be read, or a page is damaged.
type crash struct {
	value any
	stack []byte
}

func (c *crash) Error() string { return fmt.Sprintf("panic: %v", c.value) }

// guard turns a crash of f into an error.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = &crash{value: p, stack: debug.Stack()}
		}
	}()
	return f()
}

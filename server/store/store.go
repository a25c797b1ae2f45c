// Package store keeps bytes under keys, with revisions, durably.
//
// It knows no domain type. Each owner (registry, ca) keeps the encoding of its
// records next to its rules and uses Encode and Decode for the version byte.
// A driver is an implementation of KV that passes storetest.
package store

import (
	"context"
	"errors"
	"iter"
	"time"
)

// Limits of one commit, so that every driver can hold the contract.
const (
	MaxWrites      = 100     // writes, and preconditions too
	MaxCommitBytes = 1 << 20 // keys and values of all writes together
	MaxKeyBytes    = 4096    // of each key, which is never empty
)

// ErrCompacted ends a Watch whose starting revision is no longer (or not yet)
// in the history: list again, then watch from the revision of the list.
var ErrCompacted = errors.New("revision is not in the watch history")

// ErrUnknown is wrapped by the answer to a Commit that may or may not have
// happened. The caller must not act as if it knew; an embedded driver is dead
// from then on and the process has to be restarted.
var ErrUnknown = errors.New("outcome of the commit is unknown")

// Record is a key with its value and the revision that last wrote it.
type Record struct {
	Key      string
	Value    []byte
	Revision int64
}

// Precondition holds when key's record has exactly this revision. Zero means
// that the key has no record.
type Precondition struct {
	Key      string
	Revision int64
}

// Write sets key to Value, or removes it when Delete is true.
type Write struct {
	Key    string
	Value  []byte
	Delete bool
}

// Page is a part of a listing. All pages of one listing are read at their own
// moment; Revision is the store's revision at the moment of this page, and a
// Watch from there misses nothing that this page does not show.
type Page struct {
	Records  []Record
	Revision int64
	// More says that there are records after the last one of this page.
	More bool
}

// Event is a record that was written, or removed when Deleted is true; then
// Record has the key and the revision of the removal, and no value.
type Event struct {
	Record
	Deleted bool
}

// Batch is all the events of one commit under the watched prefix, in the order
// of its writes.
type Batch struct {
	Revision int64
	// Time is when the driver committed it, by the clock of the committing
	// server.
	Time   time.Time
	Events []Event
}

// KV is the contract of a driver. All methods may be called concurrently.
//
// Revisions are positive, grow by at least one with every commit and never go
// back, also over restarts. What can be read is durable: no method shows a
// commit that a power cut could still take back. Values returned are the
// caller's own; values passed must not be changed afterwards.
type KV interface {
	// Get returns the record under key, or fault.NotFound.
	Get(ctx context.Context, key string) (Record, error)

	// List returns up to limit records (all if limit <= 0) whose key starts
	// with prefix and sorts after the given key, in the order of the keys'
	// bytes.
	List(ctx context.Context, prefix, after string, limit int) (Page, error)

	// Commit applies all writes if all preconditions hold, and returns the
	// revision that it made. On return without an error the writes are durable
	// and visible to Get and List. There is at least one write, and a key may
	// occur once in writes. Removing a key that has no record is no error and
	// makes no event.
	//
	// The answer is one of three. Done: no error. Not done: the error is
	// fault.Conflict (a precondition does not hold; nothing was written),
	// fault.Invalid (the limits), fault.Exhausted with reason "store_full" (no
	// space; the store goes on), or fault.NotReady with reason "store_busy"
	// (ctx ended before it began). Unknown: fault.NotReady with reason
	// "store_commit_unknown", wrapping ErrUnknown. Once begun, a commit is not
	// cut short by ctx.
	Commit(ctx context.Context, ifs []Precondition, writes []Write) (int64, error)

	// Watch yields the commits after revision from that touch prefix, in
	// order and complete, until ctx ends or the loop is left. It ends with an
	// error, never in silence: ctx's error, ErrCompacted, or the driver's. A
	// watcher that is too slow for the history gets ErrCompacted; it never
	// slows a commit down.
	Watch(ctx context.Context, prefix string, from int64) iter.Seq2[Batch, error]
}

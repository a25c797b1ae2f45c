package store

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
)

// How much history a watcher may be behind before it has to list again.
const (
	historyBatches = 10_000
	historyBytes   = 8 << 20
	// readAhead is how many batches a watcher takes at a time.
	readAhead = 64
)

// history is what Watch reads: the newest commits, in memory. Revisions in it
// are consecutive, so a revision is an index.
type history struct {
	maxBatches, maxBytes int

	mu      sync.RWMutex
	batches []Batch
	bytes   int
	newest  int64         // revision of the last batch, or at which history begins
	changed chan struct{} // closed and replaced by each add
}

func newHistory(revision int64) *history {
	return &history{
		maxBatches: historyBatches, maxBytes: historyBytes,
		newest: revision, changed: make(chan struct{}),
	}
}

// add appends a commit's batch, forgets the oldest ones beyond the limits and
// wakes the watchers. It never waits for one.
func (h *history) add(b Batch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.batches = append(h.batches, b)
	h.bytes += weight(b)
	h.newest = b.Revision
	for len(h.batches) > h.maxBatches || h.bytes > h.maxBytes && len(h.batches) > 1 {
		h.bytes -= weight(h.batches[0])
		h.batches[0] = Batch{} // the array behind the slice lives on
		h.batches = h.batches[1:]
	}
	close(h.changed)
	h.changed = make(chan struct{})
}

// since returns the next batches after a revision, and what is closed when
// there are more.
func (h *history) since(revision int64) ([]Batch, <-chan struct{}, error) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	oldest := h.newest - int64(len(h.batches))
	if revision < oldest || revision > h.newest {
		return nil, nil, fmt.Errorf("watch from revision %d, history has %d to %d: %w", revision, oldest, h.newest, ErrCompacted)
	}
	next := h.batches[revision-oldest:]
	// A copy: add clears the places of what it forgets.
	return append([]Batch(nil), next[:min(len(next), readAhead)]...), h.changed, nil
}

func weight(b Batch) int {
	n := 64
	for _, e := range b.Events {
		n += 64 + len(e.Key) + len(e.Value)
	}
	return n
}

// under returns a copy of the batch for a watcher of prefix.
func under(prefix string, b Batch) Batch {
	out := Batch{Revision: b.Revision, Time: b.Time}
	for _, e := range b.Events {
		if strings.HasPrefix(e.Key, prefix) {
			e.Value = bytes.Clone(e.Value)
			out.Events = append(out.Events, e)
		}
	}
	return out
}

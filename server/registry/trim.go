package registry

import (
	"context"
	"runtime/debug"
	"time"

	"github.com/seed-caa81108/assay/pkg/schedule"
)

const (
	// trimEvery is how often it is looked whether there is something to give
	// back, and how long it has to be quiet for that.
	trimEvery = 5 * time.Second
	// trimChanges is how many changed entries make it worth a collection.
	trimChanges = 10_000
	// quietChanges in trimEvery are no burst.
	quietChanges = 100
)

// trimInTime gives the memory that a burst of changes needed, or the load at
// the start, back to the system once it is over. By itself the runtime would
// keep as much again as the entries take.
func (r *Registry) trimInTime(ctx context.Context) error {
	var t trimmer
	for {
		if err := schedule.Sleep(ctx, trimEvery); err != nil {
			return nil
		}
		if t.due(r.mirror.turnover.Load()) {
			debug.FreeOSMemory()
		}
	}
}

// trimmer knows when it is quiet again after very many changes.
type trimmer struct {
	seen    uint64 // changes at the last look
	trimmed uint64 // changes when memory was last given back
}

func (t *trimmer) due(changed uint64) bool {
	quiet := changed-t.seen < quietChanges
	t.seen = changed
	if !quiet || changed-t.trimmed < trimChanges {
		return false
	}
	t.trimmed = changed
	return true
}

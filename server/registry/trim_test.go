package registry

import (
	"testing"
	"time"
)

func TestMemoryIsGivenBackOnceAfterABurst(t *testing.T) {
	var tr trimmer
	for i, look := range []struct {
		changed uint64
		due     bool
	}{
		{100_000, false}, // the load; it may still go on
		{100_000, true},
		{100_000, false},
		{100_050, false}, // little by little
		{105_000, false},
		{109_990, false},
		{110_010, true}, // a burst of several parts is over
		{110_010, false},
		{130_000, false},
		{150_000, false},
		{150_099, true}, // quiet enough
	} {
		if due := tr.due(look.changed); due != look.due {
			t.Errorf("look %d, at %d changes: %v", i, look.changed, due)
		}
	}
}

func TestTurnoverCountsEveryChange(t *testing.T) {
	m := newMirror(rules{}, 10)
	at := func(id string, stored int64) *item { return &item{Entry: Entry{ID: id}, stored: stored} }
	m.fill(delta{revision: 1, entries: []*item{at("a", 1), at("b", 1)}}, 1, time.Now())
	m.apply(delta{revision: 2, entries: []*item{at("b", 2), at("c", 2)}}, time.Now())
	m.apply(delta{revision: 3, gone: []string{"a"}}, time.Now())
	if got := m.turnover.Load(); got != 5 {
		t.Errorf("%d changes", got)
	}
}

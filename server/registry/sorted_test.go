package registry

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// sorted behaves as a sorted slice of everything would.
func TestSortedFollowsTheModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	s := sorted{compare: byID}
	var model []string
	probe := func(id string) *item { return &item{Entry: Entry{ID: id}} }
	for step := range 40_000 {
		id := fmt.Sprintf("%05d", rnd.IntN(5000))
		if step < 3000 {
			id = fmt.Sprintf("%05d", step) // in order, as a load comes
		}
		at, found := slices.BinarySearch(model, id)
		grow := step < 20_000
		if rnd.IntN(3) > 0 == grow {
			s.put(probe(id))
			if !found {
				model = slices.Insert(model, at, id)
			}
		} else {
			if s.remove(probe(id)) != found {
				t.Fatalf("step %d: remove %s: model says %v", step, id, found)
			}
			if found {
				model = slices.Delete(model, at, at+1)
			}
		}
		if s.count != len(model) {
			t.Fatalf("step %d: %d items, model %d", step, s.count, len(model))
		}
		if step%500 > 0 {
			continue
		}
		var got []string
		for it := range s.after(nil) {
			got = append(got, it.ID)
		}
		if !slices.Equal(got, model) {
			t.Fatalf("step %d: order differs", step)
		}
		got = nil
		for it := range s.after(probe(id)) {
			got = append(got, it.ID)
		}
		at, found = slices.BinarySearch(model, id)
		if found {
			at++
		}
		if !slices.Equal(got, model[at:]) {
			t.Fatalf("step %d: after %s: %d items, model %d", step, id, len(got), len(model)-at)
		}
		if first := s.first(); (first == nil) != (len(model) == 0) || first != nil && first.ID != model[0] {
			t.Fatalf("step %d: first is %v", step, first)
		}
	}
}

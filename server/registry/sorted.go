package registry

import (
	"iter"
	"slices"
)

// chunkSize bounds how far one insertion moves memory.
const chunkSize = 256

// sorted keeps items in the order of its compare function, in chunks, so that
// a change costs the same with a hundred items and with a hundred thousand.
type sorted struct {
	compare func(a, b *item) int
	chunks  [][]*item // none is empty
	count   int
}

// find returns where it is, or where it would go: a chunk and a place in it.
func (s *sorted) find(it *item) (chunk, place int, found bool) {
	chunk, _ = slices.BinarySearchFunc(s.chunks, it, func(c []*item, it *item) int {
		return s.compare(c[len(c)-1], it)
	})
	if chunk == len(s.chunks) {
		if chunk == 0 {
			return 0, 0, false
		}
		return chunk - 1, len(s.chunks[chunk-1]), false
	}
	place, found = slices.BinarySearchFunc(s.chunks[chunk], it, s.compare)
	return chunk, place, found
}

// put adds it, in place of its equal if there is one.
func (s *sorted) put(it *item) {
	i, j, found := s.find(it)
	if found {
		s.chunks[i][j] = it
		return
	}
	s.count++
	switch {
	case len(s.chunks) == 0:
		s.chunks = append(s.chunks, []*item{it})
	case len(s.chunks[i]) < chunkSize:
		s.chunks[i] = slices.Insert(s.chunks[i], j, it)
	case i == len(s.chunks)-1 && j == chunkSize: // a load comes in order
		s.chunks = append(s.chunks, append(make([]*item, 0, chunkSize), it))
	default:
		half := append(make([]*item, 0, chunkSize), s.chunks[i][chunkSize/2:]...)
		clear(s.chunks[i][chunkSize/2:])
		s.chunks[i] = s.chunks[i][:chunkSize/2]
		s.chunks = slices.Insert(s.chunks, i+1, half)
		if j > chunkSize/2 {
			i, j = i+1, j-chunkSize/2
		}
		s.chunks[i] = slices.Insert(s.chunks[i], j, it)
	}
}

// remove takes out the equal of it and says whether there was one.
func (s *sorted) remove(it *item) bool {
	i, j, found := s.find(it)
	if !found {
		return false
	}
	s.count--
	s.chunks[i] = slices.Delete(s.chunks[i], j, j+1)
	if len(s.chunks[i]) == 0 {
		s.chunks = slices.Delete(s.chunks, i, i+1)
	}
	return true
}

// first returns the smallest item, nil if there is none.
func (s *sorted) first() *item {
	if s.count == 0 {
		return nil
	}
	return s.chunks[0][0]
}

// after yields the items that sort after it, all of them if it is nil.
func (s *sorted) after(it *item) iter.Seq[*item] {
	return func(yield func(*item) bool) {
		i, j := 0, 0
		if it != nil {
			var found bool
			if i, j, found = s.find(it); found {
				j++
			}
		}
		for ; i < len(s.chunks); i, j = i+1, 0 {
			for _, next := range s.chunks[i][j:] {
				if !yield(next) {
					return
				}
			}
		}
	}
}

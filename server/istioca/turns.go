package istioca

import (
	"context"
	"sync"
)

// turns lets so many of each peer's calls go on at a time; others wait for them.
type turns struct {
	most int

	mu sync.Mutex
	of map[string]*turn
}

type turn struct {
	slots chan struct{}
	users int // that have one or wait for one
}

func newTurns(most int) *turns { return &turns{most: most, of: map[string]*turn{}} }

// take waits for a turn; give must be called after it.
func (t *turns) take(ctx context.Context, peer string) (give func(), err error) {
	t.mu.Lock()
	one := t.of[peer]
	if one == nil {
		one = &turn{slots: make(chan struct{}, t.most)}
		t.of[peer] = one
	}
	one.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if one.users--; one.users == 0 {
			delete(t.of, peer)
		}
	}
	select {
	case one.slots <- struct{}{}:
		return func() { <-one.slots; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, unavailable(ctx.Err())
	}
}

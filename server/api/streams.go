package api

import (
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// streams bounds the Sync streams of each agent. A stream whose agent does not
// read holds a whole view in memory, so the number of calls on a connection is
// no bound for them.
type streams struct {
	limit int

	mu   sync.Mutex
	open map[spiffeid.ID]int
}

func newStreams(limit int) *streams { return &streams{limit: limit, open: map[spiffeid.ID]int{}} }

// enter admits one stream of agent; leave must be called when it has ended.
func (s *streams) enter(agent spiffeid.ID) (leave func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[agent] >= s.limit {
		return nil, fault.New(fault.Exhausted, "limit_sync_streams", "this agent has too many sync streams: end the older ones")
	}
	s.open[agent]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.open[agent]--; s.open[agent] == 0 {
			delete(s.open, agent)
		}
	}, nil
}

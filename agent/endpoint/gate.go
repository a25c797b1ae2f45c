package endpoint

import "sync"

// resource is something that callers take and give back.
type resource int

const (
	descriptors resource = iota
	shed                 // connections kept only to be told that they are too many
	streams
	secretStreams // those of SDS, of which each may hold a request in the making
	held
	resources
)

// Connections beyond the limit that stay for a moment to get a proper answer.
const (
	maxShed       = 64
	maxShedPerUID = 16
)

type usage [resources]int

// gate counts what callers hold, each user's and all together.
type gate struct {
	limit, limitPerUID usage

	mu    sync.Mutex
	all   usage
	byUID map[uint32]*usage
}

func newGate(l Limits) *gate {
	return &gate{
		limit:       usage{descriptors: l.Descriptors, shed: maxShed, streams: l.Streams, secretStreams: share(l.Streams), held: l.Held},
		limitPerUID: usage{descriptors: l.DescriptorsPerUID, shed: maxShedPerUID, streams: l.StreamsPerUID, secretStreams: share(l.StreamsPerUID), held: l.HeldPerUID},
		byUID:       map[uint32]*usage{},
	}
}

// share is how many of n streams may be SDS's.
func share(n int) int { return max(1, n/4) }

// take counts n of r for a user, or says that it is too much.
func (g *gate) take(uid uint32, r resource, n int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	u := g.byUID[uid]
	if u == nil {
		u = &usage{}
		g.byUID[uid] = u
	}
	if g.all[r]+n > g.limit[r] || u[r]+n > g.limitPerUID[r] {
		g.forget(uid, u)
		return false
	}
	g.all[r] += n
	u[r] += n
	return true
}

func (g *gate) give(uid uint32, r resource, n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	u := g.byUID[uid]
	g.all[r] -= n
	u[r] -= n
	g.forget(uid, u)
}

func (g *gate) forget(uid uint32, u *usage) {
	if *u == (usage{}) {
		delete(g.byUID, uid)
	}
}

func (g *gate) count(r resource) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.all[r]
}

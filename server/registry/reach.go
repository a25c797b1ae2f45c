package registry

import (
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Lag is an agent that has not reached a revision yet.
type Lag struct {
	ID        spiffeid.ID
	Connected bool
	LastSeen  time.Time // zero: not since this server started
	Revision  int64     // that it is known to have reached; zero for none
}

// Reach follows how a revision gets to the agents. It counts those on record
// when it began that are not banned and whose certificate has not ended,
// connected or not: each may serve workloads. One that comes later starts with
// what the server has by then. Its methods but News are for one goroutine.
type Reach struct {
	registry *Registry
	revision int64
	counted  int
	lagging  []spiffeid.ID // sorted
	news     chan struct{}
}

// Reach begins to follow a revision that this registry has reached. It must be
// closed.
//
// Agents tell the revision of the last update that they have applied, and get
// one when something changes for them. So those that are behind are sent an
// update now, be it empty.
func (r *Registry) Reach(revision int64) *Reach {
	w := &Reach{registry: r, revision: revision, news: make(chan struct{}, 1)}
	r.fleet.watch(w.news)
	now := time.Now()
	for _, a := range r.mirror.allAgents() {
		if a.mayServe(now) {
			w.lagging = append(w.lagging, a.ID)
		}
	}
	w.counted = len(w.lagging)
	var ask []spiffeid.ID
	for _, lag := range w.Lagging() {
		ask = append(ask, lag.ID)
	}
	r.mirror.ask(ask, revision)
	return w
}

// Close ends the following.
func (w *Reach) Close() { w.registry.fleet.unwatch(w.news) }

// News gets a value when Lagging may have another answer. What ends by itself,
// the life of a certificate or a ban, is no news.
func (w *Reach) News() <-chan struct{} { return w.news }

// Counted is the number of agents that count.
func (w *Reach) Counted() int { return w.counted }

// Lagging returns the agents that have not reached the revision, sorted by ID.
// Who has reached it once, or is not to be waited for any more, does not come
// back.
func (w *Reach) Lagging() []Lag {
	now := time.Now()
	w.lagging = slices.DeleteFunc(w.lagging, func(id spiffeid.ID) bool {
		a, ok := w.registry.mirror.agent(id)
		return !ok || !a.mayServe(now)
	})
	lags := w.registry.fleet.behind(w.lagging, w.revision)
	w.lagging = w.lagging[:0]
	for _, lag := range lags {
		w.lagging = append(w.lagging, lag.ID)
	}
	return lags
}

// mayServe says whether workloads may depend on the agent: it is not banned,
// and its certificate, or the one that it has not used yet, has not ended.
func (a *Agent) mayServe(now time.Time) bool {
	end := a.NotAfter
	if a.ActiveSerial == "" {
		end = a.PendingNotAfter
	}
	return !a.Banned && now.Before(end)
}

// watch makes f tell news of every report, connection and loss of one.
func (f *fleet) watch(news chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watchers[news] = struct{}{}
}

func (f *fleet) unwatch(news chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.watchers, news)
}

// changed is called with the fleet's lock held.
func (f *fleet) changed() {
	for news := range f.watchers {
		select {
		case news <- struct{}{}:
		default:
		}
	}
}

// behind returns those of the agents that have not reported the revision.
func (f *fleet) behind(agents []spiffeid.ID, revision int64) []Lag {
	f.mu.Lock()
	defer f.mu.Unlock()
	var lags []Lag
	for _, id := range agents {
		lag := Lag{ID: id}
		if a := f.agents[id]; a != nil {
			lag.Connected, lag.LastSeen, lag.Revision = a.open > 0, a.lastSeen, a.report.Revision
		}
		if lag.Revision < revision {
			lags = append(lags, lag)
		}
	}
	return lags
}

// ask makes the open feeds of these agents deliver an update of the revision,
// be it empty.
func (m *mirror) ask(agents []spiffeid.ID, revision int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range agents {
		p := m.parents[id.String()]
		if p == nil {
			continue
		}
		for _, f := range p.feeds {
			f.asked = max(f.asked, min(revision, m.revision)) // never what there is not
			f.signal()
		}
	}
}

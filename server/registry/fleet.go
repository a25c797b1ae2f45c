package registry

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of what an agent can make the server remember.
const (
	maxVersionText = 64
	maxLive        = 32
)

// LiveSVIDs is what an agent claims to hold under one root.
type LiveSVIDs struct {
	AuthorityID  string
	Count        uint32
	LatestExpiry time.Time
}

// Report is what an agent claims to hold and to have applied.
type Report struct {
	Live           []LiveSVIDs
	EarliestExpiry time.Time // zero when it holds none
	AgentTime      time.Time
	Revision       int64
}

// AgentStatus joins an agent's record with its claims. Claims are kept in this
// server's memory only: after a restart they are unknown until the agent
// speaks again.
type AgentStatus struct {
	Agent
	// Until is when the last certificate may end that the agent may act under:
	// that is later than its record says where one may be adopted.
	Until                time.Time
	Connected            bool
	LastSeen             time.Time
	AcknowledgedSequence uint64
	WaitsUntil           time.Time
	Report
	// ReportSequence is the bundle that the agent had acknowledged when it sent
	// its last report; zero without one.
	ReportSequence uint64
	// ClockOffset is the agent's clock minus ours at its last report.
	ClockOffset time.Duration
}

// LiveCount is the number of SVIDs that the agent claims to hold.
func (s *AgentStatus) LiveCount() uint32 {
	total := uint32(0)
	for _, l := range s.Live {
		total += l.Count
	}
	return total
}

// LiveUnder is how many SVIDs under each root the agents hold, by what those
// that are not banned said last, connected or not, and as far as the last of
// them has not ended.
func LiveUnder(fleet []AgentStatus, now time.Time) map[string]uint64 {
	under := map[string]uint64{}
	for i := range fleet {
		for _, live := range fleet[i].Live {
			if !fleet[i].Banned && live.LatestExpiry.After(now) {
				under[live.AuthorityID] += uint64(live.Count)
			}
		}
	}
	return under
}

// fleet is the claims of all agents.
type fleet struct {
	mu       sync.Mutex
	agents   map[spiffeid.ID]*claimed
	next     uint64
	watchers map[chan struct{}]struct{}
}

// claimed is what one agent said on its streams.
type claimed struct {
	open     int
	newest   uint64 // the stream whose word counts, zero for any
	version  string
	lastSeen time.Time
	sequence uint64
	waits    time.Time
	report   Report
	reported uint64 // the sequence acknowledged before the last report
	offset   time.Duration
}

func newFleet() *fleet {
	return &fleet{agents: map[spiffeid.ID]*claimed{}, watchers: map[chan struct{}]struct{}{}}
}

// Claims is one open stream of an agent. Agents replace connections
// make-before-break, so one may have two for a while: the word of the newer
// one counts.
type Claims struct {
	fleet  *fleet
	agent  spiffeid.ID
	stream uint64
	closed bool
}

// Connected notes that the agent opened a stream, and what version it says
// that it is. The claims must be closed with the stream.
func (r *Registry) Connected(agent spiffeid.ID, version string) *Claims {
	f := r.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next++
	a := f.agents[agent]
	if a == nil {
		a = &claimed{}
		f.agents[agent] = a
	}
	a.open++
	a.newest = f.next
	a.version = printable(version)
	a.lastSeen = time.Now()
	f.changed()
	return &Claims{fleet: f, agent: agent, stream: f.next}
}

// Ack notes that the agent acknowledged the bundle of this sequence.
// waitsUntil is zero, or until when SVIDs of an older bundle may be in use.
func (c *Claims) Ack(sequence uint64, waitsUntil time.Time) {
	c.say(func(a *claimed) { a.sequence, a.waits = sequence, wall(waitsUntil) })
}

// Report notes what the agent claims to hold.
func (c *Claims) Report(report Report) {
	now := time.Now()
	report.Live = slices.Clone(report.Live[:min(len(report.Live), maxLive)])
	c.say(func(a *claimed) {
		a.report, a.reported = report, a.sequence
		if !report.AgentTime.IsZero() {
			a.offset = report.AgentTime.Sub(now)
		}
	})
}

// Close notes that the stream ended. What was claimed stays on record.
func (c *Claims) Close() {
	c.fleet.mu.Lock()
	defer c.fleet.mu.Unlock()
	if a := c.fleet.agents[c.agent]; a != nil && !c.closed {
		c.closed = true
		a.open--
		c.fleet.changed()
		if a.newest == c.stream {
			a.newest = 0 // an older one that outlives it has the word again
		}
	}
}

// say changes the agent's claims, unless a newer stream has spoken.
func (c *Claims) say(change func(*claimed)) {
	c.fleet.mu.Lock()
	defer c.fleet.mu.Unlock()
	a := c.fleet.agents[c.agent]
	if a == nil || c.closed {
		return
	}
	a.lastSeen = time.Now()
	if c.stream >= a.newest {
		change(a)
		c.fleet.changed()
	}
}

func (f *fleet) version(agent spiffeid.ID) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if a := f.agents[agent]; a != nil {
		return a.version
	}
	return ""
}

// Fleet returns the status of every agent on record, sorted by ID. It forgets
// the claims of agents that have neither a record nor a stream.
func (r *Registry) Fleet() []AgentStatus {
	agents := r.mirror.allAgents()
	f := r.fleet
	f.mu.Lock()
	defer f.mu.Unlock()
	list := make([]AgentStatus, len(agents))
	recorded := make(map[spiffeid.ID]bool, len(agents))
	for i, agent := range agents {
		recorded[agent.ID] = true
		list[i].Agent, list[i].Until = agent, r.until(&agent)
		if a := f.agents[agent.ID]; a != nil {
			list[i].fill(a)
		}
	}
	for id, a := range f.agents {
		if a.open == 0 && !recorded[id] {
			delete(f.agents, id)
		}
	}
	return list
}

// FirstExpiry returns the agent with the workload SVID that ends first, by what
// agents that are not banned have reported; zero while there is none. If no
// server answered any more from now on, somebody would be without an identity
// there first.
func (r *Registry) FirstExpiry(now time.Time) (agent spiffeid.ID, at time.Time) {
	reported := map[spiffeid.ID]time.Time{}
	r.fleet.mu.Lock()
	for id, a := range r.fleet.agents {
		if a.report.EarliestExpiry.After(now) {
			reported[id] = a.report.EarliestExpiry
		}
	}
	r.fleet.mu.Unlock()
	for id, expiry := range reported {
		if it, ok := r.mirror.agent(id); ok && !it.Banned && (at.IsZero() || expiry.Before(at)) {
			agent, at = id, expiry
		}
	}
	return agent, at
}

func (s *AgentStatus) fill(a *claimed) {
	s.Version = a.version
	s.Connected = a.open > 0
	s.LastSeen = a.lastSeen
	s.AcknowledgedSequence, s.WaitsUntil = a.sequence, a.waits
	s.Report, s.ReportSequence = a.report, a.reported
	s.ClockOffset = a.offset
}

// printable makes an agent's text safe for a terminal and short.
func printable(text string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return -1
		}
		return c
	}, text[:min(len(text), maxVersionText)])
}

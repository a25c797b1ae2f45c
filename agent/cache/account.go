package cache

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/agent/state"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// delivery is a kind of thing handed out: SVIDs under a root, together with a
// bundle. Whoever holds one without a stream trusts that bundle until the SVID
// ends.
type delivery struct {
	sequence    uint64
	authorityID string
}

// Acknowledgement of bundle n (design section 6). It is due when
//
//   - n is durable: setBundle comes after SaveBundle;
//   - n was written to every open stream: no subscription lags;
//   - SVIDs handed out under an older bundle on streams that are closed have
//     ended. If they have not, waits is when they will.
//
// A stream that was sent nothing holds nothing, and its first message will
// have n.
func (c *Cache) acknowledgement(at time.Time) (sequence uint64, waits time.Time, due bool) {
	if c.bundle == nil || !c.synced || c.lagging > 0 {
		return 0, time.Time{}, false
	}
	for d, until := range c.closed {
		switch {
		case !at.Before(until):
			delete(c.closed, d)
		case d.sequence < c.bundle.Sequence && until.After(waits):
			waits = until
		}
	}
	return c.bundle.Sequence, waits, true
}

// lags says whether an open subscription's stream still has an older bundle.
func (c *Cache) lags(s *Subscription) bool {
	return s.sent != nil && c.bundle != nil && s.sent.BundleSequence < c.bundle.Sequence
}

// noteLag counts a subscription that began or ceased to lag.
func (c *Cache) noteLag(was, is bool) {
	switch {
	case was && !is:
		c.lagging--
		if c.lagging == 0 {
			signal(c.accountCh)
		}
	case is && !was:
		c.lagging++
	}
}

// noteClosed keeps what a stream that ends leaves with its workload.
func (c *Cache) noteClosed(s *Subscription) {
	if s.sent == nil {
		return
	}
	for _, svid := range s.sent.SVIDs {
		raise(c.closed, delivery{s.sent.BundleSequence, svid.AuthorityID}, svid.NotAfter)
	}
	if c.bundle != nil && s.sent.BundleSequence < c.bundle.Sequence {
		signal(c.accountCh)
	}
}

func raise(m map[delivery]time.Time, d delivery, until time.Time) {
	if until.After(m[d]) {
		m[d] = until
	}
}

// recallDeliveries takes over what the runs before handed out. All their
// streams are closed.
func (c *Cache) recallDeliveries() {
	for _, d := range c.state.Delivered() {
		if c.now().Before(d.Until) {
			raise(c.closed, delivery{d.Sequence, d.AuthorityID}, d.Until)
			raise(c.marks, delivery{d.Sequence, d.AuthorityID}, d.Until)
		}
	}
}

// account makes it durable, before a view is handed out for the first time,
// how long its SVIDs live: a restart closes all streams, and the workloads keep
// what they have. The mark is set a quarter of a life ahead, so that this costs
// a write a few times per life and not one per SVID.
func (c *Cache) account(v *view) {
	c.marksMu.Lock()
	defer c.marksMu.Unlock()
	raised := false
	for _, svid := range v.snapshot.SVIDs {
		d := delivery{v.snapshot.BundleSequence, svid.AuthorityID}
		if svid.NotAfter.After(c.marks[d]) {
			c.marks[d] = svid.NotAfter.Add(svid.life / 4).Truncate(time.Second)
			raised = true
		}
	}
	v.accounted.Store(true)
	if !raised {
		return
	}
	c.saveMarks()
}

// resaveMarks writes the marks again if that failed.
func (c *Cache) resaveMarks() {
	c.marksMu.Lock()
	defer c.marksMu.Unlock()
	if c.unsaved {
		c.saveMarks()
	}
}

func (c *Cache) saveMarks() {
	at := c.now()
	var list []state.Delivered
	for d, until := range c.marks {
		if !at.Before(until) {
			delete(c.marks, d)
			continue
		}
		list = append(list, state.Delivered{Sequence: d.sequence, AuthorityID: d.authorityID, Until: until})
	}
	err := c.state.SaveDelivered(list)
	if c.unsaved = err != nil; c.unsaved {
		// Serving does not depend on it; only a rotation that meets a restart
		// of this agent does. The next tick tries again.
		c.log.ErrorContext(context.Background(), "could not note until when delivered certificates live", slog.String("error", err.Error()))
	}
}

// claims are what the cache reports that it holds: SVIDs that it would serve,
// SVIDs that open streams were sent, SVIDs on streams that are closed, and SVIDs
// that it would serve after a restart.
func (c *Cache) claims(at time.Time) *agentv1.SyncRequest_Report {
	live := map[string]*agentv1.SyncRequest_LiveSVIDs{}
	count := func(authorityID string, n uint32, until time.Time) {
		l := live[authorityID]
		if l == nil {
			l = &agentv1.SyncRequest_LiveSVIDs{AuthorityId: authorityID, LatestExpiry: timestamppb.New(until)}
			live[authorityID] = l
		}
		l.Count += n
		if until.After(l.LatestExpiry.AsTime()) {
			l.LatestExpiry = timestamppb.New(until)
		}
	}
	report := &agentv1.SyncRequest_Report{AgentTime: timestamppb.Now(), Revision: c.revision}
	earliest := time.Time{}
	for _, e := range c.entries {
		if !e.servable(at) {
			continue
		}
		count(e.svid.AuthorityID, 1, e.svid.NotAfter)
		if earliest.IsZero() || e.svid.NotAfter.Before(earliest) {
			earliest = e.svid.NotAfter
		}
	}
	if !earliest.IsZero() {
		report.EarliestExpiry = timestamppb.New(earliest)
	}
	for svid := range c.superseded(at) {
		count(svid.AuthorityID, 1, svid.NotAfter)
	}
	for d, until := range c.closed {
		if at.Before(until) {
			var n uint32
			if live[d.authorityID] == nil {
				n = 1 // at least
			}
			count(d.authorityID, n, until)
		}
	}
	for id, until := range c.onDisk {
		if at.Before(until) && live[id] == nil {
			count(id, 1, until) // at least
		}
	}
	for _, id := range slices.Sorted(maps.Keys(live)) {
		report.Live = append(report.Live, live[id])
	}
	return report
}

// superseded returns the SVIDs that streams were sent last and that the cache
// itself has replaced by now.
func (c *Cache) superseded(at time.Time) map[*SVID]struct{} {
	seen := map[*Snapshot]struct{}{}
	old := map[*SVID]struct{}{}
	for s := range c.subscriptions {
		if s.sent == nil {
			continue
		}
		if _, done := seen[s.sent]; done {
			continue
		}
		seen[s.sent] = struct{}{}
		for _, svid := range s.sent.SVIDs {
			e := c.entries[svid.EntryID]
			if at.Before(svid.NotAfter) && (e == nil || e.svid != svid) {
				old[svid] = struct{}{}
			}
		}
	}
	return old
}

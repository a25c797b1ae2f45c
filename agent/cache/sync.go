package cache

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

const (
	// reportEvery is the longest time between two reports, reportPause the
	// shortest, and revisionPause for those that tell a new revision: somebody
	// may be waiting for that.
	reportEvery   = 30 * time.Second
	reportPause   = time.Second
	revisionPause = 50 * time.Millisecond
	// steady is how long a stream has to live to count as a success.
	steady = 10 * time.Second
	// repeatEvery is how often the log says that there is still no stream.
	repeatEvery = time.Minute
	// succession is how long the connection of a renewed certificate may take
	// after its first use.
	succession = 15 * time.Second
)

// errReplaced ends a stream in favour of a new one, at once: there is a better
// connection, or the server's time is needed.
var errReplaced = errors.New("stream replaced")

type syncStream = grpc.BidiStreamingClient[agentv1.SyncRequest, agentv1.SyncResponse]

// syncLoop keeps one stream to the server open.
func (c *Cache) syncLoop(ctx context.Context) {
	away, refusal := schedule.Backoff{Max: 15 * time.Second}, schedule.Backoff{Min: 2 * time.Second, Max: time.Minute}
	var outage outage
	for {
		conn, err := c.servers.Conn(ctx)
		if ctx.Err() != nil {
			return
		}
		began := c.now()
		if err == nil {
			err = c.follow(ctx, conn)
			conn.Release()
		}
		had := c.setConnected(false)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errReplaced) {
			continue
		}
		if had && c.now().Sub(began) >= steady {
			away.Reset()
			refusal.Reset()
		}
		wait := &away
		if fault.KindOf(err) != fault.NotReady {
			wait = &refusal
		}
		pause := max(wait.Next(), fault.RetryAfterOf(err))
		c.metrics.syncFailures.WithLabelValues(reasonLabel(err)).Inc()
		c.tellOutage(ctx, &outage, had, err, pause)
		if schedule.Sleep(ctx, pause) != nil {
			return
		}
	}
}

// outage is what the log says about one already.
type outage struct {
	reason string
	told   time.Time
}

// tellOutage logs the loss of the stream and why there is no new one: at once,
// and then now and then while the reason stays the same.
func (c *Cache) tellOutage(ctx context.Context, o *outage, had bool, err error, pause time.Duration) {
	at, reason, level := c.now(), fault.ReasonOf(err), slog.LevelWarn
	if reason == "bundle_rollback" {
		level = slog.LevelError // somebody has to look at this
	}
	why := []slog.Attr{slog.String("reason", reason), slog.String("error", err.Error()), slog.Duration("retry_in", pause)}
	if had {
		*o = outage{} // what keeps us away is news
		c.log.LogAttrs(ctx, level, "lost the server's stream; serving what there is", why...)
		return
	}
	if reason != o.reason || at.Sub(o.told) >= repeatEvery {
		*o = outage{reason: reason, told: at}
		c.log.LogAttrs(ctx, level, "can't get back to the server; serving what there is", why...)
	}
}

// follow runs one stream until it breaks or a better connection is there.
func (c *Cache) follow(ctx context.Context, conn Conn) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	select {
	case <-c.doubts: // the first message has the server's time
	default:
	}
	// The agent's key may be new: what is sealed has to be opened by it.
	signal(c.unsealed)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-conn.Replaced():
			cancel(errReplaced)
		case <-c.doubts:
			cancel(errReplaced)
		case <-stop:
		}
	}()
	err := conn.Ready(ctx)
	if err == nil {
		err = c.exchange(ctx, conn.Client())
	}
	if fault.ReasonOf(err) == agentv1.ReasonAgentSVIDNotActive {
		// The first use of a renewed certificate ends the streams of the old
		// one; its own connection is there in a moment. Else node attests anew,
		// which replaces the connection as well.
		_ = schedule.Sleep(ctx, succession)
	}
	if errors.Is(context.Cause(ctx), errReplaced) { // whatever else went wrong with it
		return errReplaced
	}
	select {
	case <-conn.Replaced():
		return errReplaced
	default:
		return err
	}
}

// exchange opens the stream, applies what comes, and tells the server what
// this agent serves.
func (c *Cache) exchange(ctx context.Context, client agentv1.AgentClient) error {
	var talker sync.WaitGroup
	defer talker.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // before the wait: it frees a talker that is stuck in sending
	stream, err := client.Sync(ctx)
	if err != nil {
		return fault.FromStatus(err)
	}
	// If sending fails, receiving says why.
	_ = stream.Send(&agentv1.SyncRequest{Message: &agentv1.SyncRequest_Hello_{Hello: c.hello()}})
	var next update
	for talking := false; ; {
		resp, err := stream.Recv()
		if err != nil {
			return fault.FromStatus(err)
		}
		c.hearTime(ctx, resp.GetServerTime())
		if err := next.add(resp); err != nil {
			return err
		}
		if resp.GetMore() {
			continue
		}
		if err := c.apply(ctx, next.chunks); err != nil {
			return err
		}
		next = update{}
		if !talking {
			talking = true
			talker.Go(func() { c.talk(ctx, stream) })
		}
	}
}

// hello says where the server should continue.
func (c *Cache) hello() *agentv1.SyncRequest_Hello {
	id, ok := c.state.Identity()
	c.mu.Lock()
	defer c.mu.Unlock()
	// Another agent's view is no place to continue from. It is still served
	// until the server's snapshot replaces it.
	if ok && id.AgentID.String() != c.agentID {
		c.agentID, c.epoch, c.revision = id.AgentID.String(), "", 0
	}
	h := &agentv1.SyncRequest_Hello{Epoch: c.epoch, Revision: c.revision, AgentVersion: c.version}
	return h
}

// talk sends acknowledgements as they become due and reports. An error of the
// stream shows up where it is received.
func (c *Cache) talk(ctx context.Context, stream syncStream) {
	var acked *agentv1.SyncRequest_Ack
	var reported time.Time
	var told int64 // revision of the last report
	ticker := time.NewTicker(reportEvery)
	defer ticker.Stop()
	for {
		c.mu.Lock()
		at := c.now()
		ack := c.dueAck(at)
		shortest := reportPause
		if c.revision != told {
			shortest = revisionPause
		}
		c.mu.Unlock()
		if ack != nil && !sameAck(ack, acked) {
			if stream.Send(&agentv1.SyncRequest{Message: &agentv1.SyncRequest_Ack_{Ack: ack}}) != nil {
				return
			}
			acked = ack
		}
		if pause := shortest - at.Sub(reported); pause > 0 {
			// Acknowledgements don't wait, reports do.
			select {
			case <-ctx.Done():
				return
			case <-c.accountCh:
				continue
			case <-time.After(pause):
			}
		}
		c.mu.Lock()
		report := c.claims(c.now())
		c.mu.Unlock()
		if stream.Send(&agentv1.SyncRequest{Message: &agentv1.SyncRequest_Report_{Report: report}}) != nil {
			return
		}
		reported, told = c.now(), report.GetRevision()
		select {
		case <-ctx.Done():
			return
		case <-c.accountCh:
		case <-ticker.C:
		}
	}
}

func (c *Cache) dueAck(at time.Time) *agentv1.SyncRequest_Ack {
	sequence, waits, due := c.acknowledgement(at)
	if !due {
		return nil
	}
	ack := &agentv1.SyncRequest_Ack{BundleSequence: sequence}
	if !waits.IsZero() {
		ack.WaitsUntil = timestamppb.New(waits)
	}
	return ack
}

func sameAck(a, b *agentv1.SyncRequest_Ack) bool {
	return b != nil && a.GetBundleSequence() == b.GetBundleSequence() && a.GetWaitsUntil().AsTime().Equal(b.GetWaitsUntil().AsTime())
}

// apply takes in one message of the server, which may have come in chunks,
// whole or not at all. The bundle is durable before anything changes.
func (c *Cache) apply(ctx context.Context, chunks []*agentv1.SyncResponse) error {
	last := chunks[len(chunks)-1]
	var list []facts
	for _, chunk := range chunks {
		if chunk.GetSnapshot() != last.GetSnapshot() || chunk.GetEpoch() != last.GetEpoch() {
			return fault.New(fault.Precondition, "sync_protocol", "the server sent chunks of different messages")
		}
		list = append(list, c.parse(ctx, chunk)...)
		if chunk.GetBundle() != nil {
			if err := c.takeBundle(chunk.GetBundle()); err != nil {
				return err
			}
		}
	}
	// The newest one, which may have come by another road: it is never older
	// than what this message brought.
	newest, ok := c.state.Bundle()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.purged {
		return nil
	}
	if !last.GetSnapshot() && (last.GetEpoch() != c.epoch || last.GetRevision() < c.revision) {
		c.epoch, c.revision = "", 0
		return fault.New(fault.Precondition, "sync_protocol", "the server sent a change to a view that this agent does not have")
	}
	if ok && newest.Authenticated && (c.bundle == nil || newest.Sequence > c.bundle.Sequence) {
		c.setBundle(newest)
	}
	removed := c.change(chunks, list)
	c.changePods(ctx, chunks)
	c.epoch, c.revision = last.GetEpoch(), last.GetRevision()
	c.lastSync = c.now()
	if !c.synced {
		c.synced = true
		for _, g := range c.groups {
			c.dirty[g] = struct{}{}
		}
	}
	again := !c.connected
	if again {
		c.connected = true
		// The server is there again: whoever paused for it need not.
		c.wait.Reset()
		c.pause = time.Time{}
	}
	if last.GetSnapshot() || again {
		c.log.InfoContext(ctx, "in sync with the server", slog.Bool("snapshot", last.GetSnapshot()), slog.Int("entries", len(c.entries)), slog.Int("removed", removed),
			slog.Int64("revision", c.revision))
	}
	c.flush(c.now())
	c.kick()
	signal(c.unsealed)
	signal(c.accountCh)
	return nil
}

// parse reads a chunk's entries. One that can't be served does not stop the
// others.
func (c *Cache) parse(ctx context.Context, chunk *agentv1.SyncResponse) []facts {
	var committed time.Time
	if chunk.GetCommittedAt().IsValid() {
		committed = chunk.GetCommittedAt().AsTime()
	}
	list := make([]facts, 0, len(chunk.GetEntries()))
	for _, e := range chunk.GetEntries() {
		f, err := parseEntry(e, committed, c.td, c.reserved)
		if err != nil {
			c.log.WarnContext(ctx, "entry left out", slog.String("entry_id", e.GetId()), slog.String("error", err.Error()))
			f = facts{id: e.GetId()}
		}
		list = append(list, f)
	}
	return list
}

// change applies entries and removals and returns how many entries went.
func (c *Cache) change(chunks []*agentv1.SyncResponse, list []facts) int {
	before := len(c.entries)
	added := 0
	keep := make(map[string]struct{}, len(list))
	for _, f := range list {
		keep[f.id] = struct{}{}
		if f.wire == nil { // it can't be served; what it was before neither
			if e := c.entries[f.id]; e != nil {
				c.removeEntry(e)
			}
			continue
		}
		if c.entries[f.id] == nil {
			added++
		}
		c.upsert(f)
	}
	for _, chunk := range chunks {
		for _, id := range chunk.GetRemovedEntryIds() {
			if e := c.entries[id]; e != nil {
				c.removeEntry(e)
			}
		}
	}
	if chunks[0].GetSnapshot() {
		for id, e := range c.entries {
			if _, ok := keep[id]; !ok && !isPod(id) {
				c.removeEntry(e)
			}
		}
	}
	return before + added - len(c.entries)
}

// takeBundle makes a bundle from the server durable, or says why it must not.
func (c *Cache) takeBundle(from *agentv1.TrustBundle) error {
	b, err := state.BundleFrom(c.td, from)
	if err != nil {
		return err
	}
	return c.state.SaveBundle(b)
}

// setConnected returns what it was before.
func (c *Cache) setConnected(is bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.connected && !is {
		c.lastSync = c.now()
	}
	was := c.connected
	c.connected = is
	return was
}

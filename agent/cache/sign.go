package cache

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

const (
	// maxBatch is how many items go into one call.
	maxBatch = 50
	// maxInFlight is how many calls run at a time; reserve more are for
	// entries that a workload waits for.
	maxInFlight = 4
	reserve     = 2

	signTimeout = 20 * time.Second
	connTimeout = 5 * time.Second
)

// signBackoff is between attempts for one entry that the server refuses.
var signBackoff = schedule.Backoff{Min: 500 * time.Millisecond, Max: time.Minute}

// job is one item of a batch: an entry as it was when the batch was made.
type job struct {
	entry      *entry
	facts      facts
	generation uint64
	replaces   time.Time // the end of the SVID at hand, zero without one

	key    *ecdsa.PrivateKey
	csr    []byte
	svid   *SVID
	err    error
	first  bool // the entry did not fail before
	result *agentv1.SignX509Response_Result
}

// signLoop gives the most urgent entries to the server, as long as there are
// any and calls are free.
func (c *Cache) signLoop(ctx context.Context) {
	var calls sync.WaitGroup
	defer calls.Wait()
	for {
		more, next := c.look(c.now())
		if !more {
			timer := time.NewTimer(next)
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-c.wake:
			case <-timer.C:
			}
			timer.Stop()
			continue
		}
		conn, err := c.connect(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			c.giveUpWaiting()
			continue
		}
		batch, verifier := c.takeBatch()
		if len(batch) == 0 {
			conn.Release()
			continue
		}
		calls.Go(func() {
			defer conn.Release()
			err := c.signBatch(ctx, conn.Client(), batch, verifier)
			c.settle(ctx, batch, err)
		})
	}
}

// connect waits a little for a connection.
func (c *Cache) connect(ctx context.Context) (Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connTimeout)
	defer cancel()
	return c.servers.Conn(ctx)
}

// look says whether a batch can go now, else how long to sleep at most.
func (c *Cache) look(at time.Time) (bool, time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.promote(at)
	next := 15 * time.Second // timers stand still while the machine sleeps
	if first := c.timed.first(); first != nil {
		next = min(next, first.at.Sub(at))
	}
	first := c.ready.first()
	switch {
	case first == nil || c.purged || c.bundle == nil:
		return false, next
	case at.Before(c.pause):
		return false, min(next, c.pause.Sub(at))
	case c.inFlight >= maxInFlight && (first.class != waiting || c.inFlight >= maxInFlight+reserve):
		return false, next
	}
	return true, 0
}

// takeBatch takes the most urgent entries. Those that a workload waits for are
// a batch of their own, so that nothing else delays it.
func (c *Cache) takeBatch() ([]*job, *verifier) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var batch []*job
	for first := c.ready.first(); first != nil && len(batch) < maxBatch; first = c.ready.first() {
		if len(batch) > 0 && batch[0].entry.class == waiting && first.class != waiting {
			break
		}
		e := c.ready.take()
		e.signing = true
		j := &job{entry: e, facts: e.facts, generation: e.generation, key: e.asked}
		if e.svid != nil {
			j.replaces = e.svid.NotAfter
		}
		batch = append(batch, j)
	}
	if len(batch) > 0 {
		c.inFlight++
	}
	return batch, c.verifier
}

// giveUpWaiting counts as a failed attempt for all who wait: there is no
// connection, so what there is will be served.
func (c *Cache) giveUpWaiting() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.ready.items {
		if !e.attempted {
			e.attempted = true
			c.touch(e)
		}
	}
	c.flush(c.now())
}

// signBatch makes keys, has them certified and checks what came back. An error
// is about the whole batch; otherwise each job has its SVID or error.
func (c *Cache) signBatch(ctx context.Context, client agentv1.AgentClient, batch []*job, v *verifier) error {
	parallel(len(batch), func(i int) {
		j := batch[i]
		if j.key == nil {
			j.key, j.err = newKey()
		}
		if j.err == nil {
			j.csr, j.err = csrFor(j.key)
		}
	})
	req := &agentv1.SignX509Request{ReplacesUntil: replacesUntil(batch)}
	for _, j := range batch {
		if j.err != nil {
			return j.err
		}
		req.Items = append(req.Items, &agentv1.SignX509Request_Item{EntryId: j.facts.id, Csr: j.csr})
	}
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	resp, err := client.SignX509(ctx, req)
	if err != nil {
		return fault.FromStatus(err)
	}
	if len(resp.GetResults()) != len(batch) {
		return fault.New(fault.Precondition, "sync_protocol", "the server answered another number of items than were asked for")
	}
	for i, r := range resp.GetResults() {
		batch[i].result = r
	}
	at := c.now()
	parallel(len(batch), func(i int) { batch[i].svid, batch[i].err = batch[i].finish(v, at) })
	return nil
}

// replacesUntil is when the first SVID ends that the batch replaces, nil if it
// replaces none.
func replacesUntil(batch []*job) *timestamppb.Timestamp {
	var first time.Time
	for _, j := range batch {
		if !j.replaces.IsZero() && (first.IsZero() || j.replaces.Before(first)) {
			first = j.replaces
		}
	}
	if first.IsZero() {
		return nil
	}
	return timestamppb.New(first)
}

// finish turns the server's answer for one item into an SVID.
func (j *job) finish(v *verifier, at time.Time) (*SVID, error) {
	if f := j.result.GetFailure(); f != nil {
		return nil, fault.FromItem(f.GetCode(), f.GetReason(), f.GetMessage())
	}
	chain := j.result.GetChain().GetCertificates()
	leaf, authorityID, err := v.check(chain, j.facts.spiffeID, &j.key.PublicKey, at)
	if err != nil {
		return nil, err
	}
	keyDER, err := marshalKey(j.key)
	if err != nil {
		return nil, err
	}
	return &SVID{
		EntryID: j.facts.id, ID: j.facts.spiffeID, Hint: j.facts.hint,
		CertificatesDER: bytes.Join(chain, nil), Key: NewPrivateKey(keyDER),
		NotAfter: leaf.NotAfter, AuthorityID: authorityID,
		renewAt: schedule.RenewAt(at, leaf.NotAfter), life: leaf.NotAfter.Sub(at),
	}, nil
}

// settle puts the outcome of a batch into the cache.
func (c *Cache) settle(ctx context.Context, batch []*job, err error) {
	if ctx.Err() != nil {
		return
	}
	at := c.now()
	var failed []*job
	installed := false
	c.mu.Lock()
	c.inFlight--
	if err == nil {
		c.wait.Reset()
		c.pause = time.Time{}
	} else {
		c.holdBack(at, err)
	}
	for _, j := range batch {
		e := j.entry
		e.signing = false
		if e.asked = nil; j.generation == e.generation {
			e.asked = j.key
		}
		if c.entries[e.id] != e {
			continue // removed in the meantime, its key goes with it
		}
		switch {
		case err != nil || j.generation != e.generation:
			// Nothing is wrong with the entry: again, as soon as possible. What
			// was signed for its old form is dropped.
			c.enqueue(e)
		case j.err != nil:
			e.failures++
			j.first = e.failures == 1
			failed = append(failed, j)
			c.postpone(e, at.Add(e.wait.Next()))
		case c.retired(j.svid) || !c.trusted(j.svid):
			// Signed while its root was being retired, and maybe tainted or gone
			// by now. Once the bundle that says so is acknowledged, nothing more
			// may come into use under that root.
			c.postpone(e, at.Add(e.wait.Next()))
		default:
			c.install(e, j.svid)
			e.asked, installed = nil, true
		}
		e.attempted = e.attempted || err != nil || j.generation == e.generation
		c.touch(e)
	}
	c.flush(at)
	c.mu.Unlock()
	c.kick()
	if installed {
		signal(c.unsealed)
		signal(c.accountCh)
	}
	c.report(ctx, batch, failed, err)
}

// holdBack makes the signer pause after a failed call. A server that says when
// to come back is neither away nor broken, so the pauses don't grow; a part is
// added by chance, so that not all who were told the same come back together.
func (c *Cache) holdBack(at time.Time, err error) {
	until := at.Add(c.wait.Next())
	if after := min(fault.RetryAfterOf(err), c.wait.Max); after > 0 {
		c.wait.Reset()
		until = at.Add(after + rand.N(after/2+10*time.Millisecond))
	}
	if until.After(c.pause) {
		c.pause = until
	}
}

// install makes svid the entry's.
func (c *Cache) install(e *entry, svid *SVID) {
	if svid.Hint != e.hint {
		renamed := *svid
		renamed.Hint = e.hint
		svid = &renamed
	}
	e.svid = svid
	e.wait.Max = min(signBackoff.Max, max(svid.life/10, time.Second))
	if !c.trusted(svid) {
		// The server still signs under a root that it wants to get rid of.
		c.postpone(e, c.now().Add(e.wait.Next()))
		return
	}
	e.failures = 0
	e.wait.Reset()
	c.planRenewal(e)
}

// report counts and logs failures; of an entry that fails again and again only
// the first is loud.
func (c *Cache) report(ctx context.Context, batch, failed []*job, err error) {
	if err != nil {
		c.metrics.signFailures.WithLabelValues(reasonLabel(err)).Add(float64(len(batch)))
		c.log.WarnContext(ctx, "signing failed", slog.Int("items", len(batch)),
			slog.String("reason", fault.ReasonOf(err)), slog.String("error", err.Error()))
		return
	}
	for _, j := range failed {
		c.metrics.signFailures.WithLabelValues(reasonLabel(j.err)).Inc()
		level := slog.LevelDebug
		if j.first {
			level = slog.LevelWarn
		}
		c.log.LogAttrs(ctx, level, "no certificate for an entry", slog.String("entry_id", j.facts.id),
			slog.String("spiffe_id", j.facts.spiffeID.String()), slog.String("reason", fault.ReasonOf(j.err)), slog.String("error", j.err.Error()))
	}
}

// parallel calls do for 0..n-1 on all cores.
func parallel(n int, do func(i int)) {
	workers := min(runtime.GOMAXPROCS(0), n)
	if workers <= 1 {
		for i := range n {
			do(i)
		}
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				do(i)
			}
		})
	}
	wg.Wait()
}

package ca

import (
	"context"
	"errors"
	mathrand "math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/store"
)

// storedMarks reads the marks of the active root from the store itself.
func (w *world) storedMarks(a *Authority) marks {
	w.t.Helper()
	key := rootPrefix + a.current.Load().view.active.record.ID
	record, err := w.kv.KV.Get(context.Background(), key)
	if err != nil {
		w.t.Fatal(err)
	}
	var got authorityRecord
	if err := a.stamp.open(key, record.Value, &got); err != nil {
		w.t.Fatal(err)
	}
	return got.Marks
}

func TestManyIssuesNeedOneRaise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.open()
		start(t, a)
		before := w.kv.commits.Load()
		issue(t, a, agentRequest())
		if n := w.kv.commits.Load() - before; n != 0 {
			t.Errorf("the first certificate cost %d commits, the root's own commit should have covered it", n)
		}
		advance(11 * time.Minute)
		old := w.storedMarks(a)
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() { issue(t, a, agentRequest()) })
		}
		wg.Wait()
		if n := w.kv.commits.Load() - before; n != 1 {
			t.Errorf("200 certificates past the mark cost %d commits, want one", n)
		}
		got := w.storedMarks(a)
		if want := time.Now().Add(12*time.Hour + 10*time.Minute); !got.Stream.Equal(want) {
			t.Errorf("the stream mark is %v, want %v", got.Stream, want)
		}
		if !got.Own.Equal(old.Own) {
			t.Error("the mark of a class that signed nothing was raised")
		}
		if seq := a.Bundle().Sequence; seq != 1 {
			t.Errorf("raising a mark moved the sequence to %d", seq)
		}
		select {
		case <-a.Bundle().Replaced():
			t.Error("raising a mark replaced the bundle")
		default:
		}
	})
}

func TestRaisesAreRareUnderSteadyLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.open()
		start(t, a)
		before := w.kv.commits.Load()
		for range 24 * 60 {
			issue(t, a, agentRequest())
			issue(t, a, serverRequest())
			advance(time.Minute)
		}
		// Two classes, one raise each in about ten minutes.
		if n := w.kv.commits.Load() - before; n > 2*24*6+2 {
			t.Errorf("a day cost %d commits", n)
		}
	})
}

func TestWithoutItsMarkNothingIsSigned(t *testing.T) {
	for name, c := range map[string]struct {
		answer error
		kind   fault.Kind
		reason string
	}{
		"store full":     {fault.New(fault.Exhausted, "store_full", "no space"), fault.Exhausted, "store_full"},
		"commit unknown": {fault.Wrap(fault.NotReady, store.ErrUnknown, "store_commit_unknown", "unknown"), fault.NotReady, "store_commit_unknown"},
		"conflict, ever": {fault.New(fault.Conflict, "store_conflict", "changed"), fault.NotReady, "store_busy"},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			a := w.open()
			start(t, a)
			advance(11 * time.Minute) // past the mark that came with the root
			signer := count(a)
			answer := func() error { return c.answer }
			w.kv.onCommit.Store(&answer)
			svids, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{agentRequest()})
			if !errors.Is(err, c.kind) || fault.ReasonOf(err) != c.reason {
				t.Errorf("%s: got error %v, want %s", name, err, c.reason)
			}
			if svids != nil || signer.n.Load() != 0 || len(w.audit.taken("x509_svid.issue")) != 0 {
				t.Errorf("%s: something was signed or audited", name)
			}
			w.kv.onCommit.Store(nil)
			issue(t, a, agentRequest())
		})
	}
}

// Losing against another server's raise costs a reading, not an error.
func TestLostRaiseIsReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		one := w.open()
		two := w.open()
		w.kv.deaf.Store(true)
		advance(11 * time.Minute)
		one.hear(time.Now())
		two.hear(time.Now())
		issue(t, one, agentRequest())
		before := w.kv.commits.Load()
		issue(t, two, agentRequest())
		if n := w.kv.commits.Load() - before; n != 1 {
			t.Errorf("%d commits, want one that loses", n)
		}
		if one.current.Load().view.active.revision != two.current.Load().view.active.revision {
			t.Error("the servers know different records")
		}
	})
}

// Property: no certificate outlives its issuer, its root, its cap, or the mark
// that stands in the store at that moment, whatever is asked and whenever.
func TestNoCertificateOutlivesWhatStandsAboveIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		// A root of 90 minutes, so that the run goes past its end.
		w.opts.AgentSVIDTTL = 2 * time.Minute
		w.opts.Config = Config{X509SVIDTTL: time.Minute, MaxX509SVIDTTL: 5 * time.Minute, IssuerTTL: 30 * time.Minute, RootTTL: 90 * time.Minute}
		a := w.open()
		start(t, a)
		root := a.Bundle().Roots[0].Certificate
		random := mathrand.New(mathrand.NewPCG(1, 2))
		signed := 0
		for time.Now().Before(root.NotAfter.Add(time.Minute)) {
			reqs := make([]X509Request, 1+random.IntN(4))
			for i := range reqs {
				reqs[i] = []func() X509Request{agentRequest, serverRequest, func() X509Request { return workload("/w") }}[random.IntN(3)]()
				reqs[i].TTL = time.Duration(random.Int64N(int64(20 * time.Minute)))
			}
			svids, err := a.IssueX509(t.Context(), audit.Origin{}, reqs)
			if err != nil {
				if reason := fault.ReasonOf(err); reason != "issuer_expired" || time.Until(root.NotAfter) > 0 {
					t.Fatalf("%v before the root's end: %v", time.Until(root.NotAfter), err)
				}
			}
			stored := w.storedMarks(a)
			for i, svid := range svids {
				if svid.Err != nil {
					if r := fault.ReasonOf(svid.Err); r != "ttl_out_of_range" && r != "issuer_expired" {
						t.Fatal(svid.Err)
					}
					continue
				}
				signed++
				leaf := inspect(t, a, reqs[i], svid)
				shape := a.profiles.leaf[reqs[i].Kind]
				if mark := *stored.of(shape.class); leaf.NotAfter.After(mark) {
					t.Fatalf("a certificate ends at %v, its mark is %v", leaf.NotAfter, mark)
				}
				if leaf.NotAfter.After(root.NotAfter) || time.Until(leaf.NotAfter) > shape.maxTTL {
					t.Fatalf("a certificate ends at %v: root %v, cap %v", leaf.NotAfter, root.NotAfter, shape.maxTTL)
				}
			}
			advance(time.Duration(random.Int64N(int64(2 * time.Minute))))
		}
		if signed < 50 {
			t.Errorf("only %d certificates were looked at", signed)
		}
	})
}

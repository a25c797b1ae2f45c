package api

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// small is work of which little can be done at a time.
func small(all int) *work {
	w := newWork()
	w.most = [...]int{agentRenewal: all, svidRenewal: all, newSVID: all, attestation: all}
	w.attestMost = all
	return w
}

func enter(t *testing.T, w *work, j job) (leave func()) {
	t.Helper()
	leave, err := w.enter(t.Context(), j)
	if err != nil {
		t.Fatal(err)
	}
	return leave
}

// Renewal before new SVIDs before attestation; the renewal that ends first
// before the others; and each agent in its turn.
func TestUnderOverloadTheMostUrgentGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, now := small(1), time.Now()
		a, b := spiffeid.RequireFromString("spiffe://example.org/a"), spiffeid.RequireFromString("spiffe://example.org/b")
		leave := enter(t, w, job{kind: newSVID, weight: 1})
		var mu sync.Mutex
		var order []string
		var done sync.WaitGroup
		for _, j := range []struct {
			name string
			job
		}{
			{"attest 1", job{kind: attestation, weight: 1}},
			{"new a1", job{kind: newSVID, agent: a, weight: 1}},
			{"new a2", job{kind: newSVID, agent: a, weight: 1}},
			{"new a3", job{kind: newSVID, agent: a, weight: 1}},
			{"new b1", job{kind: newSVID, agent: b, weight: 1}},
			{"renew in 50 min", job{kind: svidRenewal, agent: a, until: now.Add(50 * time.Minute), weight: 1}},
			{"renew in 2 min", job{kind: svidRenewal, agent: b, until: now.Add(2 * time.Minute), weight: 1}},
			{"new b2", job{kind: newSVID, agent: b, weight: 1}},
			{"agent", job{kind: agentRenewal, agent: a, weight: 1}},
			{"attest 2", job{kind: attestation, weight: 1}},
		} {
			done.Go(func() {
				leave, err := w.enter(t.Context(), j.job)
				if err != nil {
					t.Errorf("%s: %v", j.name, err)
					return
				}
				mu.Lock()
				order = append(order, j.name)
				mu.Unlock()
				time.Sleep(time.Millisecond)
				leave()
			})
			synctest.Wait() // they arrive in this order
		}
		leave()
		done.Wait()
		want := []string{"agent", "renew in 2 min", "renew in 50 min", "new a1", "new b1", "new a2", "new b2", "new a3", "attest 1", "attest 2"}
		if !slices.Equal(order, want) {
			t.Errorf("got %q, want %q", order, want)
		}
		wantIdle(t, w)
	})
}

func wantIdle(t *testing.T, w *work) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.busy != 0 || w.attesting != 0 || w.waiting != 0 || len(w.queue) != 0 || len(w.turns) != 0 {
		t.Errorf("left behind: %d busy, %d waiting, %d in line, turns of %d", w.busy, w.waiting, len(w.queue), len(w.turns))
	}
}

// However much there is of the rest, room is left for what is more urgent.
func TestThereIsRoomForRenewals(t *testing.T) {
	w := newWork()
	all := w.most[agentRenewal]
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // so that nobody waits
	fill := func(k kind, weight int) (total int) {
		for {
			if _, err := w.enter(ctx, job{kind: k, weight: weight}); err != nil {
				return total
			}
			total += weight
		}
	}
	if n := fill(attestation, storeWeight); n > all/4 {
		t.Errorf("attestations take %d of %d", n, all)
	}
	if n := fill(newSVID, 50); n == 0 || w.busy > all*3/4 {
		t.Errorf("new SVIDs take all: %d", n)
	}
	if n := fill(svidRenewal, 50); n < all/8 {
		t.Errorf("%d of %d are left for renewals", n, all)
	}
	if n := fill(agentRenewal, storeWeight); n < 4*storeWeight {
		t.Errorf("%d are left for agents", n)
	}
}

func TestWaitingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := small(100)
		leave := enter(t, w, job{kind: newSVID, weight: 1000}) // alone, anything fits
		began := time.Now()
		ends := make(chan error, 1)
		go func() {
			_, err := w.enter(t.Context(), job{kind: newSVID, weight: maxWaiting})
			ends <- err
		}()
		synctest.Wait()
		_, err := w.enter(t.Context(), job{kind: newSVID, weight: 1})
		for _, err := range []error{err, <-ends} {
			if fault.KindOf(err) != fault.Exhausted || fault.ReasonOf(err) != "limit_overload" || fault.RetryAfterOf(err) != overloadPause {
				t.Errorf("%v", err)
			}
		}
		if time.Since(began) != patience {
			t.Errorf("waited %v", time.Since(began))
		}
		// Who goes away gives his place to those behind.
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			_, err := w.enter(ctx, job{kind: agentRenewal, weight: 1000})
			ends <- err
		}()
		synctest.Wait()
		went := make(chan func(), 1)
		go func() { went <- enter(t, w, job{kind: newSVID, weight: 1}) }()
		synctest.Wait()
		w.leave(job{weight: 950}) // room for the second, not for the first
		cancel()
		if err := <-ends; fault.KindOf(err) != fault.NotReady {
			t.Errorf("%v", err)
		}
		(<-went)()
		w.mu.Lock()
		w.busy += 950
		w.mu.Unlock()
		leave()
		wantIdle(t, w)
	})
}

// F11: after an outage everything is due at once and the signer is slow. In the
// order of the ends nobody's certificate ends while he waits, if that is
// possible at all.
func TestNobodyExpiresInTheLineWhoNeedNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const calls, took = 400, 20 * time.Millisecond // eight seconds of work
		w := small(1)
		random := rand.New(rand.NewPCG(1, 2))
		late := 0
		var mu sync.Mutex
		var done sync.WaitGroup
		hold := enter(t, w, job{weight: 1})
		began := time.Now()
		for i := range calls {
			// Feasible: the i-th to end has i+1 turns before its end.
			until := began.Add(time.Duration(i+1)*took + time.Duration(random.IntN(1000))*time.Millisecond)
			agent := spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/%d", random.IntN(20)))
			done.Go(func() {
				leave, err := w.enter(t.Context(), job{kind: svidRenewal, agent: agent, until: until, weight: 1})
				if err != nil {
					t.Error(err)
					return
				}
				time.Sleep(took)
				if time.Now().After(until) {
					mu.Lock()
					late++
					mu.Unlock()
				}
				leave()
			})
		}
		synctest.Wait()
		hold()
		done.Wait()
		if late > 0 {
			t.Errorf("%d of %d ended while they waited", late, calls)
		}
	})
}

func TestWorkUnderLoadLosesNobody(t *testing.T) {
	w := small(100)
	var done sync.WaitGroup
	for i := range 200 {
		done.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 0))
			for range 200 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(random.IntN(2000))*time.Microsecond)
				leave, err := w.enter(ctx, job{
					kind: kind(random.IntN(4)), agent: spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/%d", i%7)),
					until: time.Unix(int64(random.IntN(5)), 0), weight: 1 + random.IntN(50),
				})
				cancel()
				if err == nil {
					leave()
				}
			}
		})
	}
	done.Wait()
	wantIdle(t, w)
}

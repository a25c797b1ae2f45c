package istioca

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/kube"
)

const (
	// reviewTimeout bounds one review, and slotTimeout the wait for its turn: proxies
	// wait without a limit of their own, and are told within five seconds.
	reviewTimeout = 3 * time.Second
	slotTimeout   = 2 * time.Second
	// maxReviews are under way at a cluster's API server.
	maxReviews = 64
	// verdictLife is how long what the API server said of a token holds. A ztunnel
	// asks with the same one for each pod of its node.
	verdictLife = 10 * time.Second
	// trouble is told once in so long.
	tellEvery   = time.Minute
	maxVerdicts = 8192
)

// verifier says whose a token is: fault.Denied if it is nobody's, fault.NotReady
// if it can't be told.
type verifier interface {
	verify(ctx context.Context, t token) (kube.Account, error)
	// known is verify for a token that was verified just now; false: it was not.
	known(t token) (kube.Account, error, bool)
}

// reviews has an API server review tokens.
type reviews struct {
	ask     func(ctx context.Context, token string) (kube.Account, error)
	flight  singleflight.Group
	slots   chan struct{}
	breaker *breaker
	took    prometheus.Observer
	tell    func(error) // of answers that are none; nil: nobody
	told    rate.Sometimes

	mu       sync.Mutex
	verdicts map[[sha256.Size]byte]verdict
}

// verdict is what an API server said of a token.
type verdict struct {
	account kube.Account
	err     error // fault.Denied, or nil
	until   time.Time
}

func newReviews(took prometheus.Observer, ask func(context.Context, string) (kube.Account, error)) *reviews {
	return &reviews{
		ask: ask, slots: make(chan struct{}, maxReviews), breaker: newBreaker(), took: took, told: rate.Sometimes{Interval: tellEvery},
		verdicts: map[[sha256.Size]byte]verdict{},
	}
}

func (r *reviews) known(t token) (kube.Account, error, bool) {
	v, ok := r.recall(sha256.Sum256([]byte(t.text)), time.Now())
	return v.account, v.err, ok
}

func (r *reviews) verify(ctx context.Context, t token) (kube.Account, error) {
	if account, err, ok := r.known(t); ok {
		return account, err
	}
	sum := sha256.Sum256([]byte(t.text))
	// Whoever asks for the same token meanwhile gets the same answer, so it does
	// not end with the one who asked first.
	answer := r.flight.DoChan(hex.EncodeToString(sum[:]), func() (any, error) {
		account, err := r.review(context.WithoutCancel(ctx), t.text)
		if err == nil || fault.KindOf(err) == fault.Denied {
			r.remember(sum, verdict{account, err, until(t, time.Now())})
		}
		return account, err
	})
	select {
	case a := <-answer:
		account, _ := a.Val.(kube.Account)
		return account, a.Err
	case <-ctx.Done():
		return kube.Account{}, unavailable(ctx.Err())
	}
}

// review asks, if there is hope for an answer.
func (r *reviews) review(ctx context.Context, text string) (kube.Account, error) {
	full := time.NewTimer(slotTimeout)
	defer full.Stop()
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-full.C:
		return kube.Account{}, unavailable(fault.New(fault.NotReady, "reviews_busy", "the API server is asked about too many tokens at once"))
	}
	done := r.breaker.enter(time.Now())
	if done == nil {
		return kube.Account{}, unavailable(fault.New(fault.NotReady, "breaker_open", "the API server has given no answer for a while: it is not asked at present"))
	}
	ctx, cancel := context.WithTimeout(ctx, reviewTimeout)
	defer cancel()
	began := time.Now()
	account, err := r.ask(ctx, text)
	r.took.Observe(time.Since(began).Seconds())
	answered := err == nil || fault.KindOf(err) == fault.Denied
	done(time.Now(), answered)
	if !answered {
		if r.tell != nil {
			r.told.Do(func() { r.tell(err) })
		}
		return kube.Account{}, unavailable(err)
	}
	return account, err
}

func unavailable(cause error) error {
	return fault.Wrap(fault.NotReady, cause, "token_review_unavailable", "the cluster gives no answer about the token: retry")
}

// until is when a verdict about t ends.
func until(t token, now time.Time) time.Time {
	end := now.Add(verdictLife)
	if expires := time.Unix(t.expires, 0); t.expires > 0 && expires.Before(end) {
		return expires
	}
	return end
}

func (r *reviews) recall(sum [sha256.Size]byte, now time.Time) (verdict, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.verdicts[sum]
	return v, ok && now.Before(v.until)
}

// remember keeps a verdict. Of too many, the old ones go, then all.
func (r *reviews) remember(sum [sha256.Size]byte, v verdict) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.verdicts) >= maxVerdicts {
		now := time.Now()
		for key, old := range r.verdicts {
			if !now.Before(old.until) {
				delete(r.verdicts, key)
			}
		}
		if len(r.verdicts) >= maxVerdicts {
			clear(r.verdicts)
		}
	}
	r.verdicts[sum] = v
}

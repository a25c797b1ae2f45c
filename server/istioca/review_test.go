package istioca

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/kube"
)

type asker struct {
	calls  atomic.Int32
	answer func(ctx context.Context, token string) (kube.Account, error)
}

func (a *asker) reviews() *reviews {
	return newReviews(prometheus.NewHistogram(prometheus.HistogramOpts{Name: "x"}), func(ctx context.Context, token string) (kube.Account, error) {
		a.calls.Add(1)
		return a.answer(ctx, token)
	})
}

var errAway = fault.New(fault.NotReady, "kubernetes_unavailable", "away")

// CA-08: what was said of a token, good or bad, holds for seconds and never past
// the token's own end. // NEG-31
func TestVerdictsHoldForSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &asker{answer: func(context.Context, string) (kube.Account, error) { return kube.Account{Name: "sleep"}, nil }}
		r := a.reviews()
		verify := func(text string, expires time.Time) (kube.Account, error) {
			return r.verify(t.Context(), token{text: text, expires: expires.Unix()})
		}
		far := time.Now().Add(time.Hour)
		for range 3 {
			if got, err := verify("good", far); err != nil || got.Name != "sleep" {
				t.Fatal(got, err)
			}
		}
		if n := a.calls.Load(); n != 1 {
			t.Errorf("asked %d times", n)
		}
		a.answer = func(context.Context, string) (kube.Account, error) {
			return kube.Account{}, refused("token_invalid", "no")
		}
		for range 2 {
			if _, err := verify("bad", far); fault.ReasonOf(err) != "token_invalid" {
				t.Error(err)
			}
		}
		if n := a.calls.Load(); n != 2 {
			t.Errorf("asked %d times", n)
		}
		time.Sleep(verdictLife)
		if _, err := verify("good", far); fault.ReasonOf(err) != "token_invalid" {
			t.Errorf("after a while: %v", err)
		}
		a.answer = func(context.Context, string) (kube.Account, error) { return kube.Account{}, nil }
		soon := time.Now().Add(2 * time.Second)
		if _, err := verify("short", soon); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Second)
		before := a.calls.Load()
		if _, err := verify("short", soon); err != nil || a.calls.Load() != before+1 {
			t.Errorf("a token that has ended was not asked about again: %v", err)
		}
	})
}

// A ztunnel that starts asks for all pods of its node with one token.
func TestOneTokenIsAskedAboutOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &asker{answer: func(context.Context, string) (kube.Account, error) {
			time.Sleep(time.Second)
			return kube.Account{Name: "ztunnel"}, nil
		}}
		r := a.reviews()
		impatient, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := r.verify(impatient, token{text: "t"}); fault.KindOf(err) != fault.NotReady {
				t.Errorf("who left: %v", err)
			}
		})
		for range 50 {
			all.Go(func() {
				if got, err := r.verify(t.Context(), token{text: "t"}); err != nil || got.Name != "ztunnel" {
					t.Error(got, err)
				}
			})
		}
		all.Wait()
		if n := a.calls.Load(); n != 1 {
			t.Errorf("asked %d times", n)
		}
	})
}

// NEG-33: a slow API server is waited for five seconds, one that fails again and
// again is left alone for a while, and a token that was never reviewed is never
// believed.
func TestAnAPIServerThatGivesNoAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &asker{answer: func(ctx context.Context, _ string) (kube.Account, error) {
			<-ctx.Done()
			return kube.Account{}, errAway
		}}
		r := a.reviews()
		began, n := time.Now(), 0
		verify := func() error {
			n++
			_, err := r.verify(t.Context(), token{text: fmt.Sprint(n)})
			return err
		}
		if err := verify(); fault.ReasonOf(err) != "token_review_unavailable" || fault.KindOf(err) != fault.NotReady || time.Since(began) != reviewTimeout {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		a.answer = func(context.Context, string) (kube.Account, error) { return kube.Account{}, errAway }
		for range breakAfter - 1 {
			if err := verify(); fault.CauseOf(err) != "kubernetes_unavailable" {
				t.Error(err)
			}
		}
		if err := verify(); fault.CauseOf(err) != "breaker_open" || !r.breaker.open() {
			t.Errorf("after %d failures: %v", breakAfter, err)
		}
		// One question is let through now and then; its failure opens it for longer.
		asked := a.calls.Load()
		for range 600 {
			time.Sleep(time.Second)
			_ = verify()
		}
		if more := a.calls.Load() - asked; more < 15 || more > 80 {
			t.Errorf("in ten minutes it was asked %d times", more)
		}
		a.answer = func(context.Context, string) (kube.Account, error) {
			return kube.Account{}, refused("token_invalid", "no")
		}
		time.Sleep(maxBreak * 2)
		if err := verify(); fault.ReasonOf(err) != "token_invalid" || r.breaker.open() {
			t.Errorf("an answer, and be it no: %v", err)
		}
	})
}

// However many ask, an API server has a bounded number of questions at a time.
func TestQuestionsAtATimeAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most atomic.Int32
		a := &asker{answer: func(ctx context.Context, _ string) (kube.Account, error) {
			most.Store(max(most.Load(), now.Add(1)))
			defer now.Add(-1)
			<-ctx.Done()
			return kube.Account{}, errAway
		}}
		r := a.reviews()
		var all sync.WaitGroup
		for i := range 500 {
			all.Go(func() {
				if _, err := r.verify(t.Context(), token{text: fmt.Sprint(i)}); !errors.Is(err, fault.NotReady) {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if n := most.Load(); n > maxReviews {
			t.Errorf("%d at a time", n)
		}
	})
}

func TestVerdictsAreBounded(t *testing.T) {
	a := &asker{answer: func(context.Context, string) (kube.Account, error) { return kube.Account{}, nil }}
	r := a.reviews()
	for i := range maxVerdicts + 10 {
		r.remember([32]byte{byte(i), byte(i >> 8), byte(i >> 16)}, verdict{until: time.Now().Add(time.Hour)})
	}
	if n := len(r.verdicts); n > maxVerdicts {
		t.Errorf("%d verdicts are kept", n)
	}
}

// That an API server gives no answers is in the log: at once, then once a minute.
func TestUnansweredReviewsAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &asker{answer: func(context.Context, string) (kube.Account, error) { return kube.Account{}, errAway }}
		r := a.reviews()
		var told []error
		r.tell = func(err error) { told = append(told, err) }
		ask := func() {
			if _, err := r.verify(t.Context(), token{text: "t"}); fault.KindOf(err) != fault.NotReady {
				t.Fatal(err)
			}
		}
		ask()
		ask()
		time.Sleep(3 * tellEvery)
		ask()
		if len(told) != 2 || fault.ReasonOf(told[0]) != "kubernetes_unavailable" {
			t.Errorf("told %v", told)
		}
		a.answer = func(context.Context, string) (kube.Account, error) {
			return kube.Account{}, refused("token_invalid", "no")
		}
		time.Sleep(3 * tellEvery)
		if _, err := r.verify(t.Context(), token{text: "t"}); fault.KindOf(err) != fault.Denied || len(told) != 2 {
			t.Errorf("an answer, and be it no: %v, told %v", err, told)
		}
	})
}

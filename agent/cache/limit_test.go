package cache_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// A server that limits what an agent may ask for is asked again when it says so:
// nothing is lost, nothing is signed twice, and a workload that waits goes first.
func TestServerThatLimitsIsAskedAgainWhenItSaysSo(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		const entries, perSecond = 600, 100
		for i := range entries {
			f.set(entry(fmt.Sprint(i), fmt.Sprint("w", i), fmt.Sprint("unix:uid:", i)))
		}
		tokens, at, refused := float64(perSecond), time.Now(), 0
		f.limit = func(n int) error {
			tokens, at = min(perSecond, tokens+time.Since(at).Seconds()*perSecond), time.Now()
			if lacking := float64(n) - tokens; lacking > 0 {
				refused++
				return fault.Later(fault.Exhausted, "limit_signatures", "less", time.Duration(lacking/perSecond*float64(time.Second)))
			}
			tokens -= float64(n)
			return nil
		}
		a.start()
		time.Sleep(time.Second)
		s := a.cache.Subscribe(sel("unix:uid:599"))
		defer s.Close()
		time.Sleep(2 * time.Second)
		wantPaths(t, s, "w599")
		time.Sleep(9 * time.Second) // twice what the rate alone would take
		if n := a.cache.Status().SVIDs; n != entries {
			t.Errorf("%d of %d are signed after twelve seconds", n, entries)
		}
		f.with(func() {
			if len(f.keys) != entries {
				t.Errorf("%d certificates were signed for %d entries", len(f.keys), entries)
			}
			if refused == 0 || refused > entries/3 {
				t.Errorf("refused %d times", refused)
			}
		})
		if n := a.series("assay_agent_sign_failures_total")["limit_signatures"]; n == 0 {
			t.Error("refusals are not in the metrics")
		}
	})
}

// The server learns which calls renew, and what ends first: under overload it
// goes by that.
func TestCallsSayWhatTheyReplace(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		ends := time.Now().Add(f.ttl).Truncate(time.Second)
		time.Sleep(40 * time.Minute)
		f.with(func() {
			if len(f.until) != 2 || f.until[0].Unix() != 0 || !f.until[1].Equal(ends) {
				t.Errorf("the calls said %v, the first certificate ended %v", f.until, ends)
			}
		})
	})
}

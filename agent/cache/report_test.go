package cache_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// Somebody may be waiting for a revision, so it is told at once, also right
// after another report; whatever else changes waits for its turn.
func TestNewRevisionIsReportedSoon(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		a.start()
		time.Sleep(10 * time.Second)
		reports := func() (n int, revision int64) {
			synctest.Wait()
			f.mu.Lock()
			defer f.mu.Unlock()
			return len(f.reports), f.reports[len(f.reports)-1].GetRevision()
		}
		before, _ := reports()
		for i := range 5 {
			f.set(entry(fmt.Sprint(i), fmt.Sprint("w", i), "unix:uid:1"))
			time.Sleep(60 * time.Millisecond)
			if _, got := reports(); got != f.revision {
				t.Errorf("change %d: revision %d is reported, %d is there", i, got, f.revision)
			}
		}
		// Their signatures are told together.
		time.Sleep(time.Second)
		if after, _ := reports(); after-before > 5+2 {
			t.Errorf("%d reports for five changes", after-before)
		}
	})
}

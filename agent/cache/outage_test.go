package cache_test

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// count returns how many lines have a text.
func (b *logBuffer) count(text string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for line := range strings.Lines(b.buf.String()) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// series returns the values of a metric by its only label, "" without one.
func (a *agent) series(name string) map[string]float64 {
	a.t.Helper()
	values := map[string]float64{}
	for _, family := range must(a.reg.Gather()) {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.GetMetric() {
			label := ""
			if len(m.GetLabel()) > 0 {
				label = m.GetLabel()[0].GetValue()
			}
			values[label] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return values
}

// The reason for an outage is in the log at once and then about once a minute;
// each attempt is counted; the return is logged, by delta too.
func TestOutageIsToldOnceAMinuteAndItsEndOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		var log logBuffer
		a.log = &log
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		for outage := range 3 {
			f.stop()
			time.Sleep(time.Second)
			if n := log.count("can't get back to the server"); n == 0 {
				t.Error("not told at once")
			}
			time.Sleep(10 * time.Minute)
			if n := log.count("lost the server's stream"); n != outage+1 {
				t.Errorf("%d losses", n)
			}
			told := log.count("level=WARN msg=\"can't get back to the server; serving what there is\" reason=server_unreachable error=\"server_unreachable: the server at server:8443")
			if low, high := 8*(outage+1), 12*(outage+1); told < low || told > high {
				t.Errorf("told %d times in %d outages of 10 minutes", told, outage+1)
			}
			if n := a.series("assay_agent_sync_failures_total")["server_unreachable"]; n < float64(40*(outage+1)) {
				t.Errorf("%v attempts were counted", n)
			}
			if n := log.count("level=INFO msg=\"in sync with the server\""); n != outage+1 {
				t.Errorf("%d returns before this one", n)
			}
			f.start()
			start := time.Now()
			for !a.cache.Status().Connected {
				time.Sleep(100 * time.Millisecond)
			}
			if d := time.Since(start); d > 16*time.Second {
				t.Errorf("came back after %v", d)
			}
			if n := log.count("snapshot=false"); n != outage+1 {
				t.Errorf("%d returns by delta in the log", n)
			}
		}
		// What is no return is not logged as one.
		f.set(entry("2", "two", "unix:uid:1"))
		synctest.Wait()
		if n := log.count("in sync with the server"); n != 4 {
			t.Errorf("%d times in sync", n)
		}
	})
}

func TestNewReasonForAnOutageIsToldAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		var log logBuffer
		a.log = &log
		a.start()
		synctest.Wait()
		f.judge(fault.New(fault.Exhausted, "limit_sync_opens", "too much"))
		time.Sleep(4 * time.Second)
		f.judge(fault.New(fault.Denied, "something_new", "no"))
		time.Sleep(10 * time.Second)
		for _, reason := range []string{"limit_sync_opens", "something_new"} {
			if n := log.count("can't get back to the server; serving what there is\" reason=" + reason); n != 1 {
				t.Errorf("%s: told %d times", reason, n)
			}
		}
		f.judge(nil)
		time.Sleep(time.Minute)
		if !a.cache.Status().Connected {
			t.Error("did not come back")
		}
	})
}

// A server that says no is asked again after a second at the earliest, and
// after a minute at the latest.
func TestRefusedStreamIsTriedAgainSlowly(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		a.start()
		synctest.Wait()
		f.judge(fault.New(fault.Denied, "something", "no"))
		time.Sleep(time.Hour)
		if n := a.series("assay_agent_sync_failures_total")["denied"]; n < 60 || n > 240 {
			t.Errorf("%v attempts in an hour", n)
		}
	})
}

// The first use of a renewed certificate ends the old one's stream a moment
// before its connection is replaced: that is no failure.
func TestStreamThatEndsBecauseTheCertificateWasRenewedIsNoFailure(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		var log logBuffer
		a.log = &log
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		for range 5 {
			f.judge(fault.New(fault.Denied, "agent_svid_not_active", "superseded"))
			time.Sleep(500 * time.Millisecond) // the answer to the first use is on its way
			f.judge(nil)
			a.conns.replace()
			synctest.Wait()
			if s := a.cache.Status(); !s.Connected || f.seen().streams != 1 {
				t.Errorf("connected %v, %d streams", s.Connected, f.seen().streams)
			}
			time.Sleep(time.Hour)
		}
		if log.count("level=WARN") > 0 || len(a.series("assay_agent_sync_failures_total")) > 0 {
			t.Errorf("failures %v, %d warnings", a.series("assay_agent_sync_failures_total"), log.count("level=WARN"))
		}
		// Without a replacement it is one.
		f.judge(fault.New(fault.Denied, "agent_svid_not_active", "superseded"))
		time.Sleep(time.Minute)
		if a.series("assay_agent_sync_failures_total")["agent_svid_not_active"] == 0 || a.cache.Status().Connected {
			t.Error("waits for ever")
		}
		f.judge(nil)
	})
}

// 0 would read as long ago: there is no series until there is an SVID.
func TestEndOfTheFirstSVIDIsAbsentWithoutSVIDs(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		const name = "assay_agent_workload_svid_earliest_not_after_timestamp_seconds"
		a.start()
		synctest.Wait()
		if s := a.series(name); len(s) > 0 {
			t.Errorf("%v without an SVID", s)
		}
		f.set(entry("1", "web", "unix:uid:1"))
		synctest.Wait()
		if got, want := a.series(name)[""], float64(time.Now().Add(f.ttl).Unix()); got != want {
			t.Errorf("%v, want %v", got, want)
		}
		f.remove("1")
		synctest.Wait()
		if s := a.series(name); len(s) > 0 {
			t.Errorf("%v after the last SVID went", s)
		}
	})
}

// NEG-58, in part: a clock that jumps ahead and back while the server is away
// takes nothing for good.
func TestClockThatJumpsAheadAndBack(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"), changed(entry("2", "db", "unix:uid:1"), ttl(30*time.Minute)))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "web", "db")
		f.stop()
		synctest.Wait()
		for _, jump := range []struct {
			by   time.Duration
			left []string
		}{
			{25 * time.Hour, []string{"!svid_expired_server_unreachable"}},
			{45 * time.Minute, []string{"web"}},
		} {
			notified(s)
			cache.Tick(a.cache, time.Now().Add(jump.by))
			if !notified(s) {
				t.Errorf("%v ahead: not told", jump.by)
			}
			wantPaths(t, s, jump.left...)
			cache.Tick(a.cache, time.Now())
			if !notified(s) {
				t.Errorf("back from %v ahead: not told", jump.by)
			}
			wantPaths(t, s, "web", "db")
		}
	})
}

package cache_test

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/schedule"
)

// clocks are those of a machine in a bubble: its wall clock can be set, and the
// machine can sleep.
type clocks struct{ set, slept atomic.Int64 }

func (c *clocks) isSet(by time.Duration) { c.set.Store(int64(by)) }
func (c *clocks) sleeps(d time.Duration) { c.slept.Store(int64(d)) }

func (c *clocks) wall() time.Time {
	return time.Now().Round(0).Add(time.Duration(c.set.Load() + c.slept.Load()))
}

func (c *clocks) clock() *schedule.Clock {
	began := time.Now()
	return schedule.NewClock(c.wall, func() time.Duration { return time.Since(began) + time.Duration(c.slept.Load()) })
}

// NEG-58 c: the wall clock is set by a day. Nobody loses his stream, and nothing
// is signed anew or forgotten, whether the server can be asked or not.
func TestClockThatIsSetTakesNothing(t *testing.T) {
	for name, set := range map[string]time.Duration{"ahead": 25 * time.Hour, "back": -25 * time.Hour} {
		for _, away := range []bool{false, true} {
			t.Run(map[bool]string{false: name, true: name + ", server away"}[away], func(t *testing.T) {
				inBubble(t, func(t *testing.T, f *fake, a *agent) {
					c := &clocks{}
					a.clock = c.clock()
					f.set(entry("1", "web", "unix:uid:1"))
					a.start()
					synctest.Wait()
					s := a.cache.Subscribe(sel("unix:uid:1"))
					defer s.Close()
					wantPaths(t, s, "web")
					if away {
						f.stop()
						synctest.Wait()
					}
					notified(s)
					c.isSet(set)
					time.Sleep(10 * time.Minute)
					if notified(s) {
						t.Error("the workload was told of something")
					}
					wantPaths(t, s, "web")
					if n := len(f.seen().signed); n != 1 {
						t.Errorf("%d certificates were signed", n)
					}
					if got := a.series("assay_agent_clock_step_seconds")[""]; got != set.Seconds() {
						t.Errorf("the metric says %v", got)
					}
					if !away && !a.cache.Status().Connected {
						t.Error("not connected")
					}
					// The certificate ends when it ends, by the time since boot.
					if away {
						time.Sleep(50 * time.Minute)
						wantPaths(t, s, "!svid_expired_server_unreachable")
					} else {
						time.Sleep(50 * time.Minute)
						wantPaths(t, s, "web")
						if n := len(f.seen().signed); n < 2 || n > 3 {
							t.Errorf("%d certificates were signed: renewals don't come in their time", n)
						}
					}
				})
			})
		}
	}
}

// The clock was wrong and is set right: the server's time agrees, so the agent
// goes by it at once.
func TestClockThatIsSetRightIsBelieved(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		c := &clocks{}
		c.isSet(-2 * time.Hour) // the server has the bubble's time
		a.clock = c.clock()
		f.ttl = 4 * time.Hour // long enough to be good for both
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		c.isSet(0)
		time.Sleep(20 * time.Second)
		if got := a.series("assay_agent_clock_step_seconds")[""]; got != 0 {
			t.Errorf("the clock is still doubted: %v", got)
		}
		if s := a.cache.Status(); !s.Connected || time.Since(s.LastSync) > time.Minute {
			t.Errorf("%+v", s)
		}
	})
}

// NEG-58 d: the machine was suspended, or a virtual one stopped by its host, for
// three hours. Half a minute later there are new certificates.
func TestAfterAPauseCertificatesAreRenewed(t *testing.T) {
	for name, pause := range map[string]func(*clocks){
		"suspended": func(c *clocks) { c.sleeps(3 * time.Hour) },
		"stopped":   func(c *clocks) { c.isSet(3 * time.Hour) }, // its clock is set after that
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, a *agent) {
				c := &clocks{}
				a.clock = c.clock()
				f.clock = c.wall // the world's time
				f.set(entry("1", "web", "unix:uid:1"))
				a.start()
				synctest.Wait()
				s := a.cache.Subscribe(sel("unix:uid:1"))
				defer s.Close()
				wantPaths(t, s, "web")
				notified(s)
				pause(c)
				time.Sleep(30 * time.Second)
				if !notified(s) {
					t.Error("the workload was not told")
				}
				snap, err := s.Snapshot()
				if err != nil || snap.SVIDs[0].NotAfter.Before(f.clock().Add(59*time.Minute)) {
					t.Errorf("%v, %v", snap, err)
				}
			})
		})
	}
}

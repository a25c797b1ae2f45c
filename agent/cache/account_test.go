package cache_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/agent/cache"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// ackWorld is an agent with one entry of an hour and another of ten minutes,
// and the bundle 1.
type ackWorld struct {
	t *testing.T
	f *fake
	a *agent
}

// stream opens a stream for a uid and sends it what there is.
func (w *ackWorld) stream(uid int) *cache.Subscription {
	s := w.a.cache.Subscribe(sel(fmt.Sprintf("unix:uid:%d", uid)))
	w.send(s)
	return s
}

func (w *ackWorld) send(s *cache.Subscription) {
	s.Sent(must(s.Snapshot()))
	synctest.Wait()
}

// rotate adds a root: the next bundle.
func (w *ackWorld) rotate() {
	w.f.changeBundle(func() { w.f.bundled = append(w.f.bundled, newAuthority(fmt.Sprint("root ", w.f.sequence))) })
	synctest.Wait()
}

// acked returns the last acknowledgement.
func (w *ackWorld) acked() *agentv1.SyncRequest_Ack {
	w.f.mu.Lock()
	defer w.f.mu.Unlock()
	if len(w.f.acks) == 0 {
		return &agentv1.SyncRequest_Ack{}
	}
	return w.f.acks[len(w.f.acks)-1]
}

func (w *ackWorld) want(sequence uint64, waits time.Time) {
	w.t.Helper()
	synctest.Wait()
	ack := w.acked()
	var got time.Time
	if ack.GetWaitsUntil() != nil {
		got = ack.GetWaitsUntil().AsTime()
	}
	if ack.GetBundleSequence() != sequence || !got.Equal(waits) {
		w.t.Errorf("acknowledged %d until %v, want %d until %v", ack.GetBundleSequence(), got, sequence, waits)
	}
}

func end(s *cache.Subscription) time.Time { return must(s.Snapshot()).SVIDs[0].NotAfter }

// Design section 6: what acknowledgement of bundle n means.
func TestAcknowledgement(t *testing.T) {
	cases := []struct {
		name string
		run  func(w *ackWorld)
	}{
		{"nobody is served: at once", func(w *ackWorld) {
			w.want(1, time.Time{})
			w.rotate()
			w.want(2, time.Time{})
		}},
		{"an open stream holds it back until it was written", func(w *ackWorld) {
			s := w.stream(1)
			w.rotate()
			w.want(1, time.Time{})
			w.send(s)
			w.want(2, time.Time{})
		}},
		{"every open stream counts", func(w *ackWorld) {
			s1, s2, s3 := w.stream(1), w.stream(1), w.stream(2)
			w.rotate()
			w.send(s1)
			w.send(s3)
			w.want(1, time.Time{})
			w.send(s2)
			w.want(2, time.Time{})
		}},
		{"a stream that was sent nothing holds nothing back", func(w *ackWorld) {
			s := w.a.cache.Subscribe(sel("unix:uid:1"))
			defer s.Close()
			w.rotate()
			w.want(2, time.Time{})
		}},
		{"a stale write does not count", func(w *ackWorld) {
			s := w.stream(1)
			old := must(s.Snapshot())
			w.rotate()
			s.Sent(old)
			w.want(1, time.Time{})
			w.send(s)
			w.want(2, time.Time{})
		}},
		{"a stream closed before leaves its SVID behind", func(w *ackWorld) {
			s := w.stream(1)
			until := end(s)
			s.Close()
			w.want(1, time.Time{})
			w.rotate()
			w.want(2, until)
		}},
		{"a stream that closes instead of taking it", func(w *ackWorld) {
			s := w.stream(1)
			until := end(s)
			w.rotate()
			w.want(1, time.Time{})
			s.Close()
			w.want(2, until)
		}},
		{"the latest end counts, not the last close", func(w *ackWorld) {
			long, short := w.stream(1), w.stream(2)
			until := end(long)
			long.Close()
			short.Close()
			w.rotate()
			w.want(2, until)
		}},
		{"closed after it was written: nothing to wait for", func(w *ackWorld) {
			s := w.stream(1)
			w.rotate()
			w.send(s)
			s.Close()
			w.want(2, time.Time{})
		}},
		{"what was written last counts for the next bundle too", func(w *ackWorld) {
			s := w.stream(1)
			w.rotate()
			w.send(s)
			until := end(s)
			s.Close()
			w.rotate()
			w.want(3, until)
		}},
		{"waiting ends with the SVID", func(w *ackWorld) {
			s := w.stream(2)
			until := end(s)
			s.Close()
			w.rotate()
			w.want(2, until)
			time.Sleep(time.Until(until) + 31*time.Second)
			w.want(2, time.Time{})
		}},
		{"closing twice or sending after the close changes nothing", func(w *ackWorld) {
			s := w.stream(1)
			old := must(s.Snapshot())
			w.rotate()
			w.send(s)
			s.Close()
			s.Close()
			s.Sent(old)
			w.want(2, time.Time{})
			w.rotate()
			w.want(3, end(s))
		}},
		{"a new connection hears it again", func(w *ackWorld) {
			s := w.stream(1)
			w.rotate()
			w.send(s)
			w.want(2, time.Time{})
			n := len(w.f.seen().acks)
			w.a.conns.replace()
			synctest.Wait()
			if len(w.f.seen().acks) != n+1 {
				w.t.Errorf("%d acknowledgements on the new connection", len(w.f.seen().acks)-n)
			}
			w.want(2, time.Time{})
		}},
		{"a restart closes all streams: a later bundle waits", func(w *ackWorld) {
			s := w.stream(1)
			until := end(s)
			w.a.restart()
			synctest.Wait()
			w.want(1, time.Time{}) // what they have is this bundle
			w.rotate()
			w.wantBetween(2, until, until.Add(15*time.Minute))
		}},
		{"a restart in the middle of a rotation", func(w *ackWorld) {
			s := w.stream(1)
			until := end(s)
			w.rotate()
			w.a.restart() // durable, not yet written to the stream
			synctest.Wait()
			w.wantBetween(2, until, until.Add(15*time.Minute))
			time.Sleep(90 * time.Minute)
			w.want(2, time.Time{})
		}},
		{"a disk that was full when they were handed out, and a restart later", func(w *ackWorld) {
			w.a.breakState()
			s := w.stream(1)
			until := end(s)
			w.a.mendState()
			time.Sleep(16 * time.Second) // the longest tick
			w.a.restart()
			synctest.Wait()
			w.rotate()
			w.wantBetween(2, until, until.Add(15*time.Minute))
		}},
		{"what was never handed out does not count after a restart", func(w *ackWorld) {
			w.a.restart()
			synctest.Wait()
			w.rotate()
			w.want(2, time.Time{})
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, a *agent) {
				f.set(entry("1", "web", "unix:uid:1"), changed(entry("2", "db", "unix:uid:2"), ttl(10*time.Minute)))
				a.start()
				synctest.Wait()
				c.run(&ackWorld{t: t, f: f, a: a})
			})
		})
	}
}

func (w *ackWorld) wantBetween(sequence uint64, from, to time.Time) {
	w.t.Helper()
	synctest.Wait()
	ack := w.acked()
	if got := ack.GetWaitsUntil().AsTime(); ack.GetBundleSequence() != sequence || got.Before(from) || got.After(to) {
		w.t.Errorf("acknowledged %d until %v, want %d between %v and %v", ack.GetBundleSequence(), got, sequence, from, to)
	}
}

// The bundle is durable before it is acknowledged.
func TestBundleThatCantBeStoredIsNotAcknowledged(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		a.start()
		synctest.Wait()
		w := &ackWorld{t: t, f: f, a: a}
		w.want(1, time.Time{})
		a.breakState()
		w.rotate()
		time.Sleep(time.Minute)
		w.want(1, time.Time{})
		a.mendState()
		time.Sleep(time.Minute)
		w.want(2, time.Time{})
	})
}

// G2 asks what is alive under a root: what is held, what open streams have,
// and what closed streams left behind.
func TestReportsEverySVIDThatIsAlive(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"), entry("2", "db", "unix:uid:2"))
		a.start()
		synctest.Wait()
		w := &ackWorld{t: t, f: f, a: a}
		open, closed := w.stream(1), w.stream(2)
		until := end(closed)
		held := end(open)
		closed.Close()
		old := f.signer
		next := newAuthority("next")
		f.changeBundle(func() { f.bundled = append(f.bundled, next) })
		f.with(func() { f.signer = next })
		f.changeBundle(func() { old.tainted = true })
		report := func() map[string]*agentv1.SyncRequest_LiveSVIDs {
			time.Sleep(31 * time.Second)
			synctest.Wait()
			f.mu.Lock()
			defer f.mu.Unlock()
			live := map[string]*agentv1.SyncRequest_LiveSVIDs{}
			last := f.reports[len(f.reports)-1]
			for _, l := range last.GetLive() {
				live[l.GetAuthorityId()] = l
			}
			if last.GetRevision() != f.revision || time.Since(last.GetAgentTime().AsTime()) > 31*time.Second || !last.GetEarliestExpiry().IsValid() {
				t.Errorf("report %v", last)
			}
			return live
		}
		live := report()
		if l := live[next.id()]; l.GetCount() != 2 {
			t.Errorf("new root: %v", l)
		}
		// The open stream was not sent its new SVID yet.
		if l := live[old.id()]; l.GetCount() != 1 || !l.GetLatestExpiry().AsTime().Equal(held) && !l.GetLatestExpiry().AsTime().Equal(until) {
			t.Errorf("old root: %v", l)
		}
		w.send(open)
		if l := report()[old.id()]; l.GetCount() != 1 || !l.GetLatestExpiry().AsTime().Equal(until) {
			t.Errorf("old root after the open stream moved on: %v", l)
		}
		time.Sleep(time.Until(until))
		if l := report()[old.id()]; l != nil {
			t.Errorf("old root after the last SVID ended: %v", l)
		}
	})
}

// An open stream that was not sent its new SVID yet keeps the old one alive.
func TestReportsWhatOpenStreamsStillHave(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		w := &ackWorld{t: t, f: f, a: a}
		one, two := w.stream(1), w.stream(1)
		old, until := f.signer, end(one)
		next := newAuthority("next")
		f.changeBundle(func() { f.bundled = append(f.bundled, next) })
		f.with(func() { f.signer = next })
		f.changeBundle(func() { old.tainted = true })
		synctest.Wait() // the cache has a new SVID
		liveUnderOld := func() *agentv1.SyncRequest_LiveSVIDs {
			time.Sleep(31 * time.Second)
			synctest.Wait()
			f.mu.Lock()
			defer f.mu.Unlock()
			for _, l := range last(f.reports).GetLive() {
				if l.GetAuthorityId() == old.id() {
					return l
				}
			}
			return nil
		}
		w.send(one)
		if l := liveUnderOld(); l.GetCount() != 1 || !l.GetLatestExpiry().AsTime().Equal(until) {
			t.Errorf("with one stream left behind: %v", l)
		}
		w.send(two)
		if l := liveUnderOld(); l != nil {
			t.Errorf("with none: %v", l)
		}
	})
}

// What the sealed file would bring back after a restart counts as alive, until
// the file is written anew.
func TestReportsWhatARestartWouldBringBack(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		time.Sleep(time.Minute)
		old := f.signer
		liveUnderOld := func() bool {
			time.Sleep(31 * time.Second)
			synctest.Wait()
			f.mu.Lock()
			defer f.mu.Unlock()
			return slices.ContainsFunc(last(f.reports).GetLive(), func(l *agentv1.SyncRequest_LiveSVIDs) bool { return l.GetAuthorityId() == old.id() })
		}
		run, away := filepath.Dir(a.sealed()), filepath.Join(a.dir, "run.away")
		if err := os.Rename(run, away); err != nil {
			t.Fatal(err)
		}
		next := newAuthority("next")
		f.changeBundle(func() { f.bundled = append(f.bundled, next) })
		f.with(func() { f.signer = next })
		f.changeBundle(func() { old.tainted = true })
		if !liveUnderOld() {
			t.Error("the file has an SVID under the old root, and the report does not")
		}
		if err := os.Rename(away, run); err != nil {
			t.Fatal(err)
		}
		f.set(entry("2", "db", "unix:uid:2")) // the file is written again
		if liveUnderOld() {
			t.Error("the file was written anew, and the report has the old root")
		}
	})
}

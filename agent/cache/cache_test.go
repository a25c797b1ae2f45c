package cache_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

func TestServesWhatMatchesAndNothingElse(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1", "unix:gid:1"), entry("2", "db", "unix:uid:2"), entry("3", "any", "unix:gid:1"))
		a.start()
		synctest.Wait()
		both := a.cache.Subscribe(sel("unix:uid:1", "unix:gid:1", "unix:user:x"))
		defer both.Close()
		wantPaths(t, both, "web", "any")
		db := a.cache.Subscribe(sel("unix:uid:2"))
		defer db.Close()
		wantPaths(t, db, "db")
		none := a.cache.Subscribe(sel("unix:uid:3"))
		defer none.Close()
		if _, err := none.Snapshot(); fault.KindOf(err) != fault.Denied || fault.ReasonOf(err) != "no_identity" {
			t.Error(err)
		}
		empty := a.cache.Subscribe(nil)
		defer empty.Close()
		wantPaths(t, empty, "!no_identity")

		snap, err := both.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		if snap.TrustDomain != td || snap.BundleSequence != 1 || string(snap.BundleDER) != string(f.bundled[0].cert.Raw) {
			t.Error("bundle is not the server's")
		}
		for _, svid := range snap.SVIDs {
			chain := must(x509.ParseCertificates(svid.CertificatesDER))
			key := must(x509.ParsePKCS8PrivateKey(svid.Key.DER())).(*ecdsa.PrivateKey)
			if len(chain) != 2 || !key.PublicKey.Equal(chain[0].PublicKey) || chain[0].URIs[0].String() != svid.ID.String() {
				t.Errorf("SVID of %v does not hold together", svid.ID)
			}
			if svid.AuthorityID != f.signer.id() || !svid.NotAfter.Equal(chain[0].NotAfter) {
				t.Errorf("SVID of %v: authority %s, ends %v", svid.ID, svid.AuthorityID, svid.NotAfter)
			}
		}
	})
}

func TestBeforeTheFirstSyncNothingIsKnown(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.stop()
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "!not_synced")
		if _, err := s.Snapshot(); fault.KindOf(err) != fault.NotReady {
			t.Error(err)
		}
		f.set(entry("1", "web", "unix:uid:1"))
		f.start()
		awaitPaths(t, s, "web")
	})
}

// The time from an entry to its SVID in an open stream has no ticker in it.
func TestNewEntryReachesAWaitingSubscriptionAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "!no_identity")
		start := time.Now()
		f.set(entry("1", "web", "unix:uid:1"))
		awaitPaths(t, s, "web")
		if d := time.Since(start); d > 0 {
			t.Errorf("took %v of the bubble's time", d)
		}
		if snap, _ := s.Snapshot(); !snap.CommittedAt.Equal(start) {
			t.Errorf("committed at %v", snap.CommittedAt)
		}
	})
}

func TestSubscriptionsAreToldOfTheirOwnChangesOnly(t *testing.T) { // NEG-42
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		web := entry("1", "web", "unix:uid:1")
		f.set(web, entry("2", "db", "unix:uid:2"))
		a.start()
		synctest.Wait()
		one, two := a.cache.Subscribe(sel("unix:uid:1")), a.cache.Subscribe(sel("unix:uid:2"))
		defer one.Close()
		defer two.Close()
		wantPaths(t, one, "web")
		wantPaths(t, two, "db")
		steps := []struct {
			what string
			do   func()
			tell bool
			want []string
		}{
			{"nothing", func() {}, false, []string{"web"}},
			{"the same again", func() { f.set(web) }, false, []string{"web"}},
			{"revision only", func() { f.set(changed(web, func(e *agentv1.Entry) { e.Revision = 7 })) }, false, []string{"web"}},
			{"another entry", func() { f.set(entry("3", "api", "unix:uid:1")) }, true, []string{"web", "api"}},
			{"hint", func() { f.set(changed(web, func(e *agentv1.Entry) { e.Hint = "h" })) }, true, []string{"web", "api"}},
			{"TTL", func() { f.set(changed(web, ttl(time.Minute))) }, true, []string{"web", "api"}},
			{"removed", func() { f.remove("3") }, true, []string{"web"}},
			{"renamed", func() { f.set(changed(web, func(e *agentv1.Entry) { e.SpiffeId = "spiffe://example.org/new" })) }, true, []string{"new"}},
			{"selectors", func() { f.set(entry("1", "new", "unix:uid:9")) }, true, []string{"!no_identity"}},
		}
		for _, step := range steps {
			step.do()
			synctest.Wait()
			if got := notified(one); got != step.tell {
				t.Errorf("%s: told %v", step.what, got)
			}
			wantPaths(t, one, step.want...)
			if notified(one) {
				t.Errorf("%s: told of what it has just read", step.what)
			}
			if notified(two) {
				t.Errorf("%s: the other one was told", step.what)
			}
		}
		wantPaths(t, two, "db")
	})
}

// WL-25: a hundred changes while a stream is busy are one message to it.
func TestManyChangesAreOneNewState(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("0", "w/0", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "w/0")
		want := []string{"w/0"}
		for i := 1; i <= 100; i++ {
			path := fmt.Sprintf("w/%d", i)
			f.set(entry(fmt.Sprintf("%03d", i), path, "unix:uid:1"))
			want = append(want, path)
		}
		synctest.Wait()
		if !notified(s) {
			t.Error("not told")
		}
		wantPaths(t, s, want...)
		if notified(s) {
			t.Error("told again of the same state")
		}
	})
}

func TestHintAndSelectorChangesNeedNoNewSignature(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		e := entry("1", "web", "unix:uid:1")
		f.set(e)
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		before := must(s.Snapshot())
		f.set(changed(e, func(e *agentv1.Entry) { e.Hint = "h" }))
		synctest.Wait()
		after := must(s.Snapshot())
		if after.SVIDs[0].Hint != "h" || before.SVIDs[0].Hint != "" {
			t.Errorf("hints %q and %q: a snapshot must not change", before.SVIDs[0].Hint, after.SVIDs[0].Hint)
		}
		f.set(entry("1", "web", "unix:uid:2"))
		synctest.Wait()
		if len(f.seen().signed) != 1 {
			t.Errorf("signed %v", f.seen().signed)
		}
		for i, resign := range []func(*agentv1.Entry){ttl(time.Minute), func(e *agentv1.Entry) { e.DnsNames = []string{"a.example"} }} {
			f.set(changed(e, resign))
			synctest.Wait()
			if len(f.seen().signed) != 2+i {
				t.Errorf("change %d: signed %v", i, f.seen().signed)
			}
		}
	})
}

// The old identity is not served from the moment on at which the server says
// that the entry has another one, although its successor is not signed yet.
// NEG-42
func TestWithdrawnIdentityIsNotServedWhileTheNewOneIsSigned(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "old", "unix:uid:1"), entry("2", "other", "unix:uid:1"), entry("3", "alone", "unix:uid:3"))
		a.start()
		synctest.Wait()
		s, alone := a.cache.Subscribe(sel("unix:uid:1")), a.cache.Subscribe(sel("unix:uid:3"))
		defer s.Close()
		defer alone.Close()
		wantPaths(t, s, "old", "other")
		wantPaths(t, alone, "alone")
		hold := make(chan struct{})
		f.with(func() { f.hold = hold })
		f.set(entry("1", "new", "unix:uid:1"), entry("3", "renamed", "unix:uid:3"))
		synctest.Wait()
		wantPaths(t, s, "other")
		wantPaths(t, alone, "!svid_pending")
		if notified(alone) {
			t.Error("told of a state that lasts for one signature")
		}
		f.with(func() { f.hold = nil })
		close(hold)
		synctest.Wait()
		wantPaths(t, s, "new", "other")
		wantPaths(t, alone, "renamed")
	})
}

// Whoever has an identity that was withdrawn hears of it, though the server goes on
// signing what can't be used.
func TestAWithdrawnIdentityEndsWithoutAUsableSuccessor(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("e", "old", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		wantPaths(t, s, "old")
		f.changeBundle(func() {
			f.signer = newAuthority("root 2")
			f.signer.retired, f.bundled = true, append(f.bundled, f.signer)
		})
		synctest.Wait()
		wantPaths(t, s, "old")
		notified(s)
		f.set(entry("e", "new", "unix:uid:1"))
		<-time.After(time.Minute)
		if !notified(s) {
			t.Error("not told")
		}
		wantPaths(t, s, "!svid_pending")
	})
}

// A signature that was asked for before the entry changed is not used.
func TestSignatureForTheOldFormOfAnEntryIsDropped(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		hold := make(chan struct{})
		f.hold = hold
		f.set(entry("1", "old", "unix:uid:1"), entry("2", "gone", "unix:uid:1"))
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		synctest.Wait()
		f.with(func() { f.bad = func(spiffeid.ID, [][]byte) [][]byte { return nil } })
		f.set(entry("1", "new", "unix:uid:1"))
		f.remove("2")
		synctest.Wait()
		f.with(func() { f.hold, f.bad = nil, nil })
		close(hold)
		synctest.Wait()
		wantPaths(t, s, "new")
	})
}

// WL-33, WL-35: hints are unique, the oldest wins; order is by age, then ID.
func TestHintsAreUniqueAndTheOrderIsStable(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		aged := func(id, path, hint string, age time.Duration) *agentv1.Entry {
			e := entry(id, path, "unix:uid:1")
			e.Hint, e.CreatedAt = hint, timestamppb.New(born.Add(-age))
			return e
		}
		f.set(aged("c", "young", "x", time.Hour), aged("b", "old", "x", 3*time.Hour), aged("a", "middle", "y", 2*time.Hour),
			aged("z", "twin-z", "", time.Minute), aged("y", "twin-y", "", time.Minute))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		want := []string{"old", "middle", "twin-y", "twin-z"}
		wantPaths(t, s, want...)
		time.Sleep(5 * time.Hour) // several renewals
		wantPaths(t, s, want...)
		a.restart()
		s2 := a.cache.Subscribe(sel("unix:uid:1"))
		defer s2.Close()
		wantPaths(t, s2, want...)
		synctest.Wait()
		f.remove("b")
		synctest.Wait()
		wantPaths(t, s2, "middle", "young", "twin-y", "twin-z")
	})
}

func TestWhatTheServerSignedIsCheckedBeforeItIsServed(t *testing.T) {
	stranger := newAuthority("stranger")
	cases := map[string]func(f *fake, id spiffeid.ID, chain [][]byte) [][]byte{
		"nothing":   func(*fake, spiffeid.ID, [][]byte) [][]byte { return nil },
		"not X.509": func(*fake, spiffeid.ID, [][]byte) [][]byte { return [][]byte{{1}} },
		"no issuer": func(_ *fake, _ spiffeid.ID, c [][]byte) [][]byte { return c[:1] },
		"other key": func(f *fake, id spiffeid.ID, c [][]byte) [][]byte { return [][]byte{leafFor(f.signer, id), c[1]} },
		"other ID": func(f *fake, _ spiffeid.ID, c [][]byte) [][]byte {
			return [][]byte{leafFor(f.signer, spiffeid.RequireFromString("spiffe://example.org/x")), c[1]}
		},
		"other root": func(_ *fake, id spiffeid.ID, _ [][]byte) [][]byte {
			return [][]byte{leafFor(stranger, id), stranger.issuer.Raw}
		},
		"broken issuer": func(_ *fake, _ spiffeid.ID, c [][]byte) [][]byte { return [][]byte{c[0], {1}} },
		"foreign issuer after a good one": func(f *fake, id spiffeid.ID, c [][]byte) [][]byte {
			return [][]byte{leafFor(stranger, id), c[1]}
		},
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, a *agent) {
				f.set(entry("0", "fine", "unix:uid:0"))
				a.start()
				synctest.Wait()
				f.with(func() { f.bad = func(id spiffeid.ID, c [][]byte) [][]byte { return spoil(f, id, c) } })
				f.set(entry("1", "web", "unix:uid:1"))
				s := a.cache.Subscribe(sel("unix:uid:1"))
				defer s.Close()
				synctest.Wait()
				wantPaths(t, s, "!svid_pending")
				f.with(func() { f.bad = nil })
				awaitPaths(t, s, "web")
			})
		})
	}
}

func leafFor(a *authority, id spiffeid.ID) []byte {
	return sign(leafTemplate(id, time.Hour), a.issuer, &newKey().PublicKey, a.issuerKey).Raw
}

// The first snapshot has all that matches, as far as that can be had.
func TestFirstSnapshotWaitsForEveryEntryOrItsFirstFailure(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		hold := make(chan struct{})
		f.hold = hold
		f.refuse["2"] = fault.New(fault.Denied, "no_such_workload_on_node", "x")
		f.set(entry("1", "web", "unix:uid:1"), entry("2", "refused", "unix:uid:1"))
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		synctest.Wait()
		wantPaths(t, s, "!svid_pending")
		f.with(func() { f.hold = nil })
		close(hold)
		awaitPaths(t, s, "web")
		f.with(func() { clear(f.refuse) })
		awaitPaths(t, s, "web", "refused")
	})
}

func TestRefusedEntryIsTriedAgainWithGrowingPauses(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.refuse["1"] = fault.New(fault.NotFound, "entry_not_authorized", "x")
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		time.Sleep(time.Hour)
		synctest.Wait()
		n := len(f.seen().signed)
		if n < 50 || n > 400 {
			t.Errorf("%d attempts in an hour", n)
		}
		want := fmt.Sprintf("# HELP assay_agent_sign_failures_total X.509-SVIDs that the server did not sign when asked, by reason.\n"+
			"# TYPE assay_agent_sign_failures_total counter\nassay_agent_sign_failures_total{reason=\"entry_not_authorized\"} %d\n", n)
		if err := testutil.GatherAndCompare(a.reg, strings.NewReader(want), "assay_agent_sign_failures_total"); err != nil {
			t.Error(err)
		}
		wantPaths(t, s, "!svid_pending")
	})
}

func TestWaitingWorkloadGoesBeforePrefetch(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		hold := make(chan struct{})
		f.hold = hold
		var list []*agentv1.Entry
		for i := range 10_000 {
			list = append(list, entry(fmt.Sprintf("%05d", i), fmt.Sprintf("w/%d", i), fmt.Sprintf("unix:uid:%d", i)))
		}
		f.set(list...)
		a.start()
		synctest.Wait()
		calls := func() int { return len(f.seen().batches) }
		if n := calls(); n != 4 {
			t.Fatalf("%d calls in flight", n)
		}
		// Whatever is not under way yet comes behind one that is asked for.
		target := 9_999
		for slices.Contains(f.seen().signed, fmt.Sprintf("%05d", target)) {
			target--
		}
		s := a.cache.Subscribe(sel(fmt.Sprintf("unix:uid:%d", target), "unix:gid:1"))
		defer s.Close()
		synctest.Wait()
		batches := f.seen().batches
		last, n := batches[len(batches)-1], len(batches)
		if n != 5 || !slices.Equal(last, []string{fmt.Sprintf("%05d", target)}) {
			t.Errorf("%d calls, the last for %v", n, last)
		}
		for _, batch := range f.seen().batches {
			if len(batch) > 50 {
				t.Errorf("a batch of %d", len(batch))
			}
		}
		f.with(func() { f.hold, f.broken = nil, fault.New(fault.NotReady, "stop", "stop") })
		close(hold)
	})
}

func TestRenewsForDaysWithANewKeyEachTime(t *testing.T) {
	cases := []struct {
		life, span   time.Duration
		fewest, most int
	}{
		{time.Hour, 5 * 24 * time.Hour, 190, 310},
		{10 * time.Second, 10 * time.Minute, 90, 160}, // for demonstrations and tests
	}
	for _, c := range cases {
		t.Run(c.life.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, a *agent) {
				f.set(changed(entry("1", "web", "unix:uid:1"), ttl(c.life)))
				a.start()
				s := a.cache.Subscribe(sel("unix:uid:1"))
				defer s.Close()
				awaitPaths(t, s, "web")
				renewals := 0
				for end := time.Now().Add(c.span); time.Now().Before(end); {
					svid := must(s.Snapshot()).SVIDs[0]
					if left := time.Until(svid.NotAfter); left < c.life*3/10 {
						t.Fatalf("%v left", left)
					}
					select {
					case <-s.Changed():
						renewals++
					case <-time.After(c.life / 60):
					}
				}
				if renewals < c.fewest || renewals > c.most {
					t.Errorf("%d renewals in %v", renewals, c.span)
				}
				if len(f.seen().keys) < renewals {
					t.Errorf("%d keys", len(f.seen().keys))
				}
				for key, n := range f.seen().keys {
					if n > 1 {
						t.Fatalf("key %s was certified %d times", key, n)
					}
				}
			})
		})
	}
}

// I9, NEG-59: what is held is served through an outage until it ends, and then
// no longer.
func TestServesThroughAnOutageUntilTheSVIDEnds(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, a *agent) {
				f.set(entry("1", "web", "unix:uid:1"))
				a.start()
				synctest.Wait()
				s := a.cache.Subscribe(sel("unix:uid:1"))
				ends := must(s.Snapshot()).SVIDs[0].NotAfter
				f.stop()
				time.Sleep(35 * time.Minute)
				if restart {
					s.Close()
					a.restart()
					s = a.cache.Subscribe(sel("unix:uid:1"))
				}
				defer func() { s.Close() }()
				wantPaths(t, s, "web")
				time.Sleep(time.Until(ends) - time.Nanosecond)
				wantPaths(t, s, "web")
				notified(s)
				time.Sleep(time.Nanosecond)
				wantPaths(t, s, "!svid_expired_server_unreachable")
				if _, err := s.Snapshot(); fault.KindOf(err) != fault.NotReady {
					t.Error(err)
				}
				time.Sleep(time.Hour)
				if restart { // it stays so, and says why, over another one
					s.Close()
					a.restart()
					s = a.cache.Subscribe(sel("unix:uid:1"))
					wantPaths(t, s, "!svid_expired_server_unreachable")
				}
				f.start()
				if d := awaitPaths(t, s, "web"); d > 20*time.Second {
					t.Errorf("came back after %v", d)
				}
			})
		})
	}
}

func TestSubscribersAreToldWhenTheirSVIDEnds(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		ends := must(s.Snapshot()).SVIDs[0].NotAfter
		f.stop()
		<-s.Changed()
		if late := time.Since(ends); late < 0 || late > 15*time.Second {
			t.Errorf("told %v after the end", late)
		}
		wantPaths(t, s, "!svid_expired_server_unreachable")
	})
}

func TestIdleGroupsAreBounded(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:gid:1"))
		a.start()
		synctest.Wait()
		keep := a.cache.Subscribe(sel("unix:gid:1", "unix:uid:0"))
		defer keep.Close()
		for round := range 3 {
			for i := range 3000 {
				s := a.cache.Subscribe(sel("unix:gid:1", fmt.Sprintf("unix:uid:%d", i)))
				if round == 2 || i == 0 {
					wantPaths(t, s, "web")
				}
				s.Close()
			}
		}
		if n := cache.Groups(a.cache); n > 1100 {
			t.Errorf("%d groups", n)
		}
		f.set(entry("2", "two", "unix:gid:1"))
		synctest.Wait()
		wantPaths(t, keep, "web", "two")
	})
}

func TestErrorsOfWholeBatchesAreTriedAgainSoon(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.broken = fault.New(fault.Exhausted, "audit_full", "x")
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		s := a.cache.Subscribe(sel("unix:uid:1"))
		defer s.Close()
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := len(f.seen().batches); n < 8 || n > 100 {
			t.Errorf("%d attempts in a minute", n)
		}
		f.with(func() { f.broken = nil })
		if d := awaitPaths(t, s, "web"); d > 10*time.Second {
			t.Errorf("after %v", d)
		}
	})
}

func TestSnapshotsAreSharedByEqualSelectors(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("1", "web", "unix:uid:1"))
		a.start()
		synctest.Wait()
		one, two := a.cache.Subscribe(sel("unix:uid:1", "a:b")), a.cache.Subscribe(sel("a:b", "unix:uid:1"))
		defer two.Close()
		x, errX := one.Snapshot()
		y, errY := two.Snapshot()
		if errors.Join(errX, errY) != nil || x != y {
			t.Error("not shared")
		}
		one.Close()
		one.Close() // twice is once
		if z := must(two.Snapshot()); z != x {
			t.Error("changed without a change")
		}
	})
}

// A certificate that was lost on its way is asked for again with the same key: it
// may count at the server. A renewal has a key of its own.
func TestWhatWasLostIsAskedForWithTheSameKey(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("e", "e", "unix:uid:1"))
		f.with(func() { f.broken = fault.New(fault.NotReady, "x", "x") })
		a.start()
		<-time.After(time.Minute)
		lost := f.keysAsked()
		f.with(func() { f.broken = nil })
		<-time.After(time.Minute)
		after := f.keysAsked()
		if len(lost) < 3 || len(after) != len(lost)+1 || len(distinct(after)) != 1 {
			t.Errorf("asked for %d keys, %d times in vain and %d in all", len(distinct(after)), len(lost), len(after))
		}
		<-time.After(time.Hour)
		if renewed := f.keysAsked(); len(renewed) < len(after)+1 || len(distinct(renewed)) != 1+len(renewed)-len(after) {
			t.Errorf("%d renewals have %d keys", len(renewed)-len(after), len(distinct(renewed)))
		}
	})
}

// So is one that came and could not be used: it counts at the server in any case.
func TestWhatCannotBeUsedIsAskedForWithTheSameKey(t *testing.T) {
	for name, tc := range map[string]struct{ spoil, mend func(f *fake) }{
		"not by the rules": {
			func(f *fake) { f.bad = func(_ spiffeid.ID, chain [][]byte) [][]byte { return chain[:1] } },
			func(f *fake) { f.bad = nil },
		},
		"under a retired root": {
			func(f *fake) { f.signer.retired = true },
			func(f *fake) { f.signer = newAuthority("root 2"); f.bundled = append(f.bundled, f.signer) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, a *agent) {
				f.set(entry("e", "e", "unix:uid:1"))
				f.with(func() { tc.spoil(f) })
				a.start()
				<-time.After(time.Minute)
				useless := f.keysAsked()
				if st := a.cache.Status(); st.SVIDs != 0 || len(useless) < 3 || len(distinct(useless)) != 1 {
					t.Errorf("%d SVIDs; asked for %d keys, %d times", st.SVIDs, len(distinct(useless)), len(useless))
				}
				f.changeBundle(func() { tc.mend(f) })
				<-time.After(2 * time.Minute)
				if after := f.keysAsked(); a.cache.Status().SVIDs != 1 || len(after) != len(useless)+1 || len(distinct(after)) != 1 {
					t.Errorf("%d SVIDs; asked for %d keys, %d times more", a.cache.Status().SVIDs, len(distinct(after)), len(after)-len(useless))
				}
			})
		})
	}
}

func distinct(list []string) []string {
	list = slices.Clone(list)
	slices.Sort(list)
	return slices.Compact(list)
}

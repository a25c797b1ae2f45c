package ca

import (
	"context"
	"crypto"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

func TestRunEndsWithoutAnErrorWhenAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newWorld(t).open()
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() { result <- a.Run(ctx) }()
		advance(time.Minute)
		cancel()
		if err := <-result; err != nil {
			t.Errorf("got %v", err)
		}
	})
}

// A year of an idle server: issuers follow each other without a gap, always
// with room for the longest certificate, and no root is added.
func TestIssuersFollowEachOtherForAYear(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.opts.Config.RootTTL = 2 * 365 * 24 * time.Hour
		a := w.open()
		a.beat = 10 * time.Minute // two million beats of 15 s would add nothing but time
		start(t, a)
		seen := map[string]bool{}
		for day := range 365 {
			for range 24 {
				advance(time.Hour + 7*time.Second)
				info := a.Issuer()
				seen[info.ID] = true
				if left := time.Until(info.NotAfter); left < 12*time.Hour {
					t.Fatalf("day %d: the issuer ends in %v", day, left)
				}
			}
			a.hear(time.Now())
			leaf := issue(t, a, agentRequest())
			if left := time.Until(leaf.NotAfter); left < 12*time.Hour-2*time.Second {
				t.Fatalf("day %d: an agent's certificate was cut to %v", day, left)
			}
		}
		// Each lives 24 h and is replaced when 12 h 10 min remain.
		if len(seen) < 700 || len(seen) > 760 {
			t.Errorf("%d issuers in a year", len(seen))
		}
		if len(a.Bundle().Roots) != 1 || a.Bundle().Sequence != 1 {
			t.Errorf("the bundle has grown: %+v", a.Bundle())
		}
	})
}

// Under a root that is about to end, a new issuer would end no later: the last
// one stays, and is not replaced at every beat.
func TestLastIssuerOfARootStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.opts.Config = Config{RootTTL: 48 * time.Hour, IssuerTTL: 24 * time.Hour}
		a := w.open()
		start(t, a)
		root := a.Bundle().Roots[0].Certificate
		advance(40 * time.Hour)
		last := a.Issuer()
		if !last.NotAfter.Equal(root.NotAfter) {
			t.Errorf("the issuer ends at %v, the root at %v", last.NotAfter, root.NotAfter)
		}
		advance(7 * time.Hour)
		if got := a.Issuer(); got.ID != last.ID {
			t.Error("the issuer was replaced for nothing")
		}
		leaf := issue(t, a, agentRequest())
		if !leaf.NotAfter.Equal(root.NotAfter) { // X509-20
			t.Errorf("the leaf ends at %v, the root at %v", leaf.NotAfter, root.NotAfter)
		}
		advance(2 * time.Hour)
		_, err := a.IssueX509(t.Context(), w.origin(), []X509Request{agentRequest()})
		wantReason(t, err, fault.NotReady, "issuer_expired")
	})
}

func TestSilentStoreStopsSigning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.open()
		start(t, a)
		advance(time.Hour)
		issue(t, a, workload("/w"))
		w.kv.down.Store(true)
		advance(44 * time.Second) // the last beat was up to 15 s ago
		issue(t, a, workload("/w"))
		advance(17 * time.Second)
		_, err := a.IssueX509(t.Context(), w.origin(), []X509Request{workload("/w")})
		wantReason(t, err, fault.NotReady, "store_silent")
		if len(a.Bundle().Roots) != 1 {
			t.Error("the bundle is gone")
		}
		w.kv.down.Store(false)
		advance(16 * time.Second)
		issue(t, a, workload("/w"))
	})
}

// Commits count as signs of life, and so a server without Run signs for as
// long as it writes.
func TestCommitIsASignOfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.open()
		advance(50 * time.Second)
		need := marks{Stream: time.Now().Add(13 * time.Hour)} // further than marks are raised by themselves
		if err := a.coverMarks(t.Context(), a.Issuer().AuthorityID, need); err != nil {
			t.Fatal(err)
		}
		if got := w.storedMarks(a); !got.covers(need) {
			t.Errorf("marks %+v don't cover %+v", got, need)
		}
		advance(50 * time.Second)
		issue(t, a, workload("/w"))
		advance(11 * time.Second)
		_, err := a.IssueX509(t.Context(), w.origin(), []X509Request{workload("/w")})
		wantReason(t, err, fault.NotReady, "store_silent")
	})
}

// A suspended machine's monotonic clock stands still, a wall clock can be set:
// the one that says longer counts.
func TestBothClocksCountAsSilence(t *testing.T) {
	a := newWorld(t).open()
	now := time.Now()
	for name, c := range map[string]struct {
		monotonic, wall time.Duration // since the last sign of life
		silent          bool
	}{
		"just now":       {0, 0, false},
		"almost":         {silence, silence, false},
		"suspended":      {time.Second, time.Hour, true},
		"clock set back": {time.Hour, -time.Hour, true},
		"clock jitters":  {time.Second, -time.Hour, false},
	} {
		a.heard.Store(&sign{monotonic: now.Add(-c.monotonic), wall: now.Round(0).Add(-c.wall)})
		err := a.ready(now)
		if (fault.ReasonOf(err) == "store_silent") != c.silent || (err != nil) != c.silent {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// Another server's change between two reads of one loading is no corruption.
func TestChangeWhileReadingIsReadAgain(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	next, err := a.makeRoot(t.Context(), Prepared)
	if err != nil {
		t.Fatal(err)
	}
	changes := 0
	change := func() {
		if changes++; changes == 1 {
			w.change(a, nil, next)
		}
	}
	w.kv.onList.Store(&change)
	if err := a.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := a.Bundle().Sequence; got != 2 || changes != 2 {
		t.Errorf("sequence %d after %d readings", got, changes)
	}
}

// change sets states and adds authorities as a rotation does: records and
// sequence in one commit.
func (w *world) change(a *Authority, states map[string]State, added ...*authority) {
	w.t.Helper()
	v := a.current.Load().view
	all := append([]*authority(nil), added...)
	var writes []store.Write
	for _, one := range v.authorities {
		changed := *one
		if s, ok := states[one.record.ID]; ok {
			changed.record.State = s
		}
		all = append(all, &changed)
	}
	sortAuthorities(all)
	for _, one := range all {
		value, err := a.stamp.seal(rootPrefix+one.record.ID, one.record)
		if err != nil {
			w.t.Fatal(err)
		}
		writes = append(writes, store.Write{Key: rootPrefix + one.record.ID, Value: value})
	}
	value, err := a.stamp.seal(sequenceKey, nextSequence(v.sequence, all))
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(append(writes, store.Write{Key: sequenceKey, Value: value})...)
}

// Another server's change reaches this one by the watch, or without it by the
// next beat.
func TestStatesOfTheStoreAreFollowed(t *testing.T) {
	for name, deaf := range map[string]bool{"watch": false, "beat only": true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.kv.deaf.Store(deaf)
			a := w.open()
			start(t, a)
			wait := func() {
				if deaf {
					advance(beat + time.Second)
				} else {
					synctest.Wait()
				}
			}
			first, before := a.Issuer(), a.Bundle()
			next, err := a.makeRoot(t.Context(), Prepared)
			if err != nil {
				t.Fatal(err)
			}
			w.change(a, nil, next)
			wait()
			select {
			case <-before.Replaced():
			default:
				t.Fatalf("%s: the bundle was not replaced", name)
			}
			prepared := a.Bundle()
			if prepared.Sequence != 2 || len(prepared.Roots) != 2 || a.Issuer() != first {
				t.Errorf("%s: after prepare: sequence %d, %d roots, issuer %v", name, prepared.Sequence, len(prepared.Roots), a.Issuer())
			}
			old := first.AuthorityID
			w.change(a, map[string]State{old: Retired, next.record.ID: Active})
			wait()
			if got := a.Issuer().AuthorityID; got != next.record.ID {
				t.Fatalf("%s: after activate the issuer chains to %s", name, got)
			}
			// The new root came without marks: the first certificate raises one.
			leaf := issue(t, a, workload("/w"))
			if mark := w.storedMarks(a).Stream; mark.Before(leaf.NotAfter) {
				t.Errorf("%s: the new root's mark %v does not cover %v", name, mark, leaf.NotAfter)
			}
			w.change(a, map[string]State{old: Revoked})
			wait()
			if b := a.Bundle(); len(b.Roots) != 1 || b.Roots[0].ID != next.record.ID || b.Sequence != 4 {
				t.Errorf("%s: after revoke: %+v", name, b)
			}
			if len(a.Authorities()) != 2 {
				t.Errorf("%s: the revoked root's record is gone", name)
			}
			select {
			case <-prepared.Replaced():
			default:
				t.Errorf("%s: a bundle two changes old does not say so", name)
			}
		})
	}
}

// A server that has not heard of an activation yet must not raise the old
// root's mark: it learns of the change from the conflict.
func TestRetiredRootIsNeverRaised(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.open() // without Run: it hears of nothing
		next, err := a.makeRoot(t.Context(), Active)
		if err != nil {
			t.Fatal(err)
		}
		old := a.Issuer().AuthorityID
		advance(50 * time.Second)
		w.change(a, map[string]State{old: Retired}, next)
		w.kv.commits.Store(0)
		cur := *a.current.Load()
		stale := *cur.view.active
		stale.record.Marks = marks{}
		// As if the root's own marks had run out.
		cur.view = cur.view.replace(&stale)
		a.current.Store(&cur)
		leaf := issue(t, a, workload("/w"))
		if got := a.Issuer().AuthorityID; got != next.record.ID {
			t.Errorf("the certificate %x was signed under %s", leaf.SerialNumber, got)
		}
		record, err := w.kv.KV.Get(t.Context(), rootPrefix+old)
		if err != nil {
			t.Fatal(err)
		}
		var body authorityRecord
		if err := a.stamp.open(record.Key, record.Value, &body); err != nil {
			t.Fatal(err)
		}
		if !body.Marks.Stream.Equal(stale.record.CreatedAt.Add(12*time.Hour + 10*time.Minute)) {
			t.Errorf("the retired root's mark was moved to %v", body.Marks.Stream)
		}
	})
}

// I3 at run time: what fails its check ends Run and signing, whether the watch
// reports it or the beat finds it.
func TestCorruptionAtRunTimeStopsTheServer(t *testing.T) {
	damage := map[string]func(w *world, a *Authority){
		"root changed": func(w *world, _ *Authority) {
			record := w.raw()[0]
			record.Value[len(record.Value)/2] ^= 1
			w.put(store.Write{Key: record.Key, Value: record.Value})
		},
		"sequence changed": func(w *world, _ *Authority) {
			record := w.raw()[1]
			record.Value[len(record.Value)/2] ^= 1
			w.put(store.Write{Key: record.Key, Value: record.Value})
		},
		"root removed":     func(w *world, _ *Authority) { w.put(store.Write{Key: w.raw()[0].Key, Delete: true}) },
		"sequence removed": func(w *world, _ *Authority) { w.put(store.Write{Key: w.raw()[1].Key, Delete: true}) },
		"all removed": func(w *world, _ *Authority) {
			w.put(store.Write{Key: w.raw()[0].Key, Delete: true}, store.Write{Key: w.raw()[1].Key, Delete: true})
		},
		"record added": func(w *world, _ *Authority) { w.put(store.Write{Key: "authority/x509/0", Value: []byte("\x01{}")}) },
		"old mark put back": func(w *world, a *Authority) {
			old := w.raw()[0]
			if err := a.coverMarks(w.t.Context(), a.Issuer().AuthorityID, marks{Own: time.Now().Add(24 * time.Hour)}); err != nil {
				w.t.Fatal(err)
			}
			w.put(store.Write{Key: old.Key, Value: old.Value})
		},
		"state changed without the sequence": func(w *world, a *Authority) {
			record := a.current.Load().view.active.record
			record.State = Retired
			value, err := a.stamp.seal(rootPrefix+record.ID, record)
			if err != nil {
				w.t.Fatal(err)
			}
			w.put(store.Write{Key: rootPrefix + record.ID, Value: value})
		},
		"other states under one sequence": func(w *world, a *Authority) {
			next, err := a.makeRoot(w.t.Context(), Prepared)
			if err != nil {
				w.t.Fatal(err)
			}
			root, err := a.stamp.seal(rootPrefix+next.record.ID, next.record)
			if err != nil {
				w.t.Fatal(err)
			}
			all := []*authority{a.current.Load().view.active, next}
			sortAuthorities(all)
			sequence, err := a.stamp.seal(sequenceKey, sequenceRecord{Sequence: 1, Digest: digestStates(all)})
			if err != nil {
				w.t.Fatal(err)
			}
			w.put(store.Write{Key: rootPrefix + next.record.ID, Value: root}, store.Write{Key: sequenceKey, Value: sequence})
		},
		"sequence went back": func(w *world, a *Authority) {
			value, err := a.stamp.seal(sequenceKey, sequenceRecord{Sequence: 0, Digest: digestStates(a.current.Load().view.authorities)})
			if err != nil {
				w.t.Fatal(err)
			}
			w.put(store.Write{Key: sequenceKey, Value: value})
		},
	}
	for name, damageOnce := range damage {
		for _, deaf := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.kv.deaf.Store(deaf)
				a := w.open()
				if !deaf {
					a.beat = 24 * time.Hour // so that nothing but the watch can tell
				}
				result := start(t, a)
				advance(45 * time.Second)
				damageOnce(w, a)
				select {
				case err := <-result:
					if fault.ReasonOf(err) != "store_corrupt" || !errors.Is(err, fault.Precondition) {
						t.Errorf("%s, deaf %v: Run ended with %v", name, deaf, err)
					}
				case <-time.After(beat + time.Second):
					t.Errorf("%s, deaf %v: Run goes on", name, deaf)
				}
				_, err := a.IssueX509(t.Context(), w.origin(), []X509Request{workload("/w")})
				if fault.ReasonOf(err) != "store_corrupt" {
					t.Errorf("%s, deaf %v: signing answered %v", name, deaf, err)
				}
			})
		}
	}
}

// Trouble that can mend itself does not end Run.
func TestTroubleOfTheStoreIsSurvived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.open()
		result := start(t, a)
		for range 20 {
			w.kv.down.Store(true)
			advance(time.Minute)
			w.kv.down.Store(false)
			advance(time.Minute)
		}
		select {
		case err := <-result:
			t.Fatalf("Run ended with %v", err)
		default:
		}
		issue(t, a, workload("/w"))
	})
}

// What happened while no watch was open is not missed.
func TestWatchThatFellBehindIsBegunAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.open()
		a.beat = 24 * time.Hour // so that nothing but the watch can tell
		w.kv.compacted.Store(6)
		start(t, a)
		synctest.Wait()
		next, err := a.makeRoot(t.Context(), Prepared)
		if err != nil {
			t.Fatal(err)
		}
		w.change(a, nil, next)
		advance(10 * time.Second)
		if got := a.Bundle().Sequence; got != 2 {
			t.Errorf("sequence %d, want 2", got)
		}
		w.change(a, map[string]State{next.record.ID: Revoked})
		synctest.Wait()
		if got := a.Bundle().Sequence; got != 3 {
			t.Errorf("sequence %d, want 3: the watch was not begun anew", got)
		}
	})
}

// lockedKeys opens no key while it is locked, as a remote key service may.
type lockedKeys struct {
	Keys
	locked atomic.Bool
}

func (k *lockedKeys) Open(ctx context.Context, ref []byte) (crypto.Signer, error) {
	if k.locked.Load() {
		return nil, fault.New(fault.NotReady, "keys_unreachable", "the key service is down")
	}
	return k.Keys.Open(ctx, ref)
}

// Under a new root without an issuer nothing is signed, least of all with the
// old one; the next beat tries again.
func TestWithoutAnIssuerNothingIsSigned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		locked := &lockedKeys{Keys: w.opts.Keys}
		w.opts.Keys = locked
		a := w.open()
		start(t, a)
		next, err := a.makeRoot(t.Context(), Active)
		if err != nil {
			t.Fatal(err)
		}
		locked.locked.Store(true)
		w.change(a, map[string]State{a.Issuer().AuthorityID: Retired}, next)
		synctest.Wait()
		if got := a.Issuer(); got != (IssuerInfo{}) {
			t.Errorf("issuer %+v", got)
		}
		if got := a.Bundle().Sequence; got != 2 {
			t.Errorf("the bundle waits for the key: sequence %d", got)
		}
		_, err = a.IssueX509(t.Context(), w.origin(), []X509Request{workload("/w")})
		wantReason(t, err, fault.NotReady, "issuer_not_ready")
		locked.locked.Store(false)
		advance(beat + time.Second)
		issue(t, a, workload("/w"))
	})
}

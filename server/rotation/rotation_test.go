package rotation_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/rotation"
)

// A fleet that answers is through in a second.
func TestRotatesByItself(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a", "b", "c")
		first := s.authority.Issuer().AuthorityID
		st := s.begin(0)
		if st.Operation.ID == "" || st.Operation.From != first || st.Operation.Who != "uid 0" {
			t.Errorf("begun: %+v", st.Operation)
		}
		st = s.after(5 * time.Second)
		if st.Phase != rotation.Done || st.Operation.EndedAt.IsZero() || len(st.Operation.Missed) != 0 {
			t.Errorf("after it: %+v", st)
		}
		if s.state(first) != ca.Revoked || s.authority.Issuer().AuthorityID != st.To || len(s.authority.Bundle().Roots) != 1 {
			t.Errorf("the old root is %s, %s signs", s.state(first), s.authority.Issuer().AuthorityID)
		}
		for _, action := range []string{"rotation.start", "root.prepare", "root.activate", "root.revoke", "rotation.end"} {
			if n := s.audit.count(action, "ok"); n != 1 {
				t.Errorf("%d audit lines of %s", n, action)
			}
		}
		s.begin(0) // and again
		if st = s.after(5 * time.Second); st.Phase != rotation.Done {
			t.Errorf("the second: %+v", st)
		}
	})
}

// G1: one agent that has not the new root keeps it from signing, is named, and
// lets it go on once it answers. So does G2 with what it still holds.
// FED-4, FED-6
func TestWaitsForTheLastAgentAndNamesIt(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a", "b", "c")
		first := s.authority.Issuer().AuthorityID
		s.after(3 * time.Second)
		s.fleet()
		s.agent("b", func(a *agent) { a.asleep = true; a.status.Connected = false; a.status.LastSeen = time.Now() })
		s.begin(0)
		st := s.after(10 * time.Minute)
		if st.Phase != rotation.Publishing || st.Gate != rotation.BeforeActivate || st.Agents != 3 || st.Ready != 2 {
			t.Fatalf("%+v", st)
		}
		if len(st.Waits) != 1 || !strings.HasSuffix(st.Waits[0].AgentID, "/b") || !strings.Contains(st.Waits[0].Why, "last seen 10m0s ago") || st.Waits[0].Until.IsZero() {
			t.Fatalf("waits: %+v", st.Waits)
		}
		if s.authority.Issuer().AuthorityID != first {
			t.Fatal("the new root signs")
		}
		// It acknowledges, but has not reported since the root was retired.
		s.agent("b", func(a *agent) {
			a.status.AcknowledgedSequence = s.authority.Bundle().Sequence
			a.status.Authority, a.status.Live = first, nil
		})
		st = s.after(3 * time.Second)
		if st.Phase != rotation.Reissuing || len(st.Waits) != 1 || !strings.Contains(st.Waits[0].Why, "its own certificate") {
			t.Fatalf("%+v", st)
		}
		s.agent("b", func(a *agent) { a.status.Authority = st.To })
		if st = s.after(3 * time.Second); len(st.Waits) != 1 || !strings.Contains(st.Waits[0].Why, "has not reported") {
			t.Fatalf("%+v", st)
		}
		s.agent("b", func(a *agent) { a.asleep = false })
		if st = s.after(3 * time.Second); st.Phase != rotation.Done || s.state(first) != ca.Revoked {
			t.Fatalf("%+v", st)
		}
	})
}

// What nobody answers for any more does not hold it up for ever: an agent whose
// certificates have ended, one that is banned.
func TestGoneAgentsAreNotWaitedFor(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a", "gone", "bad")
		s.fleet()
		s.agent("gone", func(a *agent) { a.asleep = true })
		s.agent("bad", func(a *agent) { a.asleep = true; a.status.Banned = true })
		s.begin(0)
		if st := s.after(12*time.Hour + 50*time.Minute); st.Phase != rotation.Publishing || st.Agents != 2 {
			t.Fatalf("%+v", st)
		}
		if st := s.after(15 * time.Minute); st.Phase != rotation.Done {
			t.Fatalf("%+v", st)
		}
	})
}

// Certificates that were handed out without an agent are waited out, at both
// gates.
func TestHandedOutCertificatesAreWaitedOut(t *testing.T) { // FED-6
	w := rotation.World{Now: time.Unix(1000, 0)}
	root := ca.Root{ID: "a", State: ca.Retired, HandedBefore: time.Unix(2000, 0), HandedUntil: time.Unix(3000, 0)}
	if waits := w.Activate(root); len(waits) != 1 || !waits[0].Until.Equal(root.HandedBefore) {
		t.Errorf("before activation: %+v", waits)
	}
	if waits := w.Revoke(root); len(waits) != 1 || !waits[0].Until.Equal(root.HandedUntil) {
		t.Errorf("before revocation: %+v", waits)
	}
	w.Now = time.Unix(3000, 0)
	if n := len(w.Activate(root)) + len(w.Revoke(root)); n != 0 {
		t.Errorf("%d waits after their end", n)
	}
}

func TestAbort(t *testing.T) {
	for name, c := range map[string]struct {
		ready string // whether b takes part, so that the rotation gets so far
		at    rotation.Phase
	}{
		"before the new root signs": {"no", rotation.Publishing},
		"after":                     {"acknowledges", rotation.Reissuing},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *site) {
				s.join("a", "b")
				s.fleet()
				first := s.authority.Issuer().AuthorityID
				s.agent("b", func(a *agent) { a.asleep = true; a.status.Live = nil })
				s.begin(0)
				s.after(3 * time.Second)
				if c.ready == "acknowledges" {
					s.agent("b", func(a *agent) { a.status.AcknowledgedSequence = s.authority.Bundle().Sequence })
				}
				st := s.after(3 * time.Second)
				if st.Phase != c.at {
					t.Fatalf("%+v", st)
				}
				to := st.To
				if _, err := s.rotator.Abort(t.Context(), s.request()); err != nil {
					t.Fatal(err)
				}
				s.after(3 * time.Second)
				if s.authority.Issuer().AuthorityID != first {
					t.Fatal("the old root does not sign")
				}
				s.agent("b", func(a *agent) { a.asleep = false })
				st = s.after(3 * time.Second)
				if st.Phase != rotation.Aborted || s.state(first) != ca.Active || s.state(to) != ca.Revoked {
					t.Fatalf("%+v: old %s, new %s", st, s.state(first), s.state(to))
				}
				_, err := s.rotator.Abort(t.Context(), s.request())
				wantReason(t, err, "no_rotation")
			})
		})
	}
}

func TestAbortComesTooLate(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a", "b")
		s.fleet()
		s.agent("b", func(a *agent) { a.asleep = true })
		s.begin(time.Minute)
		if st := s.after(30 * time.Second); st.Phase != rotation.Reissuing || s.state(st.Operation.From) != ca.Tainted {
			t.Fatalf("%+v", st)
		}
		_, err := s.rotator.Abort(t.Context(), s.request())
		wantReason(t, err, "abort_too_late")
		if s.audit.count("rotation.abort", "precondition") != 1 {
			t.Error("the refusal is not in the audit log")
		}
	})
}

// An emergency meets its deadline and says whom it cut off.
func TestEmergencyMeetsItsDeadline(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a", "b", "c")
		s.fleet()
		_, err := s.rotator.Start(t.Context(), s.request(), time.Second)
		wantReason(t, err, "deadline_too_short")
		s.agent("b", func(a *agent) { a.asleep = true })
		s.begin(3 * time.Minute)
		if st := s.after(59 * time.Second); st.Phase != rotation.Publishing {
			t.Fatalf("%+v", st)
		}
		if st := s.after(2 * time.Second); st.Phase != rotation.Reissuing || s.state(st.Operation.From) != ca.Tainted ||
			len(st.Operation.Missed) != 1 || st.Left(time.Now()) > 2*time.Minute {
			t.Fatalf("%+v", st)
		}
		st := s.after(2 * time.Minute)
		if st.Phase != rotation.Done || s.state(st.Operation.From) != ca.Revoked || !slices.ContainsFunc(st.Operation.Missed, func(id string) bool { return strings.HasSuffix(id, "/b") }) {
			t.Fatalf("%+v", st)
		}
		// With everybody there it is over long before.
		s.agent("b", func(a *agent) { a.asleep = false })
		s.begin(3 * time.Minute)
		if st := s.after(5 * time.Second); st.Phase != rotation.Done || len(st.Operation.Missed) != 0 {
			t.Fatalf("%+v", st)
		}
	})
}

// A gate is forced with a reason only, for that gate only, and it is on record.
func TestForcedGate(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a", "b")
		s.fleet()
		_, err := s.rotator.Force(t.Context(), s.request())
		wantReason(t, err, "no_rotation")
		s.agent("b", func(a *agent) { a.asleep = true })
		s.begin(0)
		s.after(3 * time.Second)
		_, err = s.rotator.Force(t.Context(), rotation.Request{Who: "uid 0"})
		wantReason(t, err, "reason_missing")
		if _, err = s.rotator.Force(t.Context(), s.request()); err != nil {
			t.Fatal(err)
		}
		st := s.after(3 * time.Second)
		if st.Phase != rotation.Reissuing || st.Gate != rotation.BeforeRevoke || len(st.Operation.Missed) != 1 || len(st.Operation.Forced) != 1 {
			t.Fatalf("%+v", st)
		}
		if st = s.after(10 * time.Minute); st.Phase != rotation.Reissuing {
			t.Fatalf("the other gate was forced as well: %+v", st)
		}
		if s.audit.count("rotation.force", "ok") != 1 || s.audit.count("rotation.force", "invalid") != 1 {
			t.Error("audit lines are missing")
		}
		// Who reads the log sees which steps were forced, and of which rotation.
		for action, rule := range map[string]string{"rotation.start": "operator", "root.prepare": "operator", "rotation.force": "operator", "root.activate": "forced"} {
			lines := s.audit.taken(action)
			last := lines[len(lines)-1]
			if last.Why.Rule != rule || last.Target.OperationID != st.Operation.ID {
				t.Errorf("%s: rule %q, operation %q", action, last.Why.Rule, last.Target.OperationID)
			}
		}
		// A step by hand says so, too.
		if _, err := s.rotator.Abort(t.Context(), s.request()); err != nil {
			t.Fatal(err)
		}
		s.agent("b", func(a *agent) { a.asleep = false })
		if st = s.after(10 * time.Second); st.Phase != rotation.Aborted {
			t.Fatalf("%+v", st)
		}
		s.agent("b", func(a *agent) { a.asleep = true })
		if _, err := s.rotator.Prepare(t.Context(), s.request()); err != nil {
			t.Fatal(err)
		}
		_, err = s.rotator.Activate(t.Context(), s.request(), "", false)
		wantReason(t, err, "not_acknowledged")
		if _, err = s.rotator.Activate(t.Context(), s.request(), "", true); err != nil {
			t.Fatal(err)
		}
		lines := s.audit.taken("root.activate")
		if last := lines[len(lines)-1]; last.Why.Rule != "forced" || last.Why.Reason != "friday" || last.Result.Code != "ok" {
			t.Errorf("forced by hand: %+v", last)
		}
	})
}

// NEG-52: one rotation at a time, whoever asks.
func TestOneRotationAtATime(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a")
		s.fleet()
		s.agent("a", func(a *agent) { a.asleep = true })
		s.begin(0)
		_, err := s.rotator.Start(t.Context(), s.request(), 0)
		wantReason(t, err, "rotation_in_progress")
	})
	inBubble(t, func(t *testing.T, s *site) {
		if _, err := s.authority.Prepare(t.Context(), ca.Order{Operation: "by hand"}); err != nil {
			t.Fatal(err)
		}
		_, err := s.rotator.Start(t.Context(), s.request(), 0)
		wantReason(t, err, "rotation_in_progress")
	})
}

// Wherever the server dies, the rotation goes on to the same end.
func TestGoesOnAfterARestartAtAnyMoment(t *testing.T) {
	for at := range 12 {
		inBubble(t, func(t *testing.T, s *site) {
			s.join("a", "b")
			s.fleet()
			s.begin(0)
			time.Sleep(time.Duration(at) * 70 * time.Millisecond)
			s.kill()
			s.start()
			st := s.after(10 * time.Second)
			if st.Phase != rotation.Done || s.state(st.Operation.From) != ca.Revoked || len(s.authority.Authorities()) != 2 {
				t.Errorf("killed after %d: %+v, %d roots", at, st, len(s.authority.Authorities()))
			}
		})
	}
}

// The root of a year is replaced when a third of it remains, year after year,
// and an abort is respected for a day.
func TestRotatesWhenItIsTime(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.kill()
		s.opts.Config = ca.Config{RootTTL: 90 * time.Hour, IssuerTTL: 25 * time.Hour}
		s.automatic = true
		s.start() // with the root that has a year
		s.join("a")
		s.begin(0) // and now with one of 90 h
		st := s.after(5 * time.Second)
		second := st.To
		if st = s.after(59 * time.Hour); st.To != second {
			t.Fatalf("too early: %+v", st)
		}
		if st = s.after(2 * time.Hour); st.Operation.Who != "assay-server" || st.Phase != rotation.Done || s.state(second) != ca.Revoked {
			t.Fatalf("%+v", st)
		}
		// One that is taken back is not begun again the same day.
		third := st.To
		s.after(58 * time.Hour)
		s.fleet()
		s.agent("a", func(a *agent) { a.asleep = true })
		if st = s.after(3 * time.Hour); st.Operation.From != third || st.Phase != rotation.Publishing {
			t.Fatalf("%+v", st)
		}
		if _, err := s.rotator.Abort(t.Context(), s.request()); err != nil {
			t.Fatal(err)
		}
		aborted := s.after(23 * time.Hour)
		if aborted.Phase != rotation.Aborted || s.state(third) != ca.Active {
			t.Fatalf("%+v", aborted)
		}
		s.agent("a", func(a *agent) { a.asleep = false })
		if st = s.after(2 * time.Hour); st.Operation.ID == aborted.Operation.ID || st.Phase != rotation.Done {
			t.Fatalf("%+v", st)
		}
	})
}

package rotation_test

import (
	"testing"
	"time"

	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/rotation"
)

// decide stores what operators decide in the moment between a look of the
// rotation and its step.
func (s *site) decide(change func(*ca.Operation)) {
	s.t.Helper()
	op, err := s.authority.LastOperation(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	change(op)
	if err := s.authority.SaveOperation(s.t.Context(), op); err != nil {
		s.t.Fatal(err)
	}
}

// A taint that was made while the abort was decided wins: the root whose key
// may be in other hands does not stay in the bundle.
func TestAbortMeetsATaint(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a", "b")
		s.fleet()
		s.agent("b", func(a *agent) { a.asleep = true })
		s.begin(time.Minute)
		st := s.after(30 * time.Second)
		if s.state(st.Operation.From) != ca.Tainted {
			t.Fatalf("%+v", st)
		}
		s.decide(func(op *ca.Operation) { op.Abort = &ca.Decision{At: time.Now(), Who: "uid 0"} })
		if st = s.after(3 * time.Second); st.Phase != rotation.Reissuing {
			t.Fatalf("%+v", st)
		}
		if st = s.after(time.Minute); st.Phase != rotation.Done || s.state(st.Operation.From) != ca.Revoked || s.state(st.To) != ca.Active {
			t.Fatalf("%+v: old %s, new %s", st, s.state(st.Operation.From), s.state(st.To))
		}
	})
}

// What was forced on the way there was about the old root: on the way back the
// new one does not go before nobody needs it.
func TestAbortForgetsWhatWasForced(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		s.join("a", "b")
		s.fleet()
		s.agent("b", func(a *agent) { a.asleep = true })
		s.begin(0)
		s.after(3 * time.Second)
		s.agent("b", func(a *agent) { a.status.AcknowledgedSequence = s.authority.Bundle().Sequence })
		st := s.after(3 * time.Second)
		if st.Phase != rotation.Reissuing {
			t.Fatalf("%+v", st)
		}
		s.decide(func(op *ca.Operation) {
			now := time.Now()
			op.Forced = append(op.Forced, ca.Decision{Gate: string(rotation.BeforeRevoke), At: now, Who: "uid 0", Reason: "late"})
			op.Abort = &ca.Decision{At: now.Add(time.Millisecond), Who: "uid 0"}
		})
		if st = s.after(3 * time.Second); st.Phase != rotation.Aborting || s.state(st.To) != ca.Retired {
			t.Fatalf("%+v: new %s", st, s.state(st.To))
		}
		if _, err := s.rotator.Force(t.Context(), s.request()); err != nil {
			t.Fatal(err)
		}
		if st = s.after(3 * time.Second); st.Phase != rotation.Aborted || s.state(st.To) != ca.Revoked {
			t.Fatalf("%+v: new %s", st, s.state(st.To))
		}
	})
}

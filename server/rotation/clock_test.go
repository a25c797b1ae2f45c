package rotation_test

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/rotation"
)

// NEG-58: a server's clock that is set ahead makes no agent look gone and no
// certificate look ended: no gate opens by it, no deadline passes, and no
// rotation begins.
func TestAClockThatIsSetAheadOpensNoGate(t *testing.T) {
	inBubble(t, func(t *testing.T, s *site) {
		var ahead atomic.Int64
		began := time.Now()
		s.clock = schedule.NewClock(func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }, func() time.Duration { return time.Since(began) })
		s.automatic = true
		s.kill()
		s.start()
		s.join("a", "b")
		s.fleet()
		first := s.authority.Issuer().AuthorityID
		ahead.Store(int64(300 * 24 * time.Hour))
		if st := s.after(3 * time.Minute); st.Operation != nil {
			t.Fatalf("it began by itself: %+v", st.Operation)
		}
		ahead.Store(0)
		s.after(time.Minute)

		s.agent("b", func(a *agent) { a.asleep = true })
		s.begin(0)
		s.after(time.Minute)
		ahead.Store(int64(26 * time.Hour))
		st := s.after(time.Hour)
		if st.Phase != rotation.Publishing || len(st.Waits) != 2 || !strings.HasSuffix(st.Waits[0].AgentID, "/b") || !strings.Contains(st.Waits[1].Why, "set ahead by 26h0m0s") {
			t.Fatalf("before activation: %+v", st)
		}
		s.agent("b", func(a *agent) { a.asleep = false })
		st = s.after(3 * time.Second)
		if st.Phase != rotation.Done || s.state(first) != ca.Revoked {
			t.Fatalf("with all agents there: %+v", st)
		}

		ahead.Store(0)
		s.after(time.Minute)
		s.agent("a", func(a *agent) { a.asleep = true })
		s.begin(time.Hour)
		s.after(time.Minute)
		ahead.Store(int64(2 * time.Hour)) // past the deadline
		if st = s.after(10 * time.Minute); st.Phase != rotation.Publishing {
			t.Fatalf("an emergency: %+v", st)
		}
		if st = s.after(time.Hour); st.Phase != rotation.Done || len(st.Operation.Missed) == 0 {
			t.Fatalf("after its deadline: %+v", st)
		}
	})
}

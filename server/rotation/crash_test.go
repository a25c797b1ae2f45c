package rotation_test

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/keys"
	"github.com/seed-caa81108/assay/server/rotation"
	"github.com/seed-caa81108/assay/server/store"
)

// longLife is more moments than any rotation has.
const longLife = 1 << 30

var errDead = errors.New("this server is dead")

// mortal stands before everything that a server leaves behind: keys, lines of
// the audit log, commits. It counts the moments before and after each; from the
// one at which the server dies nothing is left behind any more.
type mortal struct {
	store.KV
	ca.Keys
	ledger *ledger
	look   func() // at every moment

	mu   sync.Mutex
	left int // moments to live
	dead string
}

// willDieIn lets a server live for so many moments.
func (m *mortal) willDieIn(moments int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.left, m.dead = moments, ""
}

// diedAt says where the server died; empty: it lives.
func (m *mortal) diedAt() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dead
}

func (m *mortal) do(what string, act func() error) error {
	if !m.lives("before " + what) {
		return errDead
	}
	err := act()
	if !m.lives("after " + what) {
		return errDead
	}
	return err
}

func (m *mortal) lives(moment string) bool {
	m.look()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.left--; m.left < 0 && m.dead == "" {
		m.dead = moment
	}
	return m.dead == ""
}

func (m *mortal) Commit(ctx context.Context, ifs []store.Precondition, writes []store.Write) (revision int64, err error) {
	err = m.do("the commit of "+writes[0].Key, func() (err error) {
		revision, err = m.KV.Commit(ctx, ifs, writes)
		return err
	})
	return revision, err
}

func (m *mortal) Create(ctx context.Context, kt keys.Type) (signer crypto.Signer, ref []byte, err error) {
	err = m.do("the making of a key", func() (err error) {
		signer, ref, err = m.Keys.Create(ctx, kt)
		return err
	})
	return signer, ref, err
}

func (m *mortal) Record(ctx context.Context, lines ...audit.Line) error {
	return m.do("the audit line "+lines[0].Action, func() error { return m.ledger.Record(ctx, lines...) })
}

// NEG-51: a server that dies before or after anything that it leaves behind, up
// to three times in a rotation and while it starts, too: the rotation comes to
// the same end, and at no moment does an agent hold what another one does not
// trust. The seed picks the moments.
func TestSurvivesCrashesOfManySeeds(t *testing.T) {
	died := map[string]int{}
	for seed := range uint64(80) {
		inBubble(t, func(t *testing.T, s *site) {
			defer func() {
				if t.Failed() {
					t.Logf("that was seed %d", seed)
				}
			}()
			crashAlong(t, s, rand.New(rand.NewPCG(seed, 51)), died)
		})
	}
	for _, moment := range []string{
		"the making of a key", "the audit line root.create", "the audit line root.prepare", "the audit line root.activate",
		"the audit line root.taint", "the audit line root.revoke", "the audit line rotation.end", "the commit of rotation/last",
	} {
		if died["before "+moment] == 0 || died["after "+moment] == 0 {
			t.Errorf("no server died before, or none after %s: %v", moment, died)
		}
	}
}

func crashAlong(t *testing.T, s *site, r *rand.Rand, died map[string]int) {
	m := &mortal{KV: s.opts.Store, Keys: s.opts.Keys, ledger: s.audit, look: func() { s.checkTrust(t) }, left: longLife}
	s.join("a", "b", "c")
	s.fleet()
	s.kill()
	s.opts.Store, s.opts.Keys, s.opts.Audit = m, m, m
	naps := rand.New(rand.NewPCG(r.Uint64(), 0)) // under the lock of the fleet
	s.dozes = func() bool { return m.diedAt() != "" || naps.IntN(3) == 0 }
	s.start()

	var deadline time.Duration
	if r.IntN(3) == 0 {
		deadline = 5 * time.Minute
	}
	for range 1 + r.IntN(3) {
		m.willDieIn(r.IntN(32))
		if _, err := s.rotator.Start(t.Context(), s.request(), deadline); err != nil && fault.ReasonOf(err) != "rotation_in_progress" && !errors.Is(err, errDead) {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(r.IntN(3000)) * time.Millisecond)
		synctest.Wait()
		s.kill() // if it lives yet, it dies where it is
		died[m.diedAt()]++
		m.willDieIn(r.IntN(12))
		if err := s.open(); errors.Is(err, errDead) {
			died[m.diedAt()]++
			m.willDieIn(longLife)
			s.start()
		} else if err != nil {
			t.Fatal(err)
		}
		s.after(time.Second)
		if m.diedAt() != "" {
			died[m.diedAt()]++
			s.kill()
			m.willDieIn(longLife)
			s.start()
		}
		m.willDieIn(longLife)
		s.checkStore(t)
	}
	if st := s.status(); st.Operation == nil { // no order ever got in
		s.begin(deadline)
	}
	st := s.after(time.Minute)
	if st.Phase != rotation.Done || s.state(st.Operation.From) != ca.Revoked || s.state(st.To) != ca.Active || len(st.Operation.Missed) > 0 {
		t.Errorf("after it: %+v %+v", st, st.Operation)
	}
	if n := s.checkStore(t); n != 1 || len(s.authority.Bundle().Roots) != 1 {
		t.Errorf("%d keys, %d roots are left", n, len(s.authority.Bundle().Roots))
	}
}

// checkStore returns how many keys the store has: never more than two, and as
// many as there are roots in the bundle.
func (s *site) checkStore(t *testing.T) (n int) {
	t.Helper()
	page, err := s.opts.Store.List(t.Context(), "authority/x509/", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	published := 0
	for _, record := range page.Records {
		var sealed struct {
			Body struct {
				State  ca.State        `json:"state"`
				KeyRef json.RawMessage `json:"key_ref"`
			} `json:"body"`
		}
		if err := json.Unmarshal(record.Value[1:], &sealed); err != nil {
			t.Fatal(err)
		}
		if key := string(sealed.Body.KeyRef); key != "null" {
			n++
		}
		if sealed.Body.State != ca.Revoked {
			published++
		}
	}
	if n > 2 || n != published || n == 0 {
		t.Errorf("%d keys for %d roots", n, published)
	}
	return n
}

// checkTrust holds what each agent and its workloads have against what every
// agent trusts.
func (s *site) checkTrust(t *testing.T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, holder := range s.agents {
		for _, verifier := range s.agents {
			trusted := func(id string) bool {
				return slices.ContainsFunc(verifier.trusts, func(root ca.Root) bool { return root.ID == id })
			}
			for _, live := range holder.status.Live {
				if !trusted(live.AuthorityID) {
					t.Errorf("%s holds an SVID that %s does not trust", holder.name, verifier.name)
				}
			}
			if !trusted(holder.status.Authority) {
				t.Errorf("%s has a certificate that %s does not trust", holder.name, verifier.name)
			}
		}
	}
}

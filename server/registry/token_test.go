package registry_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/store"
)

func TestTokenGivesTheAgentItNamed(t *testing.T) {
	s := start(t, t.TempDir())
	token, err := s.CreateToken(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(token.Value))
	want := "spiffe://example.org/assay/agent/join_token/" + hex.EncodeToString(sum[:16])
	if token.AgentID.String() != want || len(token.Value) < 52 || time.Until(token.ExpiresAt).Round(time.Minute) != 10*time.Minute {
		t.Errorf("got %s of %d characters until %v", token.AgentID, len(token.Value), token.ExpiresAt)
	}
	agent, err := s.RedeemToken(t.Context(), token.Value, key(1))
	if err != nil || agent != token.AgentID {
		t.Fatalf("%v, %v", agent, err)
	}
	if got, ok := s.Agent(agent); !ok || got.Attestor != registry.JoinToken || got.ActiveSerial != "" || got.CanReattest {
		t.Errorf("got %+v", got)
	}
	own, err := s.CreateToken(t.Context(), "0123456789abcdef0123456789abcdef", 0)
	if err != nil || own.Value != "0123456789abcdef0123456789abcdef" {
		t.Errorf("a token of one's own: %v", err)
	}
}

func TestTokenRules(t *testing.T) {
	s := start(t, t.TempDir())
	for reason, values := range map[string][]string{
		"token_weak": {
			"short", "0123456789abcdef012345", // 88 bits
			"012345678901234567890123456789012345", // digits only
			strings.Repeat("a", 64), strings.Repeat("Ab1", 30), strings.Repeat("0123456789abcdef", 17),
			"abcdefghijklmnopqrstuvwxy", // 25 letters of one case
		},
		"token_malformed": {"0123456789abcdef0123456789abcdef\n", "0123456789abcdef 0123456789abcdef", "0123456789abcdef0123456789abcdeé"},
	} {
		for _, value := range values {
			_, err := s.CreateToken(t.Context(), value, 0)
			wantFault(t, err, fault.Invalid, reason)
		}
	}
	for _, ttl := range []time.Duration{-time.Second, time.Second - 1, 24*time.Hour + 1} {
		_, err := s.CreateToken(t.Context(), "", ttl)
		wantFault(t, err, fault.Invalid, "token_ttl_out_of_range")
	}
	for _, value := range []string{
		"0f3c1d9a-7b52-4e61-9c8d-2a4b6f8e0d1c", "uNc5mUq2hJx0pZ7-Wd_3Rg", "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567",
	} {
		if _, err := s.CreateToken(t.Context(), value, time.Second); err != nil {
			t.Errorf("%s: %v", value, err)
		}
	}
}

func TestTokenIsNeverMadeTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		const value = "0123456789abcdef0123456789abcdef"
		if _, err := s.CreateToken(t.Context(), value, 0); err != nil {
			t.Fatal(err)
		}
		_, err := s.CreateToken(t.Context(), value, 0)
		wantFault(t, err, fault.Exists, "token_exists")
		agent, err := s.RedeemToken(t.Context(), value, key(1))
		if err != nil {
			t.Fatal(err)
		}
		issued(t, s.Registry, agent, "01", key(1))
		use(t, s.Registry, agent, "01")
		time.Sleep(48 * time.Hour) // the record of the token is gone, its agent is not
		_, err = s.CreateToken(t.Context(), value, 0)
		wantFault(t, err, fault.Exists, "token_exists")
	})
}

// NEG-11: whatever is wrong with a token, the answer is the same, and nothing
// is written.
func TestBadTokensCannotBeToldApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		make := func(ttl time.Duration) string {
			token, err := s.CreateToken(t.Context(), "", ttl)
			if err != nil {
				t.Fatal(err)
			}
			return token.Value
		}
		expired, used, good := make(time.Minute), make(time.Hour), make(time.Hour)
		agent, err := s.RedeemToken(t.Context(), used, key(1))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		before := s.Revision()
		bad := map[string]string{
			"unknown": strings.Repeat("x", 52), "empty": "", "expired": expired, "used by another key": used,
			"truncated": good[:51], "longer": good + "a", "other case": strings.ToUpper(good), "with line feed": good + "\n",
			"full width": strings.Map(func(c rune) rune { return c + 0xfee0 }, good), "combining mark": good + "\u0301",
			"NUL": good + "\x00", "huge": strings.Repeat("a", 1<<16), "traversal": "../../server", "invalid UTF-8": "\xff\xfe",
		}
		texts := map[string]bool{}
		for name, value := range bad {
			got, err := s.RedeemToken(t.Context(), value, key(2))
			if fault.KindOf(err) != fault.Denied || fault.ReasonOf(err) != "join_token_invalid" || !got.IsZero() {
				t.Errorf("%s: %v, %v", name, got, err)
			}
			texts[err.Error()] = true
		}
		if len(texts) != 1 {
			t.Errorf("different answers: %v", texts)
		}
		if list := s.Agents(); len(list) != 1 || list[0].ID != agent || s.Revision() != before {
			t.Errorf("something was written: %v", list)
		}
		if _, err := s.RedeemToken(t.Context(), good, key(2)); err != nil {
			t.Errorf("the good one: %v", err)
		}
	})
}

// NEG-12: many keys, one token, two servers on one store: one agent. // I8
func TestManyKeysOneTokenOneWinner(t *testing.T) {
	var kv *watchedKV
	s := start(t, t.TempDir(), func(o *registry.Options) {
		kv = &watchedKV{KV: o.Store}
		o.Store = kv
	})
	other, _ := run(t, options(kv))
	token, err := s.CreateToken(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	errs := make([]error, 100)
	kv.commits()
	var reading sync.WaitGroup // all have read the token before one commits
	reading.Add(len(errs))
	kv.before = func(n int) error {
		if n <= len(errs) {
			reading.Done()
			reading.Wait()
		}
		return nil
	}
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			_, errs[i] = []*registry.Registry{s.Registry, other}[i%2].RedeemToken(t.Context(), token.Value, key(i))
		})
	}
	wg.Wait()
	winner := -1
	for i, err := range errs {
		if err == nil {
			if winner >= 0 {
				t.Fatalf("keys %d and %d both won", winner, i)
			}
			winner = i
			continue
		}
		wantFault(t, err, fault.Denied, "join_token_invalid")
	}
	// The winner's server answered when its own view had the agent.
	if err := s.WaitRevision(t.Context(), other.Revision()); err != nil {
		t.Fatal(err)
	}
	if winner < 0 || len(s.Agents()) != 1 {
		t.Fatalf("winner %d, %d agents", winner, len(s.Agents()))
	}
	if _, err := other.RedeemToken(t.Context(), token.Value, key(winner)); err != nil { // NEG-14
		t.Errorf("the winner again, on the other server: %v", err)
	}
}

// NEG-14: the key that redeemed a token gets the same answer again while its
// SVID is unused and the window is open; any other key does not.
func TestSameKeyGetsTheSameAnswerForAWhile(t *testing.T) {
	cases := map[string]struct {
		window, after time.Duration
		ttl           time.Duration
		used          bool
		ok            bool
	}{
		"at once":                      {168 * time.Hour, 0, 0, false, true},
		"after two minutes":            {168 * time.Hour, 2 * time.Minute, 0, false, true},
		"token expired meanwhile":      {168 * time.Hour, 5 * time.Minute, time.Second, false, true},
		"at the end":                   {168 * time.Hour, 10 * time.Minute, 0, false, true},
		"after the end":                {168 * time.Hour, 10*time.Minute + time.Second, 24 * time.Hour, false, false},
		"after a short rejoin window":  {time.Minute, 61 * time.Second, 0, false, false},
		"within a short rejoin window": {time.Minute, 59 * time.Second, 0, false, true},
		"after the first use":          {168 * time.Hour, 0, 0, true, false},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := start(t, t.TempDir(), func(o *registry.Options) { o.RejoinWindow = c.window })
				token, err := s.CreateToken(t.Context(), "", c.ttl)
				if err != nil {
					t.Fatal(err)
				}
				agent, err := s.RedeemToken(t.Context(), token.Value, key(1))
				if err != nil {
					t.Fatal(err)
				}
				issued(t, s.Registry, agent, "01", key(1))
				if c.used {
					use(t, s.Registry, agent, "01")
				}
				time.Sleep(c.after)
				again, err := s.RedeemToken(t.Context(), token.Value, key(1))
				if c.ok && (err != nil || again != agent) {
					t.Errorf("%v, %v", again, err)
				}
				if !c.ok {
					wantFault(t, err, fault.Denied, "join_token_invalid")
				}
				_, err = s.RedeemToken(t.Context(), token.Value, key(2))
				wantFault(t, err, fault.Denied, "join_token_invalid")
				if len(s.Agents()) != 1 {
					t.Errorf("%d agents", len(s.Agents()))
				}
			})
		})
	}
}

// NEG-18: the store, the logs and a printed token have its hash at most.
func TestTokenValueIsNowhere(t *testing.T) {
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := start(t, t.TempDir(), func(o *registry.Options) { o.Log = logger })
	token, err := s.CreateToken(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	logger.Info("made", slog.Any("token", token))
	if _, err := s.RedeemToken(t.Context(), token.Value, key(1)); err != nil {
		t.Fatal(err)
	}
	_, err = s.RedeemToken(t.Context(), token.Value, key(2))
	fmt.Fprintln(&log, token, &token, err, fmt.Sprintf("%+v %#v %q", token, token, token))
	p, listErr := s.kv.List(t.Context(), "", "", 0)
	if listErr != nil {
		t.Fatal(listErr)
	}
	for _, rec := range p.Records {
		fmt.Fprintf(&log, "%s %s\n", rec.Key, rec.Value)
	}
	if strings.Contains(log.String(), token.Value) {
		t.Errorf("the token's value is in %s", log.String())
	}
}

func TestExpiredTokensGoFromTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		tokens := func() int {
			p, err := s.kv.List(t.Context(), "token/", "", 0)
			if err != nil {
				t.Fatal(err)
			}
			return len(p.Records)
		}
		for i := range 250 {
			if _, err := s.CreateToken(t.Context(), "", time.Duration(i+1)*time.Second); err != nil {
				t.Fatal(err)
			}
		}
		long, err := s.CreateToken(t.Context(), "", 24*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		join(t, s.Registry, key(1))
		if tokens() != 252 {
			t.Fatalf("%d tokens", tokens())
		}
		time.Sleep(250*time.Second + 2*registry.PruneEvery)
		if tokens() != 2 { // the long one, and the used one while its answer may be repeated
			t.Errorf("%d tokens left", tokens())
		}
		time.Sleep(10 * time.Minute)
		if tokens() != 1 {
			t.Errorf("%d tokens left", tokens())
		}
		if _, err := s.RedeemToken(t.Context(), long.Value, key(2)); err != nil {
			t.Error(err)
		}
	})
}

// tornKV is a store whose next commit of two records dies: before it happened,
// or after.
type tornKV struct {
	store.KV
	mode atomic.Int32 // 1: dies before, 2: dies after
}

func (k *tornKV) Commit(ctx context.Context, ifs []store.Precondition, writes []store.Write) (int64, error) {
	mode := int32(0)
	if len(writes) == 2 && !writes[0].Delete {
		mode = k.mode.Swap(0)
	}
	if mode == 2 {
		if _, err := k.KV.Commit(ctx, ifs, writes); err != nil {
			return 0, err
		}
	}
	if mode != 0 {
		return 0, fault.Wrap(fault.NotReady, store.ErrUnknown, "store_commit_unknown", "unknown")
	}
	return k.KV.Commit(ctx, ifs, writes)
}

// modelToken is what a token ought to be worth.
type modelToken struct {
	value    string
	agent    spiffeid.ID
	expires  time.Time
	redeemer string
	redeemed time.Time
	used     bool
}

func (m *modelToken) allows(keyHash string) bool {
	if m.redeemer == "" {
		return time.Now().Before(m.expires)
	}
	return m.redeemer == keyHash && !m.used && !time.Now().After(m.redeemed.Add(10*time.Minute))
}

// I8, NEG-12, NEG-14: over random redemptions, crashes before and after the
// commit, restarts and passing time, a token is worth what the model says.
func TestRedemptionFollowsTheModel(t *testing.T) {
	for seed := range uint64(10) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { redeemAtRandom(t, rand.New(rand.NewPCG(seed, 11))) })
		})
	}
}

func redeemAtRandom(t *testing.T, rnd *rand.Rand) {
	var torn *tornKV
	tear := func(o *registry.Options) {
		torn = &tornKV{KV: o.Store}
		o.Store = torn
	}
	s := start(t, t.TempDir(), tear)
	var tokens []*modelToken
	crash := func(mode int32, do func() error) {
		torn.mode.Store(mode)
		err := do()
		if torn.mode.Load() == 0 && !errors.Is(err, store.ErrUnknown) {
			t.Fatalf("an unknown outcome was answered with %v", err)
		}
		s = s.restart(t, tear)
	}
	for step := range 150 {
		if step%10 == 0 {
			made, err := s.CreateToken(t.Context(), "", time.Duration(1+rnd.IntN(1200))*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			tokens = append(tokens, &modelToken{value: made.Value, agent: made.AgentID, expires: made.ExpiresAt})
		}
		// Of three keys each: no key is certified for two agents.
		of := rnd.IntN(len(tokens))
		m, k := tokens[of], key(3*of+rnd.IntN(3))
		switch rnd.IntN(8) {
		case 0, 1, 2, 3:
			allowed := m.allows(k)
			agent, err := s.RedeemToken(t.Context(), m.value, k)
			if allowed != (err == nil) || allowed && agent != m.agent || !allowed && fault.ReasonOf(err) != "join_token_invalid" {
				t.Fatalf("step %d: %v, allowed %v", step, err, allowed)
			}
			if allowed && m.redeemer == "" {
				m.redeemer, m.redeemed = k, time.UnixMilli(time.Now().UnixMilli())
			}
		case 4: // dies before the commit: nothing has happened
			crash(1, func() error { _, err := s.RedeemToken(t.Context(), m.value, k); return err })
		case 5: // dies after the commit: it has happened, the answer is lost
			fresh := m.redeemer == "" && m.allows(k)
			crash(2, func() error { _, err := s.RedeemToken(t.Context(), m.value, k); return err })
			if fresh {
				m.redeemer, m.redeemed = k, time.UnixMilli(time.Now().UnixMilli())
			}
		case 6:
			if m.redeemer != "" && !m.used {
				issued(t, s.Registry, m.agent, fmt.Sprint(step), m.redeemer)
				use(t, s.Registry, m.agent, fmt.Sprint(step))
				m.used = true
			}
		case 7:
			time.Sleep(time.Duration(rnd.IntN(300)) * time.Second)
		}
	}
	joined := 0
	for _, m := range tokens {
		if m.redeemer != "" {
			joined++
		}
	}
	if n := len(s.Agents()); n != joined || joined == 0 {
		t.Errorf("%d agents, %d tokens were redeemed", n, joined)
	}
}

func TestTokenAndItsAliasAreOneCommit(t *testing.T) {
	s := start(t, t.TempDir())
	value := strings.Repeat("0123456789abcdef", 2)
	before := s.Revision()
	token, err := s.CreateTokenWithAlias(t.Context(), value, 0, id("/host/1"))
	if err != nil {
		t.Fatal(err)
	}
	if s.Revision() != before+1 {
		t.Errorf("%d commits", s.Revision()-before)
	}
	made, ok := s.Entry(token.Alias.ID)
	if !ok || made.SPIFFEID != id("/host/1") || made.ParentID != token.AgentID || made.Selectors[0].String() != "spiffe_id:"+token.AgentID.String() {
		t.Errorf("made %+v", made)
	}
	child := create(t, s.Registry, web("/a", id("/host/1")))
	wantView(t, s.Registry, token.AgentID) // not an agent yet
	agent, err := s.RedeemToken(t.Context(), value, key(1))
	if err != nil || agent != token.AgentID {
		t.Fatal(agent, err)
	}
	wantView(t, s.Registry, agent, child...)
	_, err = s.CreateTokenWithAlias(t.Context(), value, 0, id("/host/2"))
	wantFault(t, err, fault.Exists, "token_exists")
	_, err = s.CreateTokenWithAlias(t.Context(), "", 0, id("/assay/agent/x"))
	wantFault(t, err, fault.Invalid, "spiffe_id_invalid")
	if n := s.CountEntries(registry.EntryFilter{}); n != 2 {
		t.Errorf("%d entries", n)
	}
	if err := s.Evict(t.Context(), agent); err != nil {
		t.Fatal(err)
	}
	wantView(t, s.Registry, agent)
}

// NEG-58 c: what has ended by a clock that was set ahead is not removed, so that
// it is there when the clock is right again.
func TestAClockThatIsSetAheadRemovesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ahead atomic.Int64
		began := time.Now()
		clock := schedule.NewClock(func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }, func() time.Duration { return time.Since(began) })
		s := start(t, t.TempDir(), func(o *registry.Options) { o.Clock = clock })
		token, err := s.CreateToken(t.Context(), "", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		ending := web("/a", node(1))
		ending.ExpiresAt = time.Now().Add(time.Hour)
		create(t, s.Registry, ending)
		<-time.After(2 * registry.PruneEvery)
		ahead.Store(int64(30 * 24 * time.Hour))
		<-time.After(5 * registry.PruneEvery)
		if n := s.CountEntries(registry.EntryFilter{}); n != 1 {
			t.Errorf("%d entries", n)
		}
		if _, err := s.RedeemToken(t.Context(), token.Value, key(1)); err != nil {
			t.Error(err)
		}
		ahead.Store(0)
		<-time.After(registry.KeepExpired + 2*time.Hour)
		if n := s.CountEntries(registry.EntryFilter{}); n != 0 {
			t.Errorf("%d entries after their time", n)
		}
		if err := s.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

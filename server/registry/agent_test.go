package registry_test

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/registry"
)

// join redeems a new token with this key and returns the agent.
func join(t *testing.T, r *registry.Registry, keyHash string) spiffeid.ID {
	t.Helper()
	token, err := r.CreateToken(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	agent, err := r.RedeemToken(t.Context(), token.Value, keyHash)
	if err != nil || agent != token.AgentID {
		t.Fatalf("%v, %v", agent, err)
	}
	return agent
}

// issued records a certificate of 12 hours and fails the test if it can't.
func issued(t *testing.T, r *registry.Registry, agent spiffeid.ID, serial, keyHash string) {
	t.Helper()
	if err := r.RecordIssued(t.Context(), agent, registry.Issued{Serial: serial, KeyHash: keyHash, NotAfter: time.Now().Add(12 * time.Hour)}); err != nil {
		t.Fatal(err)
	}
}

func use(t *testing.T, r *registry.Registry, agent spiffeid.ID, serial string) {
	t.Helper()
	if err := useSerial(t, r, agent, serial); err != nil {
		t.Fatal(err)
	}
}

// useSerial shows a certificate of which nothing but the serial matters.
func useSerial(t *testing.T, r *registry.Registry, agent spiffeid.ID, serial string) error {
	adopted, err := r.UseSerial(t.Context(), agent, registry.Shown{Serial: serial})
	if adopted {
		t.Errorf("adopted %s", serial)
	}
	return err
}

// NEG-19: a renewed certificate is the active one from its first use on; until
// then both are good, afterwards the old one is not.
func TestRenewedCertificateReplacesTheOldAtItsFirstUse(t *testing.T) {
	s := start(t, t.TempDir())
	agent := join(t, s.Registry, key(1))
	wantFault(t, s.CheckAgent(agent, registry.Shown{Serial: "01"}), fault.Denied, "agent_svid_not_active")
	issued(t, s.Registry, agent, "01", key(1))
	for range 2 {
		if err := s.CheckAgent(agent, registry.Shown{Serial: "01"}); err != nil {
			t.Fatal(err)
		}
		use(t, s.Registry, agent, "01")
	}
	issued(t, s.Registry, agent, "02", key(2))
	s = s.restart(t) // pending survives
	for _, serial := range []string{"01", "02"} {
		if err := s.CheckAgent(agent, registry.Shown{Serial: serial}); err != nil {
			t.Fatalf("%s: %v", serial, err)
		}
	}
	use(t, s.Registry, agent, "01") // the old one in use changes nothing
	use(t, s.Registry, agent, "02")
	before := s.Revision()
	for _, serial := range []string{"01", "", "03"} {
		wantFault(t, s.CheckAgent(agent, registry.Shown{Serial: serial}), fault.Denied, "agent_svid_not_active")
		wantFault(t, useSerial(t, s.Registry, agent, serial), fault.Denied, "agent_svid_not_active")
	}
	use(t, s.Registry, agent, "02")
	got, ok := s.Agent(agent)
	if !ok || got.ActiveSerial != "02" || got.ActiveKey != key(2) || got.PendingSerial != "" || got.PendingKey != "" || !got.PendingNotAfter.IsZero() || s.Revision() != before {
		t.Errorf("got %+v", got)
	}
}

// NEG-19: a renewal under a certificate that is replaced while it is under way
// gives nothing: else a stolen key could outlive its replacement.
func TestRenewalUnderAReplacedCertificateIsRefused(t *testing.T) {
	s := start(t, t.TempDir())
	agent := join(t, s.Registry, key(1))
	issued(t, s.Registry, agent, "01", key(1))
	use(t, s.Registry, agent, "01")
	issued(t, s.Registry, agent, "02", key(2))
	// The holder of 01 was admitted before this and is being signed for.
	use(t, s.Registry, agent, "02")
	late := registry.Issued{Under: "01", Serial: "03", KeyHash: key(3), NotAfter: time.Now().Add(time.Hour)}
	wantFault(t, s.RecordIssued(t.Context(), agent, late), fault.Denied, "agent_svid_not_active")
	wantFault(t, s.CheckAgent(agent, registry.Shown{Serial: "03"}), fault.Denied, "agent_svid_not_active")
	late.Under = "02"
	if err := s.RecordIssued(t.Context(), agent, late); err != nil {
		t.Fatal(err)
	}
	use(t, s.Registry, agent, "03")
}

func TestLostRenewalCostsNothing(t *testing.T) {
	s := start(t, t.TempDir())
	agent := join(t, s.Registry, key(1))
	issued(t, s.Registry, agent, "01", key(1))
	use(t, s.Registry, agent, "01")
	issued(t, s.Registry, agent, "02", key(1)) // the answer is lost
	issued(t, s.Registry, agent, "03", key(1))
	wantFault(t, s.CheckAgent(agent, registry.Shown{Serial: "02"}), fault.Denied, "agent_svid_not_active")
	use(t, s.Registry, agent, "01")
	use(t, s.Registry, agent, "03")
	wantFault(t, s.CheckAgent(agent, registry.Shown{Serial: "01"}), fault.Denied, "agent_svid_not_active")
}

func TestManyFirstUsesAtOnceAreOne(t *testing.T) {
	s := start(t, t.TempDir())
	agent := join(t, s.Registry, key(1))
	issued(t, s.Registry, agent, "01", key(1))
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if err := useSerial(t, s.Registry, agent, "01"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got, _ := s.Agent(agent); got.ActiveSerial != "01" || got.PendingSerial != "" {
		t.Errorf("got %+v", got)
	}
}

func TestUnknownAgentIsRefused(t *testing.T) {
	s := start(t, t.TempDir())
	wantFault(t, s.CheckAgent(node(1), registry.Shown{Serial: "01"}), fault.Denied, "agent_unknown")
	wantFault(t, useSerial(t, s.Registry, node(1), "01"), fault.Denied, "agent_unknown")
	wantFault(t, s.RecordIssued(t.Context(), node(1), registry.Issued{Serial: "01", KeyHash: key(1), NotAfter: time.Now()}), fault.Denied, "agent_unknown")
	if err := s.RecordIssued(t.Context(), node(1), registry.Issued{Serial: "", KeyHash: key(1), NotAfter: time.Now()}); err == nil {
		t.Error("a certificate without serial was recorded")
	}
	if _, ok := s.Agent(node(1)); ok || len(s.Agents()) != 0 {
		t.Error("it has a record")
	}
}

// NEG-13: a ban holds on every road, and over a restart.
func TestBannedAgentIsRefusedEverywhere(t *testing.T) {
	s := start(t, t.TempDir())
	token, err := s.CreateToken(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.RedeemToken(t.Context(), token.Value, key(1)); err != nil {
		t.Fatal(err)
	}
	agent := token.AgentID
	issued(t, s.Registry, agent, "01", key(1))
	ban(t, s.Registry, agent)
	for range 2 {
		wantFault(t, s.CheckAgent(agent, registry.Shown{Serial: "01"}), fault.Denied, "agent_banned")
		wantFault(t, useSerial(t, s.Registry, agent, "01"), fault.Denied, "agent_banned")
		wantFault(t, s.RecordIssued(t.Context(), agent, registry.Issued{Serial: "02", KeyHash: key(1), NotAfter: time.Now()}), fault.Denied, "agent_banned")
		wantFault(t, s.Rejoinable(agent, key(1), time.Now()), fault.Denied, "rejoin_refused")
		_, err = s.RedeemToken(t.Context(), token.Value, key(1))
		wantFault(t, err, fault.Denied, "agent_banned")
		_, err = s.RedeemToken(t.Context(), token.Value, key(2))
		wantFault(t, err, fault.Denied, "join_token_invalid")
		s = s.restart(t)
	}
}

// An eviction ends everything, a ban included, and gives nothing back: neither
// the old certificate nor the old token.
func TestEvictedAgentHasToAttestAnew(t *testing.T) {
	s := start(t, t.TempDir())
	token, err := s.CreateToken(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.RedeemToken(t.Context(), token.Value, key(1)); err != nil {
		t.Fatal(err)
	}
	agent := token.AgentID
	issued(t, s.Registry, agent, "01", key(1))
	ban(t, s.Registry, agent)
	ban(t, s.Registry, agent) // again: nothing more happens
	if err := s.Evict(t.Context(), agent); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		wantFault(t, s.CheckAgent(agent, registry.Shown{Serial: "01"}), fault.Denied, "agent_unknown")
		wantFault(t, s.RecordIssued(t.Context(), agent, registry.Issued{Serial: "02", KeyHash: key(1), NotAfter: time.Now()}), fault.Denied, "agent_unknown")
		wantFault(t, s.Rejoinable(agent, key(1), time.Now()), fault.Denied, "rejoin_refused")
		_, err = s.RedeemToken(t.Context(), token.Value, key(1))
		wantFault(t, err, fault.Denied, "join_token_invalid")
		wantFault(t, s.Ban(t.Context(), agent), fault.NotFound, "agent_unknown")
		wantFault(t, s.Evict(t.Context(), agent), fault.NotFound, "agent_unknown")
		s = s.restart(t)
	}
}

func TestAgentsAreSortedByID(t *testing.T) {
	s := start(t, t.TempDir())
	for n := range 20 {
		join(t, s.Registry, key(n))
	}
	list := s.Agents()
	for i, a := range list {
		if i > 0 && a.ID.String() <= list[i-1].ID.String() || a.Attestor != registry.JoinToken || time.Since(a.AttestedAt) > time.Minute {
			t.Errorf("%d: %+v", i, a)
		}
	}
	if len(list) != 20 {
		t.Errorf("%d agents", len(list))
	}
}

func TestRejoin(t *testing.T) {
	const week = 7 * 24 * time.Hour
	cases := map[string]struct {
		prepare func(*testing.T, *registry.Registry, spiffeid.ID)
		key     int
		at      time.Duration // after the moment of issue; certificates live 12 h
		window  time.Duration
		ok      bool
	}{
		"active key while valid":        {active, 1, time.Hour, week, true},
		"active key after the end":      {active, 1, 13 * time.Hour, week, true},
		"at the end of the window":      {active, 1, 12*time.Hour + week, week, true},
		"after the window":              {active, 1, 12*time.Hour + week + time.Millisecond, week, false},
		"another key":                   {active, 2, 13 * time.Hour, week, false},
		"rejoin switched off":           {active, 1, time.Hour, 0, false},
		"never used":                    {never, 1, 13 * time.Hour, week, true},
		"never used, another key":       {never, 2, 13 * time.Hour, week, false},
		"nothing issued":                {nothing, 1, time.Hour, week, false},
		"renewed key not used yet":      {renewed, 2, 13 * time.Hour, week, true},
		"old key, renewal not used yet": {renewed, 1, 13 * time.Hour, week, true},
		"old key after the renewal":     {replaced, 1, 13 * time.Hour, week, false},
		"new key after the renewal":     {replaced, 2, 13 * time.Hour, week, true},
		"banned":                        {banned, 1, 13 * time.Hour, week, false},
		"attested in another way":       {otherwise, 1, 13 * time.Hour, week, false},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := start(t, t.TempDir())
				agent := join(t, s.Registry, key(1))
				begin := time.UnixMilli(time.Now().UnixMilli())
				c.prepare(t, s.Registry, agent)
				s = s.restart(t, func(o *registry.Options) { o.RejoinWindow = c.window })
				err := s.Rejoinable(agent, key(c.key), begin.Add(c.at))
				if c.ok && err != nil {
					t.Error(err)
				}
				if !c.ok {
					wantFault(t, err, fault.Denied, "rejoin_refused")
					if unknown := s.Rejoinable(node(99), key(1), begin); unknown.Error() != err.Error() {
						t.Errorf("%v and %v can be told apart", err, unknown)
					}
				}
				wantFault(t, s.Rejoinable(agent, "", begin), fault.Denied, "rejoin_refused")
			})
		})
	}
}

func nothing(*testing.T, *registry.Registry, spiffeid.ID) {}

func never(t *testing.T, r *registry.Registry, agent spiffeid.ID) {
	issued(t, r, agent, "01", key(1))
}

func active(t *testing.T, r *registry.Registry, agent spiffeid.ID) {
	never(t, r, agent)
	use(t, r, agent, "01")
}

func renewed(t *testing.T, r *registry.Registry, agent spiffeid.ID) {
	active(t, r, agent)
	issued(t, r, agent, "02", key(2))
}

func replaced(t *testing.T, r *registry.Registry, agent spiffeid.ID) {
	renewed(t, r, agent)
	use(t, r, agent, "02")
}

func banned(t *testing.T, r *registry.Registry, agent spiffeid.ID) {
	active(t, r, agent)
	ban(t, r, agent)
}

func otherwise(t *testing.T, r *registry.Registry, agent spiffeid.ID) {
	active(t, r, agent)
	if err := r.ChangeAgent(t.Context(), agent, func(a *registry.Agent) { a.Attestor = "x509pop" }); err != nil {
		t.Fatal(err)
	}
}

func ban(t *testing.T, r *registry.Registry, agent spiffeid.ID) {
	t.Helper()
	if err := r.Ban(t.Context(), agent); err != nil {
		t.Fatal(err)
	}
}

// An agent that can attest again does so at any time; the certificate that it
// has is good until the next one is used. A ban holds, an eviction lifts it.
func TestAttestedAgentComesBackAtAnyTime(t *testing.T) {
	s := start(t, t.TempDir())
	id := spiffeid.RequireFromString("spiffe://example.org/assay/agent/x509pop/ab")
	facts := func(values ...string) (set selector.Set) {
		for _, v := range values {
			set = append(set, selector.Selector{Type: "x509pop", Value: v})
		}
		return selector.NewSet(set...)
	}
	attested := func(set selector.Set, keyHash string) error {
		return s.RecordAttested(t.Context(), id, "x509pop", set, keyHash, "")
	}
	if err := attested(facts("subject:cn:a"), key(1)); err != nil {
		t.Fatal(err)
	}
	issued(t, s.Registry, id, "01", key(1))
	use(t, s.Registry, id, "01")
	if err := attested(facts("subject:cn:a", "serialnumber:01"), key(2)); err != nil {
		t.Fatal(err)
	}
	use(t, s.Registry, id, "01")
	issued(t, s.Registry, id, "02", key(2))
	use(t, s.Registry, id, "02")
	wantFault(t, s.CheckAgent(id, registry.Shown{Serial: "01"}), fault.Denied, "agent_svid_not_active")
	s = s.restart(t)
	got, ok := s.Agent(id)
	if !ok || got.Attestor != "x509pop" || !got.CanReattest || len(got.Selectors) != 2 || got.ActiveSerial != "02" || got.AttestedAt.IsZero() {
		t.Fatalf("got %+v", got)
	}
	wantFault(t, s.Rejoinable(id, key(2), time.Now()), fault.Denied, "rejoin_refused")
	if err := attested(facts("subject:cn:a\n"), key(2)); err == nil {
		t.Error("a selector that can't be stored was taken")
	}
	if err := s.Ban(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	wantFault(t, attested(facts("subject:cn:a"), key(3)), fault.Denied, "agent_banned")
	if err := s.Evict(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := attested(nil, key(2)); err != nil {
		t.Fatal(err)
	}
	if got, _ := s.Agent(id); got.ActiveSerial != "" || got.Banned || len(got.Selectors) != 0 {
		t.Errorf("after the eviction: %+v", got)
	}
}

// NEG-19: a key is one agent's, from when it is certified until it is replaced
// or the agent evicted; the index follows the records, across restarts too.
func TestKeyIsCertifiedForOneAgent(t *testing.T) {
	s := start(t, t.TempDir())
	a, b := join(t, s.Registry, key(1)), join(t, s.Registry, key(2))
	issued(t, s.Registry, a, "01", key(1))
	check := func(id spiffeid.ID, n int, free bool) {
		t.Helper()
		err := s.CheckKey(id, key(n))
		if free != (err == nil) || err != nil && (fault.KindOf(err) != fault.Denied || fault.ReasonOf(err) != "binding_mismatch") {
			t.Errorf("key %d: %v", n, err)
		}
		if strings.Contains(fault.SafeText(err), a.String()) {
			t.Error("the refusal names the agent that has the key")
		}
	}
	for range 2 {
		check(a, 1, true)
		check(b, 1, false)
		check(b, 2, true)
		check(b, 3, true)
		s = s.restart(t)
	}
	wantFault(t, s.RecordAttested(t.Context(), b, "x509pop", nil, key(1), ""), fault.Denied, "binding_mismatch")
	token, err := s.CreateToken(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.RedeemToken(t.Context(), token.Value, key(1))
	wantFault(t, err, fault.Denied, "binding_mismatch")
	if _, err := s.RedeemToken(t.Context(), token.Value, key(4)); err != nil {
		t.Errorf("the token was used up: %v", err)
	}
	use(t, s.Registry, a, "01")
	issued(t, s.Registry, a, "02", key(5))
	check(b, 1, false) // active
	check(b, 5, false) // pending
	use(t, s.Registry, a, "02")
	check(b, 1, true) // replaced
	check(b, 5, false)
	if err := s.Evict(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	check(b, 5, true)
}

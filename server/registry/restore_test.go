package registry_test

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/registry"
)

// restored stops s, makes its store fit for use as a restore does, and opens it
// again.
func (s *server) restored(t testing.TB, takenAt time.Time, after ...registry.Act) (*server, registry.Restored) {
	t.Helper()
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	kv := openStore(t, s.dir)
	done, err := registry.Restore(t.Context(), registry.RestoreOptions{TrustDomain: td, ReservedPrefix: "/assay/", Store: kv, TakenAt: takenAt, After: after})
	if err != nil {
		t.Fatal(err)
	}
	if err := kv.Close(); err != nil {
		t.Fatal(err)
	}
	return start(t, s.dir), done
}

// unrecorded is a certificate that the store has no record of.
func unrecorded(serial, keyHash string, at time.Time) registry.Shown {
	return registry.Shown{Serial: serial, KeyHash: keyHash, NotBefore: at.Add(-2 * time.Minute), NotAfter: at.Add(12 * time.Hour), Authority: "root"}
}

func TestARestoreVoidsTokensAndRepeatsBans(t *testing.T) {
	s := start(t, t.TempDir())
	kept, banned, evicted, before := join(t, s.Registry, key(1)), join(t, s.Registry, key(2)), join(t, s.Registry, key(3)), join(t, s.Registry, key(4))
	if err := s.Ban(t.Context(), before); err != nil {
		t.Fatal(err)
	}
	var tokens []string
	for range 250 { // more than a commit holds
		token, err := s.CreateToken(t.Context(), "", 0)
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, token.Value)
	}
	create(t, s.Registry, web("/web", kept))
	epoch := s.Epoch()
	// Those that the backup does not know: evicted again, and one that could
	// attest by itself.
	unknown := id("/assay/agent/x509pop/0123")
	s, done := s.restored(t, time.Now(), registry.Act{Agent: banned}, registry.Act{Agent: evicted, Evict: true},
		registry.Act{Agent: node(9)}, registry.Act{Agent: node(9), Evict: true}, registry.Act{Agent: before}, registry.Act{Agent: unknown},
		registry.Act{Agent: id("/workload")}, registry.Act{Agent: node(8), Evict: true})
	bans := []string{banned.String(), before.String(), unknown.String()}
	slices.Sort(bans)
	if done.Tokens != 254 || fmt.Sprint(done.Banned) != fmt.Sprint([]spiffeid.ID{banned, node(9), unknown}) || fmt.Sprint(done.Evicted) != fmt.Sprint([]spiffeid.ID{evicted, node(9)}) || !slices.Equal(done.Bans, bans) {
		t.Errorf("done %+v", done)
	}
	if s.Epoch() == epoch {
		t.Error("the epoch is the old one")
	}
	for _, token := range tokens {
		_, err := s.RedeemToken(t.Context(), token, key(5))
		wantFault(t, err, fault.Denied, "join_token_invalid")
	}
	wantFault(t, s.CheckAgent(banned, registry.Shown{Serial: "01"}), fault.Denied, "agent_banned")
	wantFault(t, s.CheckAgent(before, registry.Shown{Serial: "01"}), fault.Denied, "agent_banned")
	wantFault(t, s.CheckAgent(evicted, registry.Shown{Serial: "01"}), fault.Denied, "agent_unknown")
	wantFault(t, s.CheckAgent(node(9), registry.Shown{Serial: "01"}), fault.Denied, "agent_unknown")
	wantFault(t, s.RecordAttested(t.Context(), unknown, "x509pop", nil, key(6), ""), fault.Denied, "agent_banned")
	if s.CountEntries(registry.EntryFilter{}) != 1 {
		t.Error("the entry is gone")
	}
	if _, again := s.restored(t, time.Now()); again.Tokens != 0 || !slices.Equal(again.Bans, bans) {
		t.Errorf("done again: %+v", again)
	}
}

func TestARestoreIsForTheSameTrustDomain(t *testing.T) {
	s := start(t, t.TempDir())
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	for _, o := range []registry.RestoreOptions{
		{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org"), ReservedPrefix: "/assay/"},
		{TrustDomain: td, ReservedPrefix: "/spire/"},
	} {
		kv := openStore(t, s.dir)
		before := kv.Revision()
		o.Store = kv
		_, err := registry.Restore(t.Context(), o)
		wantFault(t, err, fault.Precondition, "config_store_mismatch")
		if kv.Revision() != before {
			t.Error("the store was changed")
		}
		if err := kv.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// NEG-19, over a restore: what an agent renewed since the backup is adopted,
// and of several the newest wins, whoever comes first.
func TestARestoredRegistryAdoptsTheNewestCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		agent := join(t, s.Registry, key(1))
		issued(t, s.Registry, agent, "01", key(1))
		use(t, s.Registry, agent, "01")
		other := join(t, s.Registry, key(7))
		issued(t, s.Registry, other, "71", key(7))
		takenAt := time.Now()
		<-time.After(time.Hour)
		stolen, newest := unrecorded("02", key(2), time.Now()), unrecorded("03", key(3), time.Now().Add(time.Hour))
		tooOld := unrecorded("00", key(1), takenAt.Add(-time.Hour))
		tooOld.NotAfter = newest.NotAfter.Add(time.Hour) // lives were longer then
		notOurs := unrecorded("04", key(7), time.Now())
		wantFault(t, s.CheckAgent(agent, stolen), fault.Denied, "agent_svid_not_active") // not restored
		<-time.After(2 * time.Hour)

		s, _ = s.restored(t, takenAt)
		<-time.After(time.Minute)
		later := unrecorded("05", key(5), time.Now().Add(5*time.Minute))
		for name, shown := range map[string]registry.Shown{"before the backup": tooOld, "after the restore": later} {
			if err := s.CheckAgent(agent, shown); fault.ReasonOf(err) != "agent_svid_not_active" {
				t.Errorf("%s: %v", name, err)
			}
		}
		wantFault(t, s.CheckAgent(agent, notOurs), fault.Denied, "binding_mismatch")
		wantFault(t, s.CheckAgent(node(9), stolen), fault.Denied, "agent_unknown")

		adopt := func(shown registry.Shown, want bool, reason string) {
			t.Helper()
			adopted, err := s.UseSerial(t.Context(), agent, shown)
			if adopted != want || (err != nil) != (reason != "") || err != nil && fault.ReasonOf(err) != reason {
				t.Fatalf("%s: adopted %v, %v", shown.Serial, adopted, err)
			}
		}
		adopt(stolen, true, "")
		adopt(stolen, false, "")
		adopt(registry.Shown{Serial: "01"}, false, "agent_svid_not_active")
		adopt(newest, true, "")
		adopt(stolen, false, "agent_svid_not_active")
		got, _ := s.Agent(agent)
		if got.ActiveSerial != "03" || got.ActiveKey != key(3) || !got.NotAfter.Equal(newest.NotAfter) || got.Authority != "root" || got.PendingSerial != "" {
			t.Errorf("record %+v", got)
		}
		// From here on it renews as ever.
		if err := s.RecordIssued(t.Context(), agent, registry.Issued{Under: "03", Serial: "06", KeyHash: key(6), NotAfter: time.Now().Add(12 * time.Hour)}); err != nil {
			t.Fatal(err)
		}
		use(t, s.Registry, agent, "06")
		if err := s.Ban(t.Context(), agent); err != nil {
			t.Fatal(err)
		}
		wantFault(t, s.CheckAgent(agent, newest), fault.Denied, "agent_banned")
		if err := s.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// An agent that has attested since the restore is never taken back to what was
// signed before it, also not while its new certificate is being made.
func TestAnAgentThatAttestedSinceTheRestoreAdoptsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		takenAt := time.Now()
		<-time.After(time.Hour)
		lost := unrecorded("02", key(2), time.Now())
		s, _ = s.restored(t, takenAt)
		<-time.After(time.Minute)
		agent := id("/assay/agent/x509pop/0123")
		if err := s.RecordAttested(t.Context(), agent, "x509pop", nil, key(1), ""); err != nil {
			t.Fatal(err)
		}
		wantFault(t, s.CheckAgent(agent, lost), fault.Denied, "agent_svid_not_active")
		if err := s.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// A second restore does not forget what was missing since the first.
func TestAgentsThatWereAwayOverTwoRestoresAreAdopted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		agent := join(t, s.Registry, key(1))
		issued(t, s.Registry, agent, "01", key(1))
		use(t, s.Registry, agent, "01")
		first := time.Now()
		<-time.After(time.Hour)
		away := unrecorded("02", key(2), time.Now())
		<-time.After(time.Hour)
		s, _ = s.restored(t, first)
		<-time.After(2 * time.Hour)
		s, _ = s.restored(t, time.Now())
		if adopted, err := s.UseSerial(t.Context(), agent, away); !adopted || err != nil {
			t.Errorf("adopted %v, %v", adopted, err)
		}
		if err := s.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestOfTwoWhoAreAdoptedAtOnceTheNewestIsLeft(t *testing.T) {
	s := start(t, t.TempDir())
	agent := join(t, s.Registry, key(1))
	issued(t, s.Registry, agent, "01", key(1))
	use(t, s.Registry, agent, "01")
	s, _ = s.restored(t, time.Now())
	ends := make(chan error, 10)
	for i := range 10 {
		shown := unrecorded(fmt.Sprintf("1%d", i), key(10+i), time.Now())
		shown.NotAfter = shown.NotAfter.Add(time.Duration(i+1) * time.Minute)
		go func() {
			_, err := s.UseSerial(t.Context(), agent, shown)
			ends <- err
		}()
	}
	for range 10 {
		if err := <-ends; err != nil && fault.ReasonOf(err) != "agent_svid_not_active" {
			t.Error(err)
		}
	}
	if got, _ := s.Agent(agent); got.ActiveSerial != "19" {
		t.Errorf("active is %s", got.ActiveSerial)
	}
}

// An agent that may come with a certificate that the record does not know counts
// for as long as one can be valid: a rotation waits for it.
func TestAnAgentThatMayBeAdoptedCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		agent := join(t, s.Registry, key(1))
		issued(t, s.Registry, agent, "01", key(1))
		use(t, s.Registry, agent, "01")
		if st := s.Fleet()[0]; !st.Until.Equal(st.Ends()) {
			t.Errorf("without a restore it counts until %v, and its certificate ends at %v", st.Until, st.Ends())
		}
		takenAt := time.Now()
		<-time.After(20 * time.Hour)
		lost := unrecorded("03", key(3), time.Now())
		<-time.After(time.Hour)
		s, _ = s.restored(t, takenAt)
		<-time.After(2 * time.Hour) // it was cut off
		if st := s.Fleet()[0]; st.Until.Before(lost.NotAfter) || st.Until.After(lost.NotAfter.Add(time.Hour)) {
			t.Errorf("it counts until %v, and what it has ends at %v", st.Until, lost.NotAfter)
		}
		if err := s.CheckAgent(agent, lost); err != nil {
			t.Error(err)
		}
		if err := s.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

package registry_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/server/registry"
)

func TestFleetJoinsRecordsWithClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		silent, talker := join(t, s.Registry, key(1)), join(t, s.Registry, key(2))
		issued(t, s.Registry, talker, "01", key(2))
		use(t, s.Registry, talker, "01")
		status := func() map[string]registry.AgentStatus {
			list := s.Fleet()
			if len(list) != 2 || list[0].ID.String() > list[1].ID.String() {
				t.Fatalf("got %+v", list)
			}
			return map[string]registry.AgentStatus{list[0].ID.String(): list[0], list[1].ID.String(): list[1]}
		}
		c := s.Connected(talker, "1.2.3\x1b[31m"+strings.Repeat("x", 100))
		waits, earliest := time.Now().Add(time.Hour), time.Now().Add(20*time.Minute)
		time.Sleep(time.Second)
		c.Ack(7, waits)
		time.Sleep(time.Second)
		c.Report(registry.Report{
			Live:           []registry.LiveSVIDs{{AuthorityID: "a", Count: 2}, {AuthorityID: "b", Count: 3}},
			EarliestExpiry: earliest, AgentTime: time.Now().Add(-3 * time.Second), Revision: 42,
		})
		seen := time.Now()
		got := status()[talker.String()]
		if !got.Connected || !got.LastSeen.Equal(seen) || got.AcknowledgedSequence != 7 || got.WaitsUntil.UnixMilli() != waits.UnixMilli() ||
			got.LiveCount() != 5 || !got.EarliestExpiry.Equal(earliest) || got.ClockOffset != -3*time.Second || got.Revision != 42 || got.ActiveSerial != "01" {
			t.Errorf("got %+v", got)
		}
		if len(got.Version) > 64 || strings.ContainsRune(got.Version, 0x1b) || !strings.HasPrefix(got.Version, "1.2.3") {
			t.Errorf("version %q", got.Version)
		}
		if a, _ := s.Agent(talker); a.Version != got.Version {
			t.Errorf("the agent says %q", a.Version)
		}
		if got := status()[silent.String()]; got.Connected || !got.LastSeen.IsZero() || got.Version != "" {
			t.Errorf("an agent that never spoke: %+v", got)
		}
		time.Sleep(time.Minute)
		c.Close()
		c.Close()
		c.Ack(8, time.Time{})
		if got := status()[talker.String()]; got.Connected || !got.LastSeen.Equal(seen) || got.AcknowledgedSequence != 7 {
			t.Errorf("after the end of the stream: %+v", got)
		}
	})
}

func TestNewerStreamHasTheWord(t *testing.T) {
	s := start(t, t.TempDir())
	agent := join(t, s.Registry, key(1))
	old := s.Connected(agent, "1")
	renewed := s.Connected(agent, "2")
	renewed.Ack(5, time.Time{})
	old.Ack(4, time.Time{})
	if got := s.Fleet()[0]; got.AcknowledgedSequence != 5 || got.Version != "2" {
		t.Errorf("the older stream took the word: %+v", got)
	}
	renewed.Close()
	old.Ack(6, time.Time{})
	if got := s.Fleet()[0]; got.AcknowledgedSequence != 6 || !got.Connected {
		t.Errorf("the stream that is left is not heard: %+v", got)
	}
	old.Close()
	if s.Fleet()[0].Connected {
		t.Error("still connected")
	}
}

func TestReportIsBoundedAndCopied(t *testing.T) {
	s := start(t, t.TempDir())
	c := s.Connected(join(t, s.Registry, key(1)), "")
	defer c.Close()
	live := make([]registry.LiveSVIDs, 1000)
	c.Report(registry.Report{Live: live})
	live[0].Count = 9
	if got := s.Fleet()[0].Live; len(got) > 100 || got[0].Count != 0 {
		t.Errorf("%d kept, first %+v", len(got), got[0])
	}
}

func TestClaimsOfAgentsWithoutRecordAreForgotten(t *testing.T) {
	s := start(t, t.TempDir())
	c := s.Connected(node(5), "9")
	c.Ack(1, time.Time{})
	if len(s.Fleet()) != 0 {
		t.Error("an agent without a record is shown")
	}
	c.Close()
	s.Fleet()
	c = s.Connected(node(5), "9")
	defer c.Close()
	c.Report(registry.Report{})
}

func TestMetrics(t *testing.T) {
	s := start(t, t.TempDir())
	create(t, s.Registry, many(3, node(1))...)
	join(t, s.Registry, key(0)) // never uses its SVID
	current, expired, barred := join(t, s.Registry, key(1)), join(t, s.Registry, key(2)), join(t, s.Registry, key(3))
	ends := time.Unix(4000000000, 0)
	if err := s.RecordIssued(t.Context(), current, registry.Issued{Serial: "01", KeyHash: key(1), NotAfter: ends}); err != nil {
		t.Fatal(err)
	}
	use(t, s.Registry, current, "01")
	if err := s.RecordIssued(t.Context(), expired, registry.Issued{Serial: "01", KeyHash: key(2), NotAfter: time.Now().Add(-time.Minute)}); err != nil {
		t.Fatal(err)
	}
	use(t, s.Registry, expired, "01")
	ban(t, s.Registry, barred)
	if _, err := s.RedeemToken(t.Context(), "wrong", key(1)); err == nil {
		t.Fatal("redeemed")
	}
	err := testutil.GatherAndCompare(s.reg, strings.NewReader(`
# HELP assay_agent_svid_earliest_not_after_timestamp_seconds When the first of the current agents' SVIDs ends, in Unix time; absent without current agents.
# TYPE assay_agent_svid_earliest_not_after_timestamp_seconds gauge
assay_agent_svid_earliest_not_after_timestamp_seconds 4e+09
# HELP assay_join_tokens_redeemed_total Attempts to redeem a join token: ok, repeated (same key, answer lost), invalid, banned or failed.
# TYPE assay_join_tokens_redeemed_total counter
assay_join_tokens_redeemed_total{result="banned"} 0
assay_join_tokens_redeemed_total{result="failed"} 0
assay_join_tokens_redeemed_total{result="invalid"} 1
assay_join_tokens_redeemed_total{result="ok"} 4
assay_join_tokens_redeemed_total{result="repeated"} 0
# HELP assay_registry_agents Agents on record: current (unexpired SVID), expired, banned, or new (none used yet).
# TYPE assay_registry_agents gauge
assay_registry_agents{state="banned"} 1
assay_registry_agents{state="current"} 1
assay_registry_agents{state="expired"} 1
assay_registry_agents{state="new"} 1
# HELP assay_registry_entries Registration entries in the store, expired ones included.
# TYPE assay_registry_entries gauge
assay_registry_entries 3
`), "assay_agent_svid_earliest_not_after_timestamp_seconds", "assay_join_tokens_redeemed_total", "assay_registry_agents", "assay_registry_entries")
	if err != nil {
		t.Error(err)
	}
	if n := testutil.CollectAndCount(s.reg, "assay_registry_revision"); n != 1 {
		t.Errorf("%d revisions", n)
	}
}

// The outage budget is that of the agent whose workloads are the first to be
// without an identity; what a banned one says does not count.
func TestFirstExpiryIsTheFleetsOutageBudget(t *testing.T) {
	s := start(t, t.TempDir())
	now := time.Now()
	if _, at := s.FirstExpiry(now); !at.IsZero() {
		t.Errorf("without agents: %v", at)
	}
	report := func(n int, expiry time.Time) spiffeid.ID {
		id := join(t, s.Registry, key(n))
		claims := s.Connected(id, "v1")
		claims.Report(registry.Report{EarliestExpiry: expiry, AgentTime: now})
		claims.Close() // what was said stays
		return id
	}
	report(1, now.Add(40*time.Minute))
	report(2, now.Add(-time.Minute))
	report(3, time.Time{})
	first, banned := report(4, now.Add(31*time.Minute)), report(5, now.Add(5*time.Minute))
	if err := s.Ban(t.Context(), banned); err != nil {
		t.Fatal(err)
	}
	if agent, at := s.FirstExpiry(now); agent != first || !at.Equal(now.Add(31*time.Minute)) {
		t.Errorf("got %v at %v, want %v in 31 minutes", agent, at, first)
	}
}

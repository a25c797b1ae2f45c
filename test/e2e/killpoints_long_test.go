//go:build e2e && long

package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/test/harness"
)

// How often each point is killed at.
const rounds = 10

func armed(point string) string { return "ASSAY_FAILPOINT=" + point }

// P3, NEG-12, NEG-14: whatever the moment of the crash, the token's first key
// gets in without a human and no other key does.
func TestJoinSurvivesKills(t *testing.T) {
	for _, point := range []string{"redeem_before", "redeem_after", "audit_written:2", "attest_reply"} {
		t.Run(point, func(t *testing.T) {
			for range rounds {
				joinUnderKill(t, point)
			}
		})
	}
}

func joinUnderKill(t *testing.T, point string) {
	s := harness.NewSite(t, killable.built(t), "")
	s.StartServer()
	a := s.NewAgent("agent")
	token := a.Join()
	s.Server.Stop(9)

	// The server's own leaf passes audit_written first.
	s.LaunchServer(armed(point))
	a.Launch(token)
	awaitKill(t, s.Server, point)
	s.StartServer()
	a.WaitReady(a.Ops)
	s.CreateEntry(a.ID, "spiffe://example.org/w")
	if _, err := fetch(t, a, 10*time.Second); err != nil {
		t.Fatal(err)
	}

	thief := s.NewAgent("thief")
	thief.Launch(token)
	thief.Eventually(time.Minute, "the refusal", func() error {
		log, err := os.ReadFile(s.File("thief.log"))
		if err == nil && !bytes.Contains(log, []byte("join_token_invalid")) {
			err = fmt.Errorf("not refused yet")
		}
		return err
	})
	thief.Stop(15)
	checkHistory(t, s)
}

func awaitKill(t *testing.T, p *harness.Process, point string) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(2 * time.Minute):
		t.Fatalf("the server never came to %s", point)
	}
	if p.ExitCode() != -1 {
		t.Fatalf("the server ended by itself: %d", p.ExitCode())
	}
}

// Nothing acknowledged is lost, and what was not acknowledged can be repeated.
func TestEntriesSurviveKills(t *testing.T) {
	s := harness.NewSite(t, killable.built(t), "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	var acknowledged []string
	for i := range rounds {
		id := fmt.Sprintf("spiffe://example.org/kept/%d", i)
		s.CreateEntry(a.ID, id)
		acknowledged = append(acknowledged, id)
		s.Server.Stop(9)
		s.StartServer(armed("entry_written"))
		lost := []string{"entry", "create", "--parent-id", a.ID, "--spiffe-id", fmt.Sprintf("spiffe://example.org/lost/%d", i), "--selector", "unix:uid:4294967"}
		if _, stderr, code := s.Try("assay", lost...); code == 0 {
			t.Fatalf("acknowledged by a dead server: %s", stderr)
		}
		awaitKill(t, s.Server, "entry_written")
		s.StartServer()
		if _, stderr, code := s.Try("assay", lost...); code != 0 && code != 75 {
			t.Fatalf("repeating it: exit %d, %s", code, stderr)
		}
	}
	var list struct {
		Entries []struct {
			SPIFFEID string `json:"spiffe_id"`
		} `json:"entries"`
	}
	s.CLIJSON(&list, "entry", "list")
	have := map[string]int{}
	for _, e := range list.Entries {
		have[e.SPIFFEID]++
	}
	for i, id := range acknowledged {
		if have[id] != 1 || have[fmt.Sprintf("spiffe://example.org/lost/%d", i)] != 1 {
			t.Errorf("entries of round %d: %v", i, have)
		}
	}
	checkHistory(t, s)
}

// A lost renewal reply, and a kill right after a mark was raised, need nobody.
func TestRenewalSurvivesKills(t *testing.T) {
	const short = "attestation:\n  agent_svid_ttl: 12s\n"
	for point, laterTTL := range map[string]string{"renew_reply": short, "mark_raised": "attestation:\n  agent_svid_ttl: 10h\n"} {
		t.Run(point, func(t *testing.T) {
			s := harness.NewSite(t, killable.built(t), shortTTL+short)
			s.StartServer()
			a := s.NewAgent("agent")
			a.Start(a.Join())
			s.CreateEntry(a.ID, "spiffe://example.org/w")
			for range 2 {
				s.Server.Stop(9)
				// A longer life needs a higher mark, so that one is raised at once.
				s.More = shortTTL + laterTTL
				s.LaunchServer(armed(point))
				awaitKill(t, s.Server, point)
				s.StartServer()
				a.WaitReady(a.Ops)
				if point == "mark_raised" {
					break // it is raised now; the next time is hours away
				}
			}
			if _, err := fetch(t, a, 10*time.Second); err != nil {
				t.Fatal(err)
			}
			checkHistory(t, s)
		})
	}
}

// checkHistory reads the audit log: its chain holds and no serial occurs twice.
func checkHistory(t *testing.T, s *harness.Site) {
	t.Helper()
	if _, err := audit.Verify(s.Audit()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(s.Audit())
	if err != nil {
		t.Fatal(err)
	}
	serials := map[string]bool{}
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		var line struct {
			Cert struct {
				Serial string `json:"serial"`
			} `json:"cert"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			continue // the torn end of a killed writer is Verify's business
		}
		if line.Cert.Serial == "" {
			continue
		}
		if serials[line.Cert.Serial] {
			t.Errorf("serial %s was planned twice", line.Cert.Serial)
		}
		serials[line.Cert.Serial] = true
	}
	if len(serials) == 0 {
		t.Error("no issuance in the audit log")
	}
}

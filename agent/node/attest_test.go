package node_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// NEG-27: nothing secret goes to a server that is not the one pinned.
func TestTokenIsNotSentToAServerThatCantProveItself(t *testing.T) {
	cases := map[string]func(f *fake, h *host){
		// The pin names a root that the server does not have.
		"other root": func(f *fake, h *host) { h.cfg.Pin = newAuthority().pin() },
		// The bundle is the genuine one, relayed; the certificate is not.
		"relayed bundle": func(f *fake, h *host) { f.tls = newAuthority() },
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, h *host) {
				f.evil = func() { t.Error("the token was sent") }
				spoil(f, h)
				h.start()
				time.Sleep(time.Hour)
				if _, ok := h.state.Identity(); ok || f.count("Attest/join_token") > 0 {
					t.Error("attested")
				}
				select {
				case <-h.done:
					t.Errorf("gave up: %v", h.err)
				default:
				}
				if f.count("Bundle") == 0 {
					t.Error("did not even try")
				}
				if err := h.stop(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// NEG-14, P3: a lost reply costs another try, not the token.
func TestLostReplyToAttestIsAskedForAgainWithTheSameKey(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		f.lose["Attest"] = 2
		h.start()
		synctest.Wait()
		h.restart() // also over a restart between the tries
		h.conn().Release()
		keys := f.certified()
		if len(keys) != 3 || len(slices.Compact(slices.Clone(keys))) != 1 {
			t.Errorf("certified keys: %v", keys)
		}
		if n := f.known(); n != 1 {
			t.Errorf("%d agents", n)
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestRefusedTokenIsLoggedAndANewOneIsTaken(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		var log logBuffer
		h.logTo = &log
		h.putToken("wrong")
		h.start()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := f.count("Attest/join_token"); n < 5 || n > 60 {
			t.Errorf("%d attempts in 10 minutes", n)
		}
		if !strings.Contains(log.String(), "join_token_invalid") {
			t.Errorf("no reason in the log: %s", log.String())
		}
		if strings.Contains(log.String(), "wrong") {
			t.Error("the token is in the log")
		}
		if err := os.Remove(h.cfg.JoinTokenFile); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if !strings.Contains(log.String(), "join_token_missing") {
			t.Error("no reason for the missing file")
		}
		h.putToken("token-1")
		h.conn().Release()
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestTokenThatOthersCanReadIsNotUsed(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		if err := os.Chmod(h.cfg.JoinTokenFile, 0o644); err != nil {
			t.Fatal(err)
		}
		h.start()
		time.Sleep(time.Minute)
		if f.count("Attest/join_token") != 0 {
			t.Error("used")
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// P5, NEG-59: an outage longer than the certificate's life needs no human.
func TestComesBackAfterAnOutageLongerThanItsCertificate(t *testing.T) {
	for _, restart := range []bool{false, true} {
		inBubble(t, func(t *testing.T, f *fake, h *host) {
			h.start()
			h.conn().Release()
			before := h.identity()
			f.stop()
			time.Sleep(30 * time.Hour)
			if restart {
				h.restart()
				time.Sleep(time.Hour)
			}
			f.start()
			start := time.Now()
			c := h.conn()
			if err := ping(t, c); err != nil {
				t.Fatal(err)
			}
			c.Release()
			if d := time.Since(start); d > 20*time.Second {
				t.Errorf("took %v", d)
			}
			after := h.identity()
			if after.AgentID != before.AgentID || after.Key.Equal(before.Key) {
				t.Error("not the same agent with a new key")
			}
			if f.count("Attest/rejoin") == 0 || f.count("Attest/join_token") != 1 {
				t.Errorf("calls: %v", f.calls)
			}
			if err := h.stop(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestRejoinsWithThePendingKeyWhenTheReplyToRenewWasLostForGood(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		h.start()
		h.conn().Release()
		f.with(func() { f.lose["Renew"] = 1 << 30 })
		time.Sleep(8 * time.Hour)
		// The server knows only the key that it certified last.
		f.with(func() {
			for _, r := range f.agents {
				r.active, r.activeKey = r.pending, r.pendingKey
			}
		})
		c := h.conn()
		if err := ping(t, c); fault.ReasonOf(err) != "agent_svid_not_active" {
			t.Fatal(err)
		}
		<-c.Replaced()
		c.Release()
		again := h.conn()
		if err := ping(t, again); err != nil {
			t.Fatal(err)
		}
		again.Release()
		if n := f.count("Attest/rejoin"); n != 2 {
			t.Errorf("%d rejoins, want one per key", n)
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestUsesANewTokenWhenItMayNotRejoin(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		h.start()
		h.conn().Release()
		before := h.identity()
		f.with(func() {
			f.rejoin = false
			clear(f.agents) // evicted
		})
		h.restart()
		time.Sleep(10 * time.Minute)
		if n := f.count("Attest/join_token"); n != 1 {
			t.Errorf("the used token was sent again: %d", n)
		}
		if f.count("Attest/rejoin") < 5 {
			t.Error("gave up")
		}
		f.addToken("token-2")
		h.putToken("token-2")
		c := h.conn()
		if err := ping(t, c); err != nil {
			t.Fatal(err)
		}
		c.Release()
		if h.identity().AgentID == before.AgentID {
			t.Error("the same agent ID from another token")
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// NEG-13: a ban ends the agent and takes its identity, wherever it is noticed.
func TestBanEndsTheAgent(t *testing.T) {
	cases := map[string]func(h *host, ban func()){
		"on an open connection": func(h *host, ban func()) {
			h.start()
			c := h.conn()
			ban()
			_ = ping(h.t, c)
			c.Release()
		},
		"while renewing": func(h *host, ban func()) {
			h.start()
			h.conn().Release()
			ban()
			time.Sleep(8 * time.Hour)
		},
		"at the next start": func(h *host, ban func()) {
			h.start()
			h.conn().Release()
			if err := h.stop(); err != nil {
				h.t.Fatal(err)
			}
			ban()
			h.start()
		},
		"while rejoining": func(h *host, ban func()) {
			h.start()
			h.conn().Release()
			if err := h.stop(); err != nil {
				h.t.Fatal(err)
			}
			ban()
			time.Sleep(13 * time.Hour)
			h.start()
		},
		"with a good token": func(h *host, ban func()) {
			h.start()
			h.conn().Release()
			if err := h.stop(); err != nil {
				h.t.Fatal(err)
			}
			ban()
			if err := os.RemoveAll(filepath.Join(h.dir, "data")); err != nil {
				h.t.Fatal(err)
			}
			h.fake.addToken("token-1") // as if it was not used up
			h.start()
		},
	}
	for name, notice := range cases {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, h *host) {
				notice(h, func() {
					f.with(func() {
						for _, r := range f.agents {
							r.banned = true
						}
					})
				})
				select {
				case <-h.done:
				case <-time.After(5 * time.Minute):
					t.Error("Run did not end")
				}
				if _, ok := h.state.Identity(); ok {
					t.Error("the identity is still there")
				}
				if err := h.stop(); fault.ReasonOf(err) != "agent_banned" || fault.KindOf(err) != fault.Denied {
					t.Errorf("ended with %v", err)
				}
			})
		})
	}
}

func TestOlderBundleInAnAttestationIsRefused(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		var log logBuffer
		h.logTo = &log
		f.sequence = 9
		h.start()
		h.conn().Release()
		f.stop()
		time.Sleep(13 * time.Hour)
		f.with(func() { f.sequence = 8 })
		f.start()
		time.Sleep(time.Hour)
		if b, _ := h.state.Bundle(); b.Sequence != 9 {
			t.Errorf("the agent holds bundle %d", b.Sequence)
		}
		f.with(func() { f.sequence = 10 })
		h.conn().Release()
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), "bundle_rollback") {
			t.Error("no alarm in the log")
		}
	})
}

// The root that the agent's certificate chains to may be revoked while the
// agent is away. The server then ends the handshake, which looks like a
// network failure.
func TestRejoinsWhenItsCertificateIsNotAcceptedInTheHandshake(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		other := newAuthority()
		f.bundled = append(f.bundled, other)
		h.start()
		h.conn().Release()
		f.stop()
		f.with(func() {
			f.bundled, f.root, f.tls, f.sequence = []*authority{other}, other, other, 2
		})
		f.start()
		h.restart()
		c := h.conn()
		if err := ping(t, c); err != nil {
			t.Fatal(err)
		}
		c.Release()
		if f.count("Attest/rejoin") != 1 {
			t.Errorf("calls: %v", f.calls)
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestCertificatesThatAreNotOursAreNotTaken(t *testing.T) {
	cases := map[string]func(f *fake, id *agentv1.Identity){
		"no chain":      func(_ *fake, id *agentv1.Identity) { id.Chain = nil },
		"not X.509":     func(_ *fake, id *agentv1.Identity) { id.Chain = [][]byte{{1, 2, 3}} },
		"other name":    func(_ *fake, id *agentv1.Identity) { id.AgentId += "x" },
		"untrusted":     func(_ *fake, id *agentv1.Identity) { id.Chain = [][]byte{leafFor(newAuthority(), id.AgentId)} },
		"other key":     func(f *fake, id *agentv1.Identity) { id.Chain = [][]byte{leafFor(f.root, id.AgentId)} },
		"other domain":  func(_ *fake, id *agentv1.Identity) { id.Bundle.TrustDomain = "other.org" },
		"empty bundle":  func(_ *fake, id *agentv1.Identity) { id.Bundle.X509Authorities = nil },
		"a workload ID": func(f *fake, id *agentv1.Identity) { id.AgentId = "spiffe://example.org/web" },
	}
	for name, corrupt := range cases {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, h *host) {
				f.corrupt = func(id *agentv1.Identity) { corrupt(f, id) }
				h.start()
				time.Sleep(time.Minute)
				if id, ok := h.state.Identity(); ok {
					t.Errorf("took %v", id.AgentID)
				}
				f.with(func() { f.corrupt = nil })
				h.conn().Release()
				if err := h.stop(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// NEG-27: before the server is verified nobody's word counts, the ban
// least of all: it would end the agent and wipe what it has.
func TestUnverifiedServerCantBan(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		var log logBuffer
		h.logTo = &log
		f.with(func() { f.denial = fault.New(fault.Denied, "agent_banned", "wipe yourself") })
		h.start()
		time.Sleep(10 * time.Minute)
		select {
		case <-h.done:
			t.Fatalf("a server that nobody verified ended the agent: %v", h.err)
		default:
		}
		if n := f.count("Bundle"); n < 5 {
			t.Errorf("asked %d times in ten minutes", n)
		}
		if text := log.String(); strings.Contains(text, "agent_banned") || strings.Contains(text, "wipe") || !strings.Contains(text, "bundle_unavailable") {
			t.Errorf("log: %s", text)
		}
		f.with(func() { f.denial = nil })
		h.conn().Release()
	})
}

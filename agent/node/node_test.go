package node_test

import (
	"context"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/agent/node"
	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// inBubble runs a test with a server that is up and a host that can join it.
func inBubble(t *testing.T, do func(t *testing.T, f *fake, h *host)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.start()
		defer f.stop()
		h := newHost(t, f, dir)
		defer h.kill()
		do(t, f, h)
	})
}

func ping(t *testing.T, c *node.Conn) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err := c.Client.SignX509(ctx, &agentv1.SignX509Request{}, grpc.WaitForReady(true))
	return fault.FromStatus(err)
}

func TestJoinsOnceAndRemembersAcrossRestarts(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		h.start()
		c := h.conn()
		if err := ping(t, c); err != nil {
			t.Fatal(err)
		}
		c.Release()
		first := h.identity()
		if b, ok := h.state.Bundle(); !ok || !b.Authenticated || b.Sequence != 1 {
			t.Errorf("bundle: %+v", b)
		}
		bundles := f.count("Bundle")
		h.restart()
		h.conn().Release()
		if got := h.identity(); got.AgentID != first.AgentID || !got.Key.Equal(first.Key) {
			t.Error("another identity after the restart")
		}
		if n := f.count("Attest/join_token"); n != 1 {
			t.Errorf("attested %d times", n)
		}
		if f.count("Bundle") != bundles {
			t.Error("the pin was used again although there is an authenticated bundle")
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestTrustBundleFileIsReadUntilABundleIsAuthenticated(t *testing.T) {
	for _, format := range []string{"pem", "json"} {
		t.Run(format, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, h *host) {
				path := filepath.Join(h.dir, "bundle")
				var data []byte
				if format == "pem" {
					data = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.root.cert.Raw})
				} else {
					b := spiffebundle.New(td)
					b.AddX509Authority(f.root.cert)
					data = must(b.Marshal())
				}
				if err := os.WriteFile(path, data, 0o644); err != nil {
					t.Fatal(err)
				}
				h.cfg.Pin, h.cfg.TrustBundle = "", path
				h.start()
				h.conn().Release()
				if n := f.count("Bundle"); n != 0 {
					t.Errorf("asked for the bundle without authentication %d times", n)
				}
				if err := os.WriteFile(path, []byte("not read any more"), 0o644); err != nil {
					t.Fatal(err)
				}
				h.restart()
				h.conn().Release()
				if err := h.stop(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

func TestUnusableTrustBundleEndsTheStart(t *testing.T) {
	inBubble(t, func(t *testing.T, _ *fake, h *host) {
		path := filepath.Join(h.dir, "bundle")
		if err := os.WriteFile(path, []byte("nonsense"), 0o644); err != nil {
			t.Fatal(err)
		}
		h.cfg.Pin, h.cfg.TrustBundle = "", path
		h.start()
		<-h.done
		if err := h.stop(); fault.ReasonOf(err) != "config_trust_bundle" || fault.KindOf(err) != fault.Precondition {
			t.Fatal(err)
		}
	})
}

func TestRenewsForDaysWithNewKeysAndWithoutAGap(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		h.start()
		connections := 0
		for end := time.Now().Add(5 * 24 * time.Hour); time.Now().Before(end); {
			c := h.conn()
			connections++
			for replaced := false; !replaced && time.Now().Before(end); {
				if err := ping(t, c); err != nil {
					t.Fatalf("a call failed in connection %d: %v", connections, err)
				}
				select {
				case <-c.Replaced():
					replaced = true
				case <-time.After(10 * time.Minute):
				}
			}
			// Make before break: its successor is there, and this one still
			// finishes what runs over it.
			next := h.conn()
			if err := ping(t, c); err != nil && fault.ReasonOf(err) != "agent_svid_not_active" {
				t.Fatalf("the old connection was closed under its user: %v", err)
			}
			next.Release()
			c.Release()
		}
		keys := f.certified()
		slices.Sort(keys)
		if n := len(keys); n < 18 || n > 24 {
			t.Errorf("%d certificates in 5 days of 12 h certificates", n)
		}
		if len(slices.Compact(keys)) != len(f.certified()) {
			t.Error("a key was certified twice")
		}
		if f.count("Attest/join_token") != 1 || f.count("Attest/rejoin") != 0 {
			t.Error("attested again")
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestLostReplyToRenewCostsNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		h.start()
		c := h.conn()
		f.with(func() { f.lose["Renew"] = 3 })
		<-c.Replaced()
		c.Release()
		h.conn().Release()
		keys := f.certified()
		if len(keys) != 5 || len(slices.Compact(slices.Clone(keys))) != 2 {
			t.Errorf("certified: %v", keys)
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestRenewedButNeverUsedCertificateWorksAfterARestart(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		h.start()
		h.conn().Release()
		before := h.identity()
		// The renewal comes through, its first use does not.
		f.with(func() { f.away = true })
		for h.identity().Key.Equal(before.Key) {
			time.Sleep(time.Minute)
		}
		time.Sleep(30 * time.Minute)
		h.conn().Release() // the old connection is there all the while
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
		f.with(func() { f.away = false })
		h.start()
		h.conn().Release()
		if f.count("Attest/rejoin") != 0 || len(f.certified()) != 2 {
			t.Errorf("%d rejoins, %d certificates", f.count("Attest/rejoin"), len(f.certified()))
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestEvictionIsNoticedOnAnOpenConnection(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		h.start()
		c := h.conn()
		f.with(func() { clear(f.agents) })
		f.addToken("token-2")
		h.putToken("token-2")
		if err := ping(t, c); fault.ReasonOf(err) != "agent_unknown" {
			t.Fatal(err)
		}
		<-c.Replaced()
		c.Release()
		again := h.conn()
		if err := ping(t, again); err != nil {
			t.Fatal(err)
		}
		again.Release()
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestServerAddressesAreTriedInTurn(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		h.cfg.Addresses = []string{"dead:1", "silent:2", "server:8443"}
		h.dial = func(ctx context.Context, address string) (net.Conn, error) {
			if address == "silent:2" {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return f.dial(ctx, address)
		}
		h.start()
		c := h.conn()
		if err := ping(t, c); err != nil {
			t.Fatal(err)
		}
		c.Release()
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestConnectionSurvivesARestartOfTheServer(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		h.start()
		c := h.conn()
		for range 3 {
			f.stop()
			time.Sleep(10 * time.Minute)
			f.start()
			start := time.Now()
			if err := ping(t, c); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(start); d > 25*time.Second {
				t.Errorf("took %v", d)
			}
		}
		select {
		case <-c.Replaced():
			t.Error("replaced without need")
		default:
		}
		c.Release()
		if f.count("Attest/join_token") != 1 {
			t.Error("attested again")
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestConnWaitsUntilItsContextEnds(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		f.stop()
		h.start()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := h.node.Conn(ctx); fault.ReasonOf(err) != "server_unreachable" || fault.KindOf(err) != fault.NotReady {
			t.Fatal(err)
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestConfigurationThatCantWorkIsRefused(t *testing.T) {
	good := node.Config{TrustDomain: td, ReservedPrefix: "/assay/", Addresses: []string{"a:1"}, Pin: strings.Repeat("0", 64)}
	for reason, spoil := range map[string]func(*node.Config){
		"config_server":       func(c *node.Config) { c.Addresses = nil },
		"config_pin":          func(c *node.Config) { c.Pin = "abc" },
		"config_trust":        func(c *node.Config) { c.TrustBundle = "both" },
		"config_trust_domain": func(c *node.Config) { c.ReservedPrefix = "//" },
	} {
		c := good
		spoil(&c)
		if _, err := node.New(node.Options{Config: c, Registerer: prometheus.NewRegistry()}); fault.ReasonOf(err) != reason {
			t.Errorf("%s: %v", reason, err)
		}
	}
	inBubble(t, func(t *testing.T, _ *fake, h *host) {
		h.cfg.JoinTokenFile = ""
		h.start()
		<-h.done
		if err := h.stop(); fault.ReasonOf(err) != "config_no_attestor" {
			t.Fatal(err)
		}
	})
}

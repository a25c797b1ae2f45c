package node_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/agent/node"
	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

type reach func(ctx context.Context, address string) (net.Conn, error)

func TestConnectionSaysWhyItCantBeMade(t *testing.T) {
	refused := func(_ context.Context, address string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: address, Err: syscall.ECONNREFUSED}
	}
	silent := func(ctx context.Context, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	notTLS := func(context.Context, string) (net.Conn, error) {
		client, server := net.Pipe()
		go func() {
			_, _ = server.Read(make([]byte, 4096))
			_, _ = server.Write([]byte("220 mail.example.org ESMTP\r\n"))
			_ = server.Close()
		}()
		return client, nil
	}
	stranger := reach(nil) // another server, made in the bubble
	cases := map[string]struct {
		reach  map[string]reach
		reason string
		says   []string
	}{
		"refused": {
			map[string]reach{"server:8443": refused},
			"server_unreachable",
			[]string{"the server at server:8443 can't be reached", "connection refused"},
		},
		"silent": {
			map[string]reach{"server:8443": silent},
			"server_unreachable",
			[]string{"the server at server:8443"},
		},
		"not TLS": {
			map[string]reach{"server:8443": notTLS},
			"server_unreachable",
			[]string{"what answers at server:8443 does not finish the TLS handshake"},
		},
		"another root": {
			map[string]reach{"server:8443": stranger},
			"server_untrusted",
			[]string{"the server at server:8443", "expected spiffe://example.org/assay/server", "under root ", "does not chain to a root"},
		},
		"one refused, one of another root": {
			map[string]reach{"b:2": refused, "server:8443": stranger},
			"server_untrusted",
			[]string{"the server at b:2 can't be reached", "the server at server:8443 is not the one to trust"},
		},
		"one refused, one silent": {
			map[string]reach{"b:2": refused, "server:8443": silent},
			"server_unreachable",
			[]string{"b:2", "server:8443"},
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, h *host) {
				if len(c.reach) > 1 {
					h.cfg.Addresses = []string{"b:2", "server:8443"}
				}
				gone := false
				other := newFake()
				h.dial = func(ctx context.Context, address string) (net.Conn, error) {
					switch to, known := c.reach[address]; {
					case gone && known && to == nil:
						return other.anywhere(ctx, address)
					case gone && known:
						return to(ctx, address)
					}
					return f.dial(ctx, address)
				}
				other.start()
				defer other.stop()
				h.start()
				conn := h.conn()
				if err := conn.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
				gone = true
				f.stop()
				synctest.Wait()
				for range 3 { // each time anew
					start := time.Now()
					err := conn.Ready(t.Context())
					if fault.ReasonOf(err) != c.reason || fault.KindOf(err) != fault.NotReady {
						t.Errorf("%v", err)
					}
					for _, text := range c.says {
						if !strings.Contains(err.Error(), text) {
							t.Errorf("%v does not say %q", err, text)
						}
					}
					if d := time.Since(start); d > 15*time.Second {
						t.Errorf("took %v", d)
					}
				}
				gone = false
				f.start()
				eventuallyReady(t, conn)
				conn.Release()
				if f.count("Attest/rejoin") != 0 || f.count("Attest/join_token") != 1 {
					t.Error("attested again")
				}
				if err := h.stop(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// anywhere is the way to the server by any address.
func (f *fake) anywhere(ctx context.Context, _ string) (net.Conn, error) {
	return f.dial(ctx, "server:8443")
}

// eventuallyReady allows for a pause of gRPC that is on already.
func eventuallyReady(t *testing.T, c *node.Conn) {
	t.Helper()
	var err error
	for range 3 {
		if err = c.Ready(t.Context()); err == nil {
			return
		}
	}
	t.Errorf("the server is back: %v", err)
}

// One address that works is enough, and no reason to complain.
func TestConnectionIsReadyByItsSecondAddress(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		h.cfg.Addresses = []string{"dead:1", "server:8443"}
		h.start()
		c := h.conn()
		for range 3 {
			f.stop()
			synctest.Wait()
			f.start()
			if err := c.Ready(t.Context()); err != nil {
				t.Error(err)
			}
		}
		c.Release()
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestReadyEndsWithItsContext(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		gone := false
		h.dial = func(ctx context.Context, a string) (net.Conn, error) {
			if gone {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return f.dial(ctx, a)
		}
		h.start()
		c := h.conn()
		gone = true
		f.stop()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Ready(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		c.Release()
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// A server that says no is not asked again in the same second; one that is away
// is.
func TestRefusalsAreTriedAgainMoreSlowlyThanAnAbsentServer(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		var at []time.Time
		f.evil = func() { at = append(at, time.Now()) }
		h.putToken("wrong")
		h.start()
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		f.with(func() {
			var last time.Duration
			for i := 1; i < len(at); i++ {
				gap := at[i].Sub(at[i-1])
				if gap < time.Second || gap > time.Minute+time.Second {
					t.Errorf("attempt %d after %v", i, gap)
				}
				last += gap
			}
			if mean := last / time.Duration(len(at)-1); mean < 20*time.Second {
				t.Errorf("%v between attempts after two hours", mean)
			}
		})
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		f.stop()
		dials := 0
		before := h.dial
		h.dial = func(ctx context.Context, a string) (net.Conn, error) {
			dials++
			return before(ctx, a)
		}
		h.start()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if dials < 4 {
			t.Errorf("%d tries in the first 2 s", dials)
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// The first use of a renewed certificate ends the streams of the old one before
// its connection is replaced. That is no verdict on the agent.
func TestEndOfTheOldConnectionsStreamIsNoVerdict(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fake, h *host) {
		var log logBuffer
		h.logTo = &log
		f.lag = 500 * time.Millisecond
		h.start()
		for range 6 {
			c := h.conn()
			stream := must(c.Client.Sync(t.Context()))
			if _, err := stream.Recv(); err != nil {
				t.Fatal(err)
			}
			_, err := stream.Recv()
			if fault.ReasonOf(fault.FromStatus(err)) != "agent_svid_not_active" {
				t.Fatal(err)
			}
			select {
			case <-c.Replaced():
				t.Error("the stream ended after the replacement: nothing is proven")
			default:
			}
			ended := time.Now()
			// Who is too eager gets the same answer again, and it counts as little.
			again := must(c.Client.Sync(t.Context()))
			_, _ = again.Recv()
			_, _ = c.Client.SignX509(t.Context(), &agentv1.SignX509Request{})
			<-c.Replaced()
			if d := time.Since(ended); d > time.Second {
				t.Errorf("replaced after %v", d)
			}
			c.Release()
		}
		if f.count("Attest/join_token") != 1 || f.count("Attest/rejoin") != 0 || strings.Contains(log.String(), "attesting anew") {
			t.Errorf("attested again:\n%s", log.String())
		}
		if err := h.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

package rpc

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"
)

// refuse makes n calls without the header that the guard demands.
func refuse(t *testing.T, g *guard, n int) {
	t.Helper()
	ctx := peer.NewContext(context.Background(), &peer.Peer{
		Addr: &net.UnixAddr{Name: "@", Net: "unix"}, AuthInfo: localInfo{caller: Caller{Local: true, UID: 1, PID: 2}},
	})
	for range n {
		if _, err := g.tap(ctx, &tap.Info{FullMethodName: "/any"}); err == nil {
			t.Fatal("not refused")
		}
	}
}

// NEG-43: whoever may connect to a socket can't fill the log with refusals.
func TestRefusalsDoNotFloodTheLog(t *testing.T) {
	for name, tc := range map[string]struct {
		perSecond, first, second int
		lost                     string
	}{
		"bounded": {5, 5, 6, "suppressed=95"},
		"all":     {0, 100, 101, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				logs, reg := &strings.Builder{}, prometheus.NewRegistry()
				metrics := NewMetrics(reg)
				g := newGuard(ServerConfig{
					Name: "test", HeaderKey: "h", RefusalsPerSecond: tc.perSecond, Metrics: metrics,
					Log: slog.New(slog.NewTextHandler(logs, nil)),
				})
				lines := func(want int) string {
					t.Helper()
					all := strings.Split(strings.TrimSpace(logs.String()), "\n")
					if len(all) != want {
						t.Fatalf("%d lines, want %d", len(all), want)
					}
					return all[len(all)-1]
				}
				refuse(t, g, 100)
				if last := lines(tc.first); strings.Contains(last, "suppressed") {
					t.Errorf("nothing was left out before %s", last)
				}
				time.Sleep(time.Second)
				refuse(t, g, 1)
				last := lines(tc.second)
				if !strings.Contains(last, "uid=1 pid=2") || !strings.HasSuffix(last, tc.lost) || strings.Contains(last, "suppressed") != (tc.lost != "") {
					t.Errorf("the last line: %s", last)
				}
				if n := testutil.ToFloat64(metrics.denials.WithLabelValues("test", "security_header_missing")); n != 101 {
					t.Errorf("%v refusals counted", n)
				}
				refuse(t, g, 1) // what was told is not told again
				if all := logs.String(); strings.Count(all, "suppressed=") > 1 {
					t.Error(all)
				}
			})
		})
	}
}

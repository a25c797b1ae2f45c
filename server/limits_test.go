package server

import (
	"crypto/tls"
	"fmt"
	"strings"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// P7, NEG-20: an agent that asks for too much is told when to come back; others,
// and its own renewal, are not touched. Each limit has a series of its own.
func TestOneAgentCannotAskForEverything(t *testing.T) {
	h := start(t, func(c *Config) { c.Limits.SignRate, c.Limits.RenewRate, c.Limits.SyncRate = 2, 1, 1 })
	a, other := h.newAgent(), h.newAgent()
	id := h.operator().create(t, entry(a.id, "/a"))[0]
	theirs := h.operator().create(t, entry(other.id, "/b"))[0]
	csr := newCSR(t, newKey(t), nil)
	ask := func(who *agent, entry string, n int) error {
		req := &agentv1.SignX509Request{}
		for range n {
			req.Items = append(req.Items, &agentv1.SignX509Request_Item{EntryId: entry, Csr: csr})
		}
		_, err := who.SignX509(t.Context(), req)
		return err
	}
	wantLater := func(what string, err error, reason string) {
		t.Helper()
		wantReason(t, what, err, fault.Exhausted, reason)
		if after := fault.RetryAfterOf(fault.FromStatus(err)); after <= 0 || after > 15*time.Second {
			t.Errorf("%s: retry after %v", what, after)
		}
	}
	// Ten seconds' worth of two per second.
	if err := ask(a, id, 20); err != nil {
		t.Fatal(err)
	}
	wantLater("more", ask(a, id, 20), "limit_signatures")
	wantLater("more that is refused anyway", ask(a, "no-such-entry", 20), "limit_signatures")
	if err := ask(a, id, 0); err != nil {
		t.Errorf("a call for nothing: %v", err)
	}
	if err := ask(other, theirs, 20); err != nil {
		t.Errorf("another agent: %v", err)
	}

	var err error
	for range 60 {
		if _, err = a.Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, a.key, nil)}); err != nil {
			break
		}
	}
	wantLater("renewals", err, "limit_renewals")
	if _, err := other.Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, other.key, nil)}); err != nil {
		t.Errorf("renewal of another agent: %v", err)
	}

	for range 60 {
		stream, serr := a.Sync(t.Context())
		if serr != nil {
			t.Fatal(serr)
		}
		// It may be refused before it is sent.
		_ = stream.Send(&agentv1.SyncRequest{Message: &agentv1.SyncRequest_Hello_{Hello: &agentv1.SyncRequest_Hello{}}})
		if _, err = stream.Recv(); fault.ReasonOf(fault.FromStatus(err)) == "limit_sync_opens" {
			break
		}
	}
	wantLater("streams", err, "limit_sync_opens")
	one(t, openSync(t, other, nil))

	for _, reason := range []string{"limit_signatures", "limit_renewals", "limit_sync_opens"} {
		if n := h.refusals(reason); n < 1 {
			t.Errorf("%v refusals with %s in the metrics", n, reason)
		}
	}
}

// refusals reads assay_limit_refusals_total of the agents' listener.
func (h *harness) refusals(reason string) float64 {
	h.t.Helper()
	return h.metric("assay_limit_refusals_total", "agents", reason)
}

// metric sums the series of a counter or gauge that have these label values.
func (h *harness) metric(name string, values ...string) (sum float64) {
	h.t.Helper()
	families, err := h.reg.Gather()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
		for _, m := range family.GetMetric() {
			found := 0
			for _, label := range m.GetLabel() {
				for _, value := range values {
					if label.GetValue() == value {
						found++
					}
				}
			}
			if found == len(values) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// NEG-28: what is too much for one call is refused whole, by name, before
// anything is done, and operators over the network have a rate.
func TestWhatIsTooMuchForOneCallIsRefused(t *testing.T) {
	h := start(t, withOperators, func(c *Config) { c.Limits.OperatorRate = 1 })
	o, a := h.operator(), h.newAgent()
	many := make([]*types.Entry, 501)
	ids := make([]string, len(many))
	for i := range many {
		many[i], ids[i] = entry(a.id, fmt.Sprint("/", i)), fmt.Sprint(i)
	}
	_, err := o.entries.BatchCreateEntry(t.Context(), createOf(many...))
	wantReason(t, "create 501", err, fault.Exhausted, "limit_batch")
	_, err = o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: many})
	wantReason(t, "update 501", err, fault.Exhausted, "limit_batch")
	_, err = o.entries.BatchDeleteEntry(t.Context(), deleteOf(ids...))
	wantReason(t, "delete 501", err, fault.Exhausted, "limit_batch")
	if n, err := o.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil || n.GetCount() != 0 {
		t.Errorf("%v entries, %v", n, err)
	}
	o.create(t, many[:500]...)

	big := entry(a.id, "/big")
	big.Hint = strings.Repeat("x", 4<<20)
	// gRPC refuses these before it has read them, in words of its own.
	if _, err = o.entries.BatchCreateEntry(t.Context(), createOf(big)); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("4 MiB: %v", err)
	}
	_, err = a.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{EntryId: "x", Csr: make([]byte, 4<<20+1)}}})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("4 MiB of an agent: %v", err)
	}
	for reason, n := range map[string]float64{"limit_batch": 3, "message_too_large": 1} {
		if got := h.metric("assay_limit_refusals_total", "admin", reason); got != n {
			t.Errorf("%v refusals with %s in the metrics", got, reason)
		}
	}

	remote := h.remote(h.workload(a, "/ops/ci"))
	for range 60 {
		if _, err = remote.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil {
			break
		}
	}
	wantReason(t, "many calls at one per second", err, fault.Exhausted, "limit_calls")
	if _, err := o.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{}); err != nil {
		t.Errorf("the admin socket: %v", err)
	}
}

// A stranger costs memory with each call that he begins: on one connection he can
// begin as many as a ztunnel does. // NEG-20
func TestCallsOnAMeshsConnectionAreBounded(t *testing.T) {
	m := startMesh(t)
	conn, err := tls.Dial("tcp", m.server.IstioAddr().String(), &tls.Config{
		RootCAs: m.rooms.authority.Bundle().Pool(), NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	frames := http2.NewFramer(conn, conn)
	if err := frames.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	frame, err := frames.ReadFrame()
	if err != nil {
		t.Fatal(err)
	}
	settings, ok := frame.(*http2.SettingsFrame)
	if !ok {
		t.Fatalf("the server begins with %v", frame)
	}
	if n, ok := settings.Value(http2.SettingMaxConcurrentStreams); !ok || n != 8 {
		t.Errorf("a connection may have %d calls", n)
	}
}

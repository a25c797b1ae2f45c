package api

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/limit"
	"github.com/seed-caa81108/assay/server/registry"
)

// NEG-20
func TestAnAddressThatFloodsIsSlowedDownAndOthersAreNot(t *testing.T) {
	a, now := newAddresses(5), time.Now()
	begin := func(addr string, at time.Time) error {
		done, err := a.begin(addr, at)
		if err == nil {
			done()
		}
		return err
	}
	for i := range 5 * limit.BurstSeconds {
		if err := begin("192.0.2.1:1000", now); err != nil {
			t.Fatalf("attestation %d: %v", i, err)
		}
	}
	if err := begin("192.0.2.1:2000", now); fault.ReasonOf(err) != "attest_rate" || fault.KindOf(err) != fault.Exhausted {
		t.Errorf("over the rate: %v", err)
	}
	if err := begin("192.0.2.2:1000", now); err != nil {
		t.Errorf("another address: %v", err)
	}
	if err := begin("192.0.2.1:2000", now.Add(time.Second)); err != nil {
		t.Errorf("a second later: %v", err)
	}
}

func TestAttestationsUnderWayAreBoundedPerAddress(t *testing.T) {
	a, now := newAddresses(1000), time.Now()
	var dones []func()
	for range maxAttesting {
		done, err := a.begin("[2001:db8::1]:1", now)
		if err != nil {
			t.Fatal(err)
		}
		dones = append(dones, done)
	}
	// The same network of 64 bits is the same sender.
	if _, err := a.begin("[2001:db8::2]:1", now); fault.ReasonOf(err) != "limit_attestations" {
		t.Errorf("one too many: %v", err)
	}
	dones[0]()
	if _, err := a.begin("[2001:db8::3]:1", now); err != nil {
		t.Errorf("after one has ended: %v", err)
	}
}

// checker is a registry that knows one agent.
type checker struct{ err error }

func (c checker) CheckAgent(spiffeid.ID, registry.Shown) error { return c.err }

func TestAgentRule(t *testing.T) {
	agent := spiffeid.RequireFromString("spiffe://example.org/assay/agent/join_token/a")
	valid := rpc.Caller{ID: agent, Serial: "1", State: rpc.CertValid, NotAfter: time.Now().Add(time.Hour)}
	change := func(f func(*rpc.Caller)) rpc.Caller { c := valid; f(&c); return c }
	banned := fault.New(fault.Denied, "agent_banned", "banned")
	for name, c := range map[string]struct {
		caller rpc.Caller
		record error
		reason string
	}{
		"active":                {valid, nil, ""},
		"no certificate":        {rpc.Caller{}, nil, "agent_svid_missing"},
		"expired at handshake":  {change(func(c *rpc.Caller) { c.State = rpc.CertExpired }), nil, "agent_svid_expired"},
		"expired since":         {change(func(c *rpc.Caller) { c.NotAfter = time.Now().Add(-time.Second) }), nil, "agent_svid_expired"},
		"a workload":            {change(func(c *rpc.Caller) { c.ID = spiffeid.RequireFromString("spiffe://example.org/ns/a") }), nil, "not_an_agent"},
		"the server":            {change(func(c *rpc.Caller) { c.ID = spiffeid.RequireFromString("spiffe://example.org/assay/server") }), nil, "not_an_agent"},
		"nearly an agent":       {change(func(c *rpc.Caller) { c.ID = spiffeid.RequireFromString("spiffe://example.org/assay/agentx/a") }), nil, "not_an_agent"},
		"the agents themselves": {change(func(c *rpc.Caller) { c.ID = spiffeid.RequireFromString("spiffe://example.org/assay/agent") }), nil, "not_an_agent"},
		"banned":                {valid, banned, "agent_banned"},
		"local root":            {rpc.Caller{Local: true}, nil, "agent_svid_missing"},
	} {
		err := AgentRule("/assay/", checker{c.record})(c.caller)
		if c.reason == "" && err != nil || c.reason != "" && fault.ReasonOf(err) != c.reason {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// NEG-60
func TestAdminRule(t *testing.T) {
	gid := uint32(50)
	rule := AdminRule(Operators{UIDs: []uint32{1000}, GID: &gid})
	for name, c := range map[string]struct {
		caller rpc.Caller
		ok     bool
	}{
		"root":              {rpc.Caller{Local: true, UID: 0, GID: 7}, true},
		"listed uid":        {rpc.Caller{Local: true, UID: 1000, GID: 7}, true},
		"group":             {rpc.Caller{Local: true, UID: 1001, GID: 50}, true},
		"stranger":          {rpc.Caller{Local: true, UID: 1001, GID: 51}, false},
		"uid as gid":        {rpc.Caller{Local: true, UID: 50, GID: 1000}, false},
		"remote, uid 0":     {rpc.Caller{}, false},
		"remote with an ID": {rpc.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/assay/server"), State: rpc.CertValid}, false},
	} {
		if err := rule(c.caller); (err == nil) != c.ok || err != nil && fault.ReasonOf(err) != "operator_not_allowed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := AdminRule(Operators{})(rpc.Caller{Local: true, UID: 5}); err == nil {
		t.Error("without a group, group 0 is nobody's ticket")
	}
}

// memory is an audit log that keeps its lines.
type memory struct {
	lines chan audit.Line
	err   error
}

func (m *memory) Record(_ context.Context, lines ...audit.Line) error {
	for _, l := range lines {
		m.lines <- l
	}
	return m.err
}

func TestRefusalsAreAuditedOncePerMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &memory{lines: make(chan audit.Line, 100)}
		r := NewRefusals(log, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		methods := AdminMethods(Operators{}, r.Report)
		rule := methods["/spire.api.server.entry.v1.Entry/BatchCreateEntry"]
		for range 50 {
			if err := rule(rpc.Caller{Local: true, UID: 1001, GID: 7, Addr: "unix"}); err == nil {
				t.Fatal("admitted")
			}
		}
		synctest.Wait()
		line := <-log.lines
		if *line.Origin.Actor.UID != 1001 || line.Result.Reason != "operator_not_allowed" || line.Action != "call.refuse" {
			t.Errorf("line: %+v", line)
		}
		if len(log.lines) != 0 {
			t.Errorf("%d more lines for the same refusal", len(log.lines))
		}
		_ = rule(rpc.Caller{Local: true, UID: 1002})
		<-time.After(repeatAfter + time.Second)
		_ = rule(rpc.Caller{Local: true, UID: 1001})
		synctest.Wait()
		if len(log.lines) != 2 {
			t.Errorf("want a line for the other user and one a minute later, got %d", len(log.lines))
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRefusalsNeverBlockWhenTheAuditLogHangs(t *testing.T) {
	r := NewRefusals(nil, slog.New(slog.DiscardHandler)) // nobody runs it
	for i := range 3 * maxRefused {
		r.Report(rpc.Caller{Local: true, UID: uint32(i + 1)}, fault.New(fault.Denied, "operator_not_allowed", "no"))
	}
}

func TestStrangersAreNotReported(t *testing.T) {
	reported := 0
	methods := AgentMethods("/assay/", checker{}, func(rpc.Caller, error) { reported++ })
	if err := methods["/assay.agent.v1.Agent/Renew"](rpc.Caller{}); fault.KindOf(err) != fault.Unauthenticated {
		t.Errorf("no certificate: %v", err)
	}
	if reported != 0 {
		t.Error("anybody can fill the audit log")
	}
	r := NewRefusals(nil, slog.New(slog.DiscardHandler))
	unlisted := fault.New(fault.Unimplemented, "method_unknown", "no such method")
	r.ReportUnlisted(rpc.Caller{Addr: "192.0.2.1:1"}, unlisted)
	if len(r.queue) != 0 {
		t.Error("a stranger's wrong method is reported")
	}
	r.ReportUnlisted(rpc.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/assay/agent/x"), State: rpc.CertValid}, unlisted)
	r.ReportUnlisted(rpc.Caller{Local: true, UID: 7}, unlisted)
	if len(r.queue) != 2 {
		t.Errorf("%d of 2 known callers are reported", len(r.queue))
	}
}

func TestRecordTellsThatTheActMayHaveHappened(t *testing.T) {
	full := fault.New(fault.Exhausted, "audit_full", "full")
	err := record(t.Context(), &memory{err: full}, []audit.Line{}...)
	if fault.KindOf(err) != fault.NotReady || fault.ReasonOf(err) != "audit_full" || !errors.Is(err, fault.Exhausted) {
		t.Errorf("%v", err)
	}
}

func TestParallelDoesEachOnce(t *testing.T) {
	for _, n := range []int{0, 1, 2, 7, 256} {
		hits := make([]atomic.Int32, n)
		parallel(n, func(i int) { hits[i].Add(1) })
		for i := range hits {
			if hits[i].Load() != 1 {
				t.Errorf("n=%d: item %d was done %d times", n, i, hits[i].Load())
			}
		}
	}
}

func TestLongUpdatesAreCutAndMarked(t *testing.T) {
	id := spiffeid.RequireFromString("spiffe://example.org/a")
	u := registry.Update{Epoch: "e", Revision: 9, Snapshot: true}
	for range 1000 {
		u.Entries = append(u.Entries, registry.Entry{ID: strings.Repeat("i", 200), SPIFFEID: id, ParentID: id, Hint: strings.Repeat("h", 1000)})
	}
	u.Removed = []string{"gone"}
	msgs := syncMessages(u)
	if len(msgs) < 5 {
		t.Fatalf("1.2 MB in %d messages", len(msgs))
	}
	entries := 0
	for i, m := range msgs {
		entries += len(m.GetEntries())
		if m.GetMore() != (i < len(msgs)-1) || !m.GetSnapshot() || m.GetRevision() != 9 || m.GetEpoch() != "e" {
			t.Errorf("message %d: more %v, snapshot %v, revision %d", i, m.GetMore(), m.GetSnapshot(), m.GetRevision())
		}
		if n := len(m.String()); n == 0 || sizeOf(m) > maxSyncBytes+1024 {
			t.Errorf("message %d has %d bytes", i, sizeOf(m))
		}
	}
	if entries != 1000 || msgs[len(msgs)-1].GetRemovedEntryIds()[0] != "gone" {
		t.Errorf("%d entries arrived", entries)
	}
	if msgs := syncMessages(registry.Update{}); len(msgs) != 1 || msgs[0].GetMore() {
		t.Errorf("an empty update is one message, got %d", len(msgs))
	}
}

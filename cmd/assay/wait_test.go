package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

// behind is what a server says about n agents that have not reached 4712.
func behind(n int) *adminv1.WaitResponse {
	w := &adminv1.WaitResponse{Revision: 4712, ServerRevision: 4713, Agents: 40, Waiting: uint32(n)}
	for i := range min(n, 32) {
		w.WaitingAgents = append(w.WaitingAgents, &adminv1.WaitingAgent{Id: fmt.Sprintf("spiffe://example.org/assay/agent/join_token/%02d", i)})
	}
	if n > 2 {
		w.WaitingAgents[0].Connected, w.WaitingAgents[0].Revision = true, 4700
		w.WaitingAgents[1].LastSeen = at("2026-11-23T09:00:00Z")
		w.WaitingAgents[2].Connected = true
	}
	return w
}

func everybody() *adminv1.WaitResponse {
	return &adminv1.WaitResponse{Revision: 4712, ServerRevision: 4713, Agents: 40, Reached: true}
}

// saying starts a server that says this and nothing more.
func saying(t *testing.T, waits ...*adminv1.WaitResponse) (*fakeServer, map[string]string) {
	f := &fakeServer{waits: waits}
	return f, map[string]string{serverSocketEnv: f.start(t)}
}

func TestWaitEndsWhenTheRevisionIsReached(t *testing.T) {
	f, vars := saying(t, behind(7), behind(1), everybody())
	got := assay(t, vars, "wait", "--revision", "4712", "--all-agents")
	if got.code != 0 || got.stderr != "" || got.stdout != "revision 4712: server at 4713, 40 of 40 agents reached it\n" {
		t.Errorf("exit %d, %q %q", got.code, got.stdout, got.stderr)
	}
	if !f.waited.GetAllAgents() || f.waited.GetRevision() != 4712 {
		t.Errorf("asked %v", f.waited)
	}
	got = assay(t, vars, "wait", "-o", "json")
	if want := `{"revision":4712,"server_revision":4713,"reached":true,"agents":40,"waiting":0,"waiting_agents":[]}` + "\n"; got.code != 0 || got.stdout != want {
		t.Errorf("exit %d, %q %q", got.code, got.stdout, got.stderr)
	}
	if f.waited.GetAllAgents() || f.waited.GetRevision() != 0 {
		t.Errorf("asked %v", f.waited)
	}
	_, vars = saying(t, &adminv1.WaitResponse{Revision: 4712, ServerRevision: 4713, Reached: true})
	if got = assay(t, vars, "wait"); got.code != 0 || got.stdout != "revision 4712: server at 4713\n" {
		t.Errorf("exit %d, %q %q", got.code, got.stdout, got.stderr)
	}
}

// The time is generous so that a slow machine has heard the server by then; the
// cases pass it together.
func TestWaitSaysWhomItWaitsFor(t *testing.T) {
	_, some := saying(t, behind(40), behind(37))
	_, one := saying(t, behind(1))
	_, future := saying(t, &adminv1.WaitResponse{Revision: 9000, ServerRevision: 4713})
	t.Run("text", func(t *testing.T) {
		t.Parallel()
		got := assay(t, some, "wait", "--all-agents", "--timeout", "3s")
		want := "error: wait_timeout: revision 4712 was not reached within 3s: 37 of 40 agents are behind: " +
			"spiffe://example.org/assay/agent/join_token/00 (at 4700), spiffe://example.org/assay/agent/join_token/01 (away since 2026-11-23T09:00:00Z), " +
			"spiffe://example.org/assay/agent/join_token/02 (connected), spiffe://example.org/assay/agent/join_token/03 (not seen since the server started), " +
			"spiffe://example.org/assay/agent/join_token/04 (not seen since the server started), and 32 more\n"
		if got.code != 75 || got.stderr != want || got.stdout != "revision 4712: server at 4713, 3 of 40 agents reached it\n" {
			t.Errorf("exit %d, %q %q", got.code, got.stdout, got.stderr)
		}
	})
	t.Run("JSON", func(t *testing.T) {
		t.Parallel()
		got := assay(t, some, "wait", "--all-agents", "--timeout", "3s", "-o", "json")
		var doc reachShape
		if err := json.Unmarshal([]byte(got.stdout), &doc); err != nil || got.code != 75 || doc.Reached || doc.Waiting != 37 || len(doc.WaitingAgents) != 32 ||
			!doc.WaitingAgents[0].Connected || doc.WaitingAgents[0].Revision != 4700 || doc.WaitingAgents[1].LastSeen == nil || doc.WaitingAgents[3].LastSeen != nil {
			t.Errorf("exit %d, %v, %+v", got.code, err, doc)
		}
		if !strings.Contains(got.stderr, `"reason":"wait_timeout"`) {
			t.Error(got.stderr)
		}
	})
	t.Run("a revision that the server does not have", func(t *testing.T) {
		t.Parallel()
		got := assay(t, future, "wait", "--revision", "9000", "--timeout", "3s")
		if got.code != 75 || !strings.Contains(got.stderr, "the server itself is at 4713") || got.stdout != "revision 9000: server at 4713\n" {
			t.Errorf("exit %d, %q %q", got.code, got.stdout, got.stderr)
		}
	})
	t.Run("progress for a person", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithCancel(t.Context())
		seen := &signalling{on: "waiting: ", then: cancel}
		code := run(ctx, env{
			stdin: strings.NewReader(""), stdout: &bytes.Buffer{}, stderr: seen, isTTY: true,
			getenv: func(name string) string { return one[name] },
		}, []string{"wait", "--all-agents"})
		if code != 69 || !strings.HasPrefix(seen.String(), "waiting: 1 of 40 agents is behind: spiffe://example.org/assay/agent/join_token/00 ") ||
			!strings.Contains(seen.String(), "error: interrupted: ") {
			t.Errorf("exit %d, %s", code, seen.String())
		}
	})
}

func TestWaitThatCannotBeginOrBreaksOff(t *testing.T) {
	f, vars := saying(t)
	for _, args := range [][]string{{"--revision", "0"}, {"--revision", "-3"}, {"--revision", "x"}, {"--timeout", "0s"}, {"--timeout", "-1s"}, {"4712"}} {
		if got := assay(t, vars, append([]string{"wait"}, args...)...); got.code != 64 || f.calls != 0 {
			t.Errorf("%v: exit %d, %s", args, got.code, got.stderr)
		}
	}
	// Nothing was said: then it is not the agents that are late.
	if got := assay(t, vars, "wait", "--timeout", "300ms"); got.code != 69 || !strings.HasPrefix(got.stderr, "error: timeout: ") {
		t.Errorf("silence: exit %d, %s", got.code, got.stderr)
	}
	full := &fakeServer{err: fault.New(fault.Exhausted, "limit_waits", "too many")}
	if got := assay(t, map[string]string{serverSocketEnv: full.start(t)}, "wait"); got.code != 75 || !strings.HasPrefix(got.stderr, "error: limit_waits: too many") {
		t.Errorf("refused: exit %d, %s", got.code, got.stderr)
	}
	if got := assay(t, map[string]string{serverSocketEnv: vars[serverSocketEnv] + "x"}, "wait"); got.code != 69 || !strings.HasPrefix(got.stderr, "error: unreachable: ") {
		t.Errorf("nobody there: exit %d, %s", got.code, got.stderr)
	}
}

// signalling calls then once something that begins with on is written.
type signalling struct {
	bytes.Buffer
	on   string
	then func()
}

func (s *signalling) Write(p []byte) (int, error) {
	if bytes.HasPrefix(p, []byte(s.on)) {
		s.then()
	}
	return s.Buffer.Write(p)
}

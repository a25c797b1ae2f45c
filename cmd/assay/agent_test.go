package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// answering runs the tool with somebody at the terminal who types answer.
func answering(t *testing.T, vars map[string]string, answer string, args ...string) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), env{
		stdin: strings.NewReader(answer), stdout: &stdout, stderr: &stderr, isTTY: true, asksTTY: true,
		getenv: func(name string) string { return vars[name] },
	}, args)
	return outcome{code: code, stdout: stdout.String(), stderr: stderr.String()}
}

func TestWhatCannotBeUndoneAsks(t *testing.T) { // NEG-60
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	for answer, code := range map[string]int{"": 77, "n\n": 77, "\n": 77, "yes please\n": 77, "y\n": 0, "YES\n": 0} {
		f.banned = nil
		got := answering(t, vars, answer, "agent", "ban", nodeID)
		if got.code != code || (len(f.banned) == 1) != (code == 0) || !strings.HasPrefix(got.stderr, "Ban 1 agent(s)") {
			t.Errorf("%q: exit %d, banned %v, %q", answer, got.code, f.banned, got.stderr)
		}
	}
	f.banned = nil
	for _, verb := range []string{"ban", "evict"} {
		got := assay(t, vars, "agent", verb, nodeID)
		if got.code != 64 || !strings.Contains(got.stderr, "--yes") || len(f.banned)+len(f.evicted) > 0 {
			t.Errorf("%s in a script: exit %d, %q, %v %v", verb, got.code, got.stderr, f.banned, f.evicted)
		}
	}
	if got := assay(t, vars, "agent", "ban", "--yes", nodeID, "nonsense"); got.code != 65 || len(f.banned) > 0 {
		t.Errorf("one ID is nonsense: exit %d, banned %v", got.code, f.banned)
	}
}

func TestPurgeTakesThoseWhoAreGone(t *testing.T) {
	f := populated(newPKI(t))
	f.status.Agents[0].Connected = false
	f.agents = []*types.Agent{
		{Id: id("/assay/agent/join_token/01"), X509SvidExpiresAt: longAgo.Unix()},
		{Id: id("/assay/agent/join_token/02"), X509SvidExpiresAt: longAgo.Unix()}, // connected
		{Id: id("/assay/agent/join_token/03"), X509SvidExpiresAt: farAway.Unix()},
		{Id: id("/assay/agent/join_token/04"), X509SvidExpiresAt: longAgo.Unix(), Banned: true},
		{Id: id("/assay/agent/join_token/05")},                                    // attested, its certificate not used yet
		{Id: id("/assay/agent/join_token/99"), X509SvidExpiresAt: longAgo.Unix()}, // evicted by somebody else meanwhile
	}
	vars := map[string]string{serverSocketEnv: f.start(t)}
	if got := assay(t, vars, "agent", "purge", "--yes", "--older", "876000h"); got.code != 0 || len(f.evicted) > 0 {
		t.Errorf("too young: exit %d, %q, evicted %v", got.code, got.stderr, f.evicted)
	}
	if got := assay(t, vars, "agent", "purge", "--older", "1h"); got.code != 64 || len(f.evicted) > 0 {
		t.Errorf("without --yes: exit %d, %q, evicted %v", got.code, got.stderr, f.evicted)
	}
	got := assay(t, vars, "agent", "purge", "--yes", "--older", "1h")
	if got.code != 0 || !slices.Equal(f.evicted, []string{"/assay/agent/join_token/01"}) {
		t.Errorf("exit %d, %q, evicted %v", got.code, got.stderr, f.evicted)
	}
	if got := assay(t, vars, "agent", "purge", "--older", "-1h"); got.code != 64 {
		t.Errorf("negative: exit %d", got.code)
	}
}

package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/daemon"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const exitUsage = 64

func TestWrongUsageExits64AndReachesNobody(t *testing.T) {
	f := populated(newPKI(t))
	agent := &fakeAgent{script: sends()}
	vars := map[string]string{serverSocketEnv: f.start(t), endpointEnv: agent.start(t)}
	entry := []string{"entry", "create", "--spiffe-id", "spiffe://example.org/a", "--parent-id", "spiffe://example.org/b"}
	with := func(more ...string) []string { return append(append([]string{}, entry...), more...) }
	cases := map[string][]string{
		"unknown command":             {"entyr"},
		"unknown verb":                {"entry", "creat"},
		"verb missing":                {"entry"},
		"unknown flag":                {"status", "--nope"},
		"flag without value":          {"status", "--socket"},
		"bad output":                  {"status", "-o", "yaml"},
		"argument too many":           {"status", "now"},
		"show without ID":             {"entry", "show"},
		"show of two":                 {"entry", "show", "a", "b"},
		"delete of none":              {"entry", "delete"},
		"completion for no shell":     {"completion", "tcsh"},
		"relative socket":             {"status", "--socket", "run/admin.sock"},
		"entry without selector":      entry,
		"entry with bad selector":     with("--selector", "unix"),
		"entry without parent":        {"entry", "create", "--spiffe-id", "spiffe://example.org/a", "--selector", "a:b"},
		"entry with fraction of TTL":  with("--selector", "a:b", "--ttl", "1500ms"),
		"entry with negative TTL":     with("--selector", "a:b", "--ttl", "-1s"),
		"entry with endless TTL":      with("--selector", "a:b", "--ttl", "1000000h"),
		"entry expired already":       with("--selector", "a:b", "--expires-at", "2020-01-01T00:00:00Z"),
		"entry expires in -1h":        with("--selector", "a:b", "--expires-at", "-1h"),
		"entry expires sometime":      with("--selector", "a:b", "--expires-at", "tomorrow"),
		"list with bad selector":      {"entry", "list", "--selector", ":x"},
		"token without life":          {"token", "create", "--ttl", "0s"},
		"token with negative life":    {"token", "create", "--ttl", "-5m"},
		"bundle in DER":               {"bundle", "show", "--format", "der"},
		"bundle in PEM and JSON":      {"bundle", "show", "--format", "pem", "-o", "json"},
		"fetch in no time":            {"svid", "fetch", "--timeout", "0s"},
		"fetch prints key as text":    {"svid", "fetch", "--with-key"},
		"fetch from a path":           {"svid", "fetch", "--socket", "/run/api.sock"},
		"watch a negative count":      {"svid", "watch", "--count", "-1"},
		"watch runs nothing":          {"svid", "watch", "--exec", "  "},
		"watch runs half a quote":     {"svid", "watch", "--exec", "sh -c 'x"},
		"watch runs for no time":      {"svid", "watch", "--exec", "true", "--exec-timeout", "0s"},
		"verify nothing":              {"svid", "verify"},
		"verify against nothing":      {"svid", "verify", "--svid", "x.pem"},
		"version of something":        {"version", "1"},
		"version as flag of a verb":   {"status", "--version"},
		"help for no command":         {"expel", "--help"},
		"help for no verb":            {"agent", "expel", "--help"},
		"help first for no verb":      {"agent", "--help", "expel"},
		"help on no verb":             {"help", "agent", "expel"},
		"help on no command":          {"help", "expel"},
		"dev with an argument":        {"dev", "here"},
		"dev in a bad trust domain":   {"dev", "--trust-domain", "Not A Domain"},
		"dev with a lifetime of zero": {"dev", "--x509-svid-ttl", "0s"},
	}
	for name, args := range cases {
		t.Run(name, func(t *testing.T) {
			got := assay(t, vars, args...)
			prefix := "error: usage: "
			if slices.Contains(args, "json") {
				prefix = `{"error":{"code":"invalid","reason":"usage",`
			}
			if got.code != exitUsage || !strings.HasPrefix(got.stderr, prefix) || strings.Count(got.stderr, "\n") != 1 {
				t.Errorf("exit %d, stderr %q", got.code, got.stderr)
			}
			if got.stdout != "" {
				t.Errorf("stdout %q", got.stdout)
			}
		})
	}
	if f.calls != 0 || agent.count() != 0 {
		t.Errorf("%d calls to the server and %d to the agent", f.calls, agent.count())
	}
}

// NEG-1: an ID that is none is bad data; the rule that it breaks is named, and
// nobody is asked.
func TestMalformedIDsExit65AndReachNobody(t *testing.T) {
	f := populated(newPKI(t))
	agent := &fakeAgent{}
	vars := map[string]string{serverSocketEnv: f.start(t), endpointEnv: agent.start(t)}
	for name, args := range map[string][]string{
		"entry with bad ID":         {"entry", "create", "--spiffe-id", "https://example.org/a", "--parent-id", "spiffe://example.org/b", "--selector", "a:b"},
		"entry for a trust domain":  {"entry", "create", "--spiffe-id", "spiffe://example.org", "--parent-id", "spiffe://example.org/b", "--selector", "a:b"},
		"list with bad ID":          {"entry", "list", "--parent-id", "node1"},
		"fetch with bad ID":         {"svid", "fetch", "--id", "web"},
		"verify for something else": {"svid", "verify", "--svid", "x.pem", "--bundle", "y.pem", "--id", "x"},
		"update with bad ID":        {"entry", "update", "e-1", "--spiffe-id", "x"},
		"ban of bad ID":             {"agent", "ban", "--yes", "x"},
	} {
		got := assay(t, vars, args...)
		if got.code != 65 || !strings.HasPrefix(got.stderr, "error: spiffe_id_invalid: ") || got.stdout != "" || strings.Count(got.stderr, "\n") != 1 {
			t.Errorf("%s: exit %d, %q, %q", name, got.code, got.stdout, got.stderr)
		}
	}
	if f.calls != 0 || agent.count() != 0 {
		t.Errorf("%d calls to the server and %d to the agent", f.calls, agent.count())
	}
}

func TestNearMissIsSuggested(t *testing.T) {
	if got := assay(t, nil, "entry", "craete"); !strings.Contains(got.stderr, "did you mean create?") {
		t.Error(got.stderr)
	}
}

func TestEveryVerbExplainsItselfWithAnExample(t *testing.T) {
	var walk func(cmd *cobra.Command)
	verbs := 0
	walk = func(cmd *cobra.Command) {
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
		if cmd.HasSubCommands() || cmd.Parent().Name() == "completion" {
			return // cobra writes its own help
		}
		verbs++
		if cmd.Short == "" || !strings.Contains(cmd.Long, "\n  $ assay ") {
			t.Errorf("%s has no example in its help", cmd.CommandPath())
		}
		got := assay(t, nil, append(strings.Fields(cmd.CommandPath())[1:], "--help")...)
		if got.code != 0 || !strings.Contains(got.stdout, cmd.Long) || got.stderr != "" {
			t.Errorf("%s --help: exit %d, stderr %q", cmd.CommandPath(), got.code, got.stderr)
		}
	}
	walk(newRoot(&tool{}))
	if verbs < 13 {
		t.Errorf("only %d verbs", verbs)
	}
}

func TestHelpOfGroupsAndOfTheHelpCommand(t *testing.T) {
	for want, args := range map[string][]string{
		"Agents: the nodes":           {"agent", "--help"},
		"Join tokens: one-time":       {"help", "token"},
		"assay entry create --spiffe": {"help", "entry", "create"},
		"assay [command]":             {"--help"},
		"assay talks to":              {"help"},
	} {
		if got := assay(t, nil, args...); got.code != 0 || !strings.Contains(got.stdout, want) || got.stderr != "" {
			t.Errorf("%v: exit %d, %q%q", args, got.code, got.stdout, got.stderr)
		}
	}
}

// The operator's guide and the help tell the same exit codes.
func TestTheGuideHasTheExitCodesOfTheHelp(t *testing.T) {
	guide, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	words := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	_, codes, _ := strings.Cut(words(newRoot(&tool{}).Long), "Exit codes: ")
	codes, _, _ = strings.Cut(codes, ".")
	if codes == "" || !strings.Contains(words(string(guide)), "## Exit codes "+codes+". ") {
		t.Errorf("the guide lacks %q", codes)
	}
}

// The file for the token has one name, wherever it is written.
func TestTheTokenFileHasOneName(t *testing.T) {
	for _, path := range []string{"../../docs/operating.md", "../../deploy/systemd/assay-agent.service", "testdata/token_create.txt"} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), joinTokenFile) || strings.Contains(string(text), ": /etc/assay/") {
			t.Errorf("%s does not name %s, or another file", path, joinTokenFile)
		}
	}
}

func TestCompletionKnowsVerbsAndClosedValues(t *testing.T) {
	if got := assay(t, nil, "completion", "bash"); got.code != 0 || !strings.Contains(got.stdout, "assay") {
		t.Errorf("exit %d", got.code)
	}
	for want, args := range map[string][]string{
		"create\t":  {"__complete", "entry", "cr"},
		"json\n":    {"__complete", "status", "-o", ""},
		"spiffe\n":  {"__complete", "bundle", "show", "--format", "s"},
		"svid\tX.5": {"__complete", "sv"},
	} {
		if got := assay(t, nil, args...); !strings.Contains(got.stdout, want) {
			t.Errorf("%v gives %q", args, got.stdout)
		}
	}
}

func TestErrorsOfTheServerKeepReasonAndRequestID(t *testing.T) {
	cases := []struct {
		err  error
		code int
	}{
		{fault.New(fault.Denied, "operator_not_allowed", "uid 1000 is not an operator"), 77},
		{fault.New(fault.NotReady, "store_unavailable", "the store does not answer"), 69},
		{fault.New(fault.Conflict, "changed_meanwhile", "read again and retry"), 75},
		{fault.New(fault.Internal, "internal", "a defect"), 70},
		{fault.New(fault.Unimplemented, "unimplemented", "this server has no such method"), 69},
	}
	for _, c := range cases {
		f := populated(newPKI(t))
		f.err = c.err
		vars := map[string]string{serverSocketEnv: f.start(t)}
		for _, verb := range [][]string{
			{"status"},
			{"entry", "list"},
			{"entry", "show", "e-1"},
			{"entry", "delete", "e-1"},
			{"agent", "list"},
			{"token", "create"},
			{"bundle", "show"},
			{"entry", "create", "--spiffe-id", "spiffe://example.org/a", "--parent-id", "spiffe://example.org/b", "--selector", "a:b"},
		} {
			got := assay(t, vars, verb...)
			want := "error: " + fault.ReasonOf(c.err) + ": " + fault.SafeText(c.err) + " (request_id=REQ7)\n"
			if got.code != c.code || got.stderr != want {
				t.Errorf("%v: exit %d, %q, want %d, %q", verb, got.code, got.stderr, c.code, want)
			}
		}
		var doc struct{ Error daemon.Failure }
		got := assay(t, vars, "status", "-o", "json")
		if err := json.Unmarshal([]byte(got.stderr), &doc); err != nil {
			t.Fatal(err)
		}
		want := daemon.Failure{Code: fault.KindOf(c.err).Error(), Reason: fault.ReasonOf(c.err), Message: fault.SafeText(c.err), RequestID: "REQ7"}
		if doc.Error != want {
			t.Errorf("got %+v, want %+v", doc.Error, want)
		}
	}
}

func TestUsageErrorIsJSONToo(t *testing.T) {
	got := assay(t, nil, "entry", "show", "-o", "json")
	var doc struct{ Error daemon.Failure }
	if err := json.Unmarshal([]byte(got.stderr), &doc); err != nil || doc.Error.Reason != "usage" || got.code != exitUsage {
		t.Errorf("exit %d, %q", got.code, got.stdout)
	}
}

func TestUnreachableServerIsExplained(t *testing.T) {
	dead := t.TempDir() + "/dead.sock"
	leaveDeadSocket(t, dead)
	for path, want := range map[string]string{
		t.TempDir() + "/none.sock": "does not exist",
		dead:                       "nobody listens",
	} {
		got := assay(t, map[string]string{serverSocketEnv: "unix://" + path}, "status")
		if got.code != 69 || !strings.HasPrefix(got.stderr, "error: unreachable: ") || !strings.Contains(got.stderr, want) {
			t.Errorf("exit %d, %q, want %q", got.code, got.stderr, want)
		}
	}
}

// What is no socket answers a connection as a dead one does.
func TestAFileInPlaceOfTheSocketIsNamed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "api.sock")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"status", "--socket", file},
		{"svid", "fetch", "--timeout", "50ms", "--socket", "unix://" + file},
	} {
		got := assay(t, nil, args...)
		if got.code != 69 || !strings.HasPrefix(got.stderr, "error: unreachable: ") || !strings.Contains(got.stderr, file+" is not a socket") {
			t.Errorf("exit %d, %q", got.code, got.stderr)
		}
	}
}

// asStranger runs do as a user without rights to our files.
func asStranger(t *testing.T, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if os.Geteuid() == 0 {
			runtime.LockOSThread() // and never unlocked: the thread ends with its rights
			if _, err := unix.SetfsuidRetUid(65534); err != nil {
				t.Error(err)
				return
			}
		}
		do()
	}()
	<-done
}

func TestADeniedSocketSaysWhatKeepsTheCallerOut(t *testing.T) {
	top := t.TempDir()
	if err := os.Chmod(filepath.Dir(top), 0o755); err != nil {
		t.Fatal(err)
	}
	closed := filepath.Join(top, "run")
	path := filepath.Join(closed, "public", "api.sock")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	leaveDeadSocket(t, path)
	agent := peer{name: "the Workload API", network: "unix", address: path, open: true}
	server := peer{name: "the server's admin socket", network: "unix", address: path}
	modes := func(dir, socket os.FileMode) {
		t.Helper()
		if err := errors.Join(os.Chmod(path, socket), os.Chmod(closed, dir)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = os.Chmod(closed, 0o755) })
	expect := func(p peer, reason, want string) {
		t.Helper()
		var err error
		asStranger(t, func() { err = p.unreachable() })
		if fault.ReasonOf(err) != reason || !strings.Contains(fault.SafeText(err), want) {
			t.Errorf("got %v, want %s: %s", err, reason, want)
		}
	}
	modes(0o600, 0o666)
	expect(agent, "socket_denied", "the directory "+closed+" keeps it out")
	expect(server, "socket_denied", "run as root or as a member of its group")
	if err := os.Chmod(closed, 0o755); err != nil {
		t.Fatal(err)
	}
	modes(0o755, 0o400)
	expect(agent, "socket_denied", "the socket's own mode keeps it out")
	modes(0o755, 0o666)
	expect(agent, "unreachable", "nobody listens on")
}

func TestFlagBeatsEnvironment(t *testing.T) {
	f := populated(newPKI(t))
	got := assay(t, map[string]string{serverSocketEnv: "/nowhere"}, "status", "--socket", f.start(t))
	if got.code != 0 {
		t.Error(got.stderr)
	}
}

func TestVersionNeedsNoServer(t *testing.T) {
	got := assay(t, nil, "version", "-o", "json")
	var v versionShape
	if err := json.Unmarshal([]byte(got.stdout), &v); err != nil || got.code != 0 || v.Version == "" || v.Go == "" {
		t.Errorf("exit %d, %q", got.code, got.stdout)
	}
	if got := assay(t, nil, "version"); got.code != 0 || !strings.HasPrefix(got.stdout, "assay ") {
		t.Errorf("exit %d, %q", got.code, got.stdout)
	}
	for _, more := range [][]string{nil, {"-o", "json"}} {
		if flag, verb := assay(t, nil, append(more, "--version")...), assay(t, nil, append(more, "version")...); flag != verb {
			t.Errorf("--version gives %+v, version %+v", flag, verb)
		}
	}
}

func TestPlainLeavesNothingThatSteersATerminal(t *testing.T) {
	for in, want := range map[string]string{
		"web é 名":        "web é 名",
		"\x1b[2J":        `\x1b[2J`,
		"a\nb\tc\r":      `a\nb\tc\r`,
		"bad\xff":        `bad\xff`,
		"rtl\u202eevil":  `rtl\u202eevil`,
		"zero\u200bwide": `zero\u200bwide`,
	} {
		if got := plain(in); got != want {
			t.Errorf("plain(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestFilesOfTheTestAreNotTerminals(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if isTerminal(f) {
		t.Error("/dev/null is a terminal")
	}
}

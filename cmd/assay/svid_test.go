package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
)

type svidStream = workload.SpiffeWorkloadAPI_FetchX509SVIDServer

const (
	webID   = "spiffe://example.org/web"
	adminID = "spiffe://example.org/admin"
)

func TestFetchAsJSONHasPEMAndNoKeyUnlessAsked(t *testing.T) {
	p, foreign := newPKI(t), newPKI(t)
	m := message(p.svid(webID, "", 1))
	m.FederatedBundles = map[string][]byte{"spiffe://other.org": foreign.root.Raw}
	var header metadata.MD
	agent := &fakeAgent{script: func(stream svidStream, _ int) error {
		header, _ = metadata.FromIncomingContext(stream.Context())
		return stream.Send(m)
	}}
	vars := map[string]string{endpointEnv: agent.start(t)}
	for _, withKey := range []bool{false, true} {
		args := []string{"svid", "fetch", "-o", "json"}
		if withKey {
			args = append(args, "--with-key")
		}
		got := assay(t, vars, args...)
		var doc fetchShape
		if err := json.Unmarshal([]byte(got.stdout), &doc); err != nil || got.code != 0 {
			t.Fatalf("exit %d, %v: %s", got.code, err, got.stderr)
		}
		if len(doc.SVIDs) != 1 || doc.SVIDs[0].SPIFFEID != webID || len(doc.Bundles) != 2 || doc.Files == nil {
			t.Errorf("%+v", doc)
		}
		if strings.Contains(got.stdout, "PRIVATE KEY") != withKey {
			t.Errorf("with key %v: %s", withKey, got.stdout)
		}
		if !withKey {
			continue
		}
		parsed, err := x509svid.Parse([]byte(doc.SVIDs[0].CertificatesPEM), []byte(doc.SVIDs[0].PrivateKeyPEM))
		if err != nil || parsed.ID.String() != webID {
			t.Errorf("%v", err)
		}
	}
	if got := header.Get("workload.spiffe.io"); len(got) != 1 || got[0] != "true" {
		t.Errorf("security header %v", got)
	}
}

func TestFetchWritesFilesThatBelongTogether(t *testing.T) {
	p, foreign := newPKI(t), newPKI(t)
	m := message(p.svid(webID, "a", 1), p.svid(adminID, "b", 2))
	m.FederatedBundles = map[string][]byte{"spiffe://other.org": foreign.root.Raw}
	agent := &fakeAgent{script: sends(m)}
	vars := map[string]string{endpointEnv: agent.start(t)}
	dir := filepath.Join(t.TempDir(), "tls")
	got := assay(t, vars, "svid", "fetch", "--dir", dir)
	if got.code != 0 || strings.Count(got.stdout, "\nwrote "+dir) != 6 {
		t.Fatalf("exit %d, %s%s", got.code, got.stdout, got.stderr)
	}
	for number, id := range map[string]string{"": webID, ".1": adminID} {
		s, err := x509svid.Load(filepath.Join(dir, "svid"+number+".pem"), filepath.Join(dir, "svid_key"+number+".pem"))
		if err != nil || s.ID.String() != id {
			t.Errorf("svid%s: %v", number, err)
		}
	}
	for name, want := range map[string][]byte{"bundle.pem": p.root.Raw, "bundle.other.org.pem": foreign.root.Raw} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if roots, err := parsePEM(data); err != nil || len(roots) != 1 || !bytes.Equal(roots[0].Raw, want) {
			t.Errorf("%s: %d roots, %v", name, len(roots), err)
		}
	}
	// What was written verifies, and only one identity is left when picked.
	got = assay(t, nil, "svid", "verify", "--svid", dir+"/svid.1.pem", "--bundle", dir+"/bundle.pem", "--id", adminID)
	if got.code != 0 {
		t.Error(got.stderr)
	}
	for _, flags := range [][]string{{"--hint", "b"}, {"--id", adminID}} {
		got = assay(t, vars, append([]string{"svid", "fetch", "--dir", dir}, flags...)...)
		if got.code != 0 {
			t.Fatal(got.stderr)
		}
		if s, err := x509svid.Load(dir+"/svid.pem", dir+"/svid_key.pem"); err != nil || s.ID.String() != adminID {
			t.Errorf("%v: %v", flags, err)
		}
		if _, err := os.Lstat(dir + "/svid.1.pem"); !os.IsNotExist(err) {
			t.Errorf("%v: the second identity stays: %v", flags, err)
		}
	}
	got = assay(t, vars, "svid", "fetch", "--hint", "nobody")
	if got.code != 69 || !strings.HasPrefix(got.stderr, "error: identity_not_found: ") {
		t.Errorf("exit %d, %s", got.code, got.stderr)
	}
}

func TestFetchTellsAPersonWhatItWaitsFor(t *testing.T) {
	p := newPKI(t)
	agent := &fakeAgent{script: func(stream svidStream, call int) error {
		if call == 1 {
			return fault.Status(fault.New(fault.NotReady, "not_synced", "not synced yet"), "R").Err()
		}
		return stream.Send(message(p.svid(webID, "", 1)))
	}}
	uri := agent.start(t)
	for _, isTTY := range []bool{true, false} {
		agent.mu.Lock()
		agent.calls = 0
		agent.mu.Unlock()
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), env{
			stdin: strings.NewReader(""), stdout: &stdout, stderr: &stderr, getenv: func(string) string { return uri }, isTTY: isTTY,
		}, []string{"svid", "fetch"})
		if code != 0 || strings.HasPrefix(stderr.String(), "waiting: not synced yet") != isTTY {
			t.Errorf("exit %d, %q", code, stderr.String())
		}
	}
}

// WL-18: a client does not repeat what was refused for good.
func TestFetchRepeatsOnlyWhatMayGetBetter(t *testing.T) {
	p := newPKI(t)
	cases := map[string]struct {
		err   error
		calls int
		code  int
	}{
		"no identity":    {fault.Status(fault.New(fault.Denied, "no_identity", "no entry matches this process"), "R").Err(), 1, 77},
		"wrong request":  {status.Error(codes.InvalidArgument, "security header missing"), 1, 65},
		"no such method": {status.Error(codes.Unimplemented, "unknown service"), 1, 69},
		"not synced yet": {fault.Status(fault.New(fault.NotReady, "not_synced", "wait"), "R").Err(), 3, 0},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			agent := &fakeAgent{script: func(stream svidStream, call int) error {
				if call < 3 {
					return c.err
				}
				return stream.Send(message(p.svid(webID, "", 1)))
			}}
			got := assay(t, map[string]string{endpointEnv: agent.start(t)}, "svid", "fetch")
			if got.code != c.code || agent.count() != c.calls {
				t.Errorf("exit %d after %d calls: %s", got.code, agent.count(), got.stderr)
			}
		})
	}
}

// Who has no identity is told what an entry would have to say.
func TestNoIdentityNamesTheIDsOfTheProcess(t *testing.T) {
	agent := &fakeAgent{script: func(svidStream, int) error {
		return fault.Status(fault.New(fault.Denied, "no_identity", "no identity issued"), "R3").Err()
	}}
	got := assay(t, map[string]string{endpointEnv: agent.start(t)}, "svid", "fetch")
	ids := fmt.Sprintf("uid %d and gid %d; compare with `assay entry list`", os.Geteuid(), os.Getegid())
	if got.code != 77 || !strings.HasPrefix(got.stderr, "error: no_identity: no identity issued: ") ||
		!strings.Contains(got.stderr, ids) || !strings.HasSuffix(got.stderr, " (request_id=R3)\n") {
		t.Errorf("exit %d, %q", got.code, got.stderr)
	}
}

// Files by place change their identity when an entry goes: that is said, once.
func TestSeveralIdentitiesInADirectoryAreWarnedOf(t *testing.T) {
	p := newPKI(t)
	one, two := message(p.svid(webID, "a", 1)), message(p.svid(webID, "a", 2), p.svid(adminID, "b", 3))
	agent := &fakeAgent{script: sends(two, one, two)}
	vars := map[string]string{endpointEnv: agent.start(t)}
	dir := filepath.Join(t.TempDir(), "tls")
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"svid", "fetch", "--dir", dir}, 1},
		{[]string{"svid", "watch", "--count", "3", "--dir", dir}, 1},
		{[]string{"svid", "fetch", "--dir", dir, "--id", adminID}, 0},
		{[]string{"svid", "fetch", "--dir", dir, "--hint", "a"}, 0},
		{[]string{"svid", "watch", "--count", "3", "--dir", dir, "--hint", "a"}, 0},
		{[]string{"svid", "fetch"}, 0},
		{[]string{"svid", "watch", "--count", "3"}, 0},
	} {
		got := assay(t, vars, c.args...)
		if got.code != 0 || strings.Count(got.stderr, "\n") != c.want || strings.Count(got.stderr, "warning: several_identities: ") != c.want {
			t.Errorf("%v: exit %d, %q", c.args, got.code, got.stderr)
		}
	}
	for _, verb := range []string{"fetch", "watch"} {
		help := strings.Join(strings.Fields(assay(t, nil, "svid", verb, "--help").stdout), " ")
		if !strings.Contains(help, "with several identities always name one") {
			t.Errorf("svid %s --help does not say it", verb)
		}
	}
}

// A watch never takes files away: what serves with them goes on until their end.
func TestWatchLeavesTheFilesOfAWithdrawnIdentity(t *testing.T) {
	p := newPKI(t)
	agent := &fakeAgent{script: func(stream svidStream, call int) error {
		if call == 1 {
			if err := stream.Send(message(p.svid(webID, "", 1))); err != nil {
				return err
			}
			return fault.Status(fault.New(fault.Denied, "no_identity", "no identity issued"), "R").Err()
		}
		return status.Error(codes.Unimplemented, "the end")
	}}
	dir := filepath.Join(t.TempDir(), "tls")
	got := assay(t, map[string]string{endpointEnv: agent.start(t)}, "svid", "watch", "--dir", dir)
	if got.code != 69 || !strings.Contains(got.stderr, "warning: no_identity: ") {
		t.Fatalf("exit %d, %q", got.code, got.stderr)
	}
	if s, err := x509svid.Load(dir+"/svid.pem", dir+"/svid_key.pem"); err != nil || s.ID.String() != webID {
		t.Error(err)
	}
}

func TestFetchGivesUpWithTheReasonItWaitedFor(t *testing.T) {
	agent := &fakeAgent{script: func(svidStream, int) error {
		return fault.Status(fault.New(fault.NotReady, "not_synced", "the agent has not reached its server yet"), "R5").Err()
	}}
	got := assay(t, map[string]string{endpointEnv: agent.start(t)}, "svid", "fetch", "--timeout", "300ms")
	if got.code != 69 || got.stderr != "error: not_synced: the agent has not reached its server yet (request_id=R5)\n" {
		t.Errorf("exit %d, %q", got.code, got.stderr)
	}
	got = assay(t, nil, "svid", "fetch", "--timeout", "50ms", "--socket", "unix://"+t.TempDir()+"/none.sock")
	if got.code != 69 || !strings.Contains(got.stderr, "does not exist") {
		t.Errorf("exit %d, %q", got.code, got.stderr)
	}
	silent := &fakeAgent{script: sends()}
	got = assay(t, map[string]string{endpointEnv: silent.start(t)}, "svid", "fetch", "--timeout", "50ms")
	if got.code != 69 || !strings.HasPrefix(got.stderr, "error: timeout: ") {
		t.Errorf("exit %d, %q", got.code, got.stderr)
	}
}

func TestFetchRefusesAnAnswerThatIsNoSVID(t *testing.T) {
	p := newPKI(t)
	bad := p.svid(webID, "", 1)
	bad.X509SvidKey = p.svid(webID, "", 2).X509SvidKey // another key
	for name, m := range map[string]*workload.X509SVIDResponse{"no svid": {}, "key of another": message(bad)} {
		agent := &fakeAgent{script: sends(m)}
		got := assay(t, map[string]string{endpointEnv: agent.start(t)}, "svid", "fetch")
		if got.code != 65 || !strings.HasPrefix(got.stderr, "error: bad_answer: ") {
			t.Errorf("%s: exit %d, %q", name, got.code, got.stderr)
		}
	}
}

func TestWatchPrintsALinePerUpdateAndEndsAfterCount(t *testing.T) {
	p := newPKI(t)
	agent := &fakeAgent{script: sends(message(p.svid(webID, "", 1)), message(p.svid(webID, "", 2), p.svid(adminID, "", 3)))}
	vars := map[string]string{endpointEnv: agent.start(t)}
	got := assay(t, vars, "svid", "watch", "--count", "2")
	lines := strings.Split(strings.TrimSpace(got.stdout), "\n")
	if got.code != 0 || got.stderr != "" || len(lines) != 2 {
		t.Fatalf("exit %d, %q, %q", got.code, got.stdout, got.stderr)
	}
	if !strings.HasSuffix(lines[0], " update=1 id="+webID+" serial=1 not_after=2126-01-01T00:00:00Z roots=1") ||
		!strings.HasSuffix(lines[1], " update=2 id="+webID+" serial=2 not_after=2126-01-01T00:00:00Z roots=1 identities=2") {
		t.Errorf("%q", lines)
	}
	got = assay(t, vars, "svid", "watch", "--count", "2", "-o", "json")
	dec := json.NewDecoder(strings.NewReader(got.stdout))
	for want := 1; want <= 2; want++ {
		var line watchLine
		if err := dec.Decode(&line); err != nil || line.Update != want || len(line.SVIDs) != want || line.Roots != 1 {
			t.Errorf("%+v, %v", line, err)
		}
	}
}

// Each run of the command finds the files of its own update, whole.
func TestWatchWritesFilesBeforeTheCommandRuns(t *testing.T) {
	p := newPKI(t)
	agent := &fakeAgent{script: sends(message(p.svid(webID, "", 1)), message(p.svid(adminID, "", 2)))}
	dir, saved := filepath.Join(t.TempDir(), "tls"), t.TempDir()
	command := `sh -c 'n=$(ls "` + saved + `" | wc -l); cat "$ASSAY_SVID_DIR/svid.pem" "$ASSAY_SVID_DIR/svid_key.pem" > "` + saved + `/$n.pem"; echo to the terminal'`
	got := assay(t, map[string]string{endpointEnv: agent.start(t)}, "svid", "watch", "--count", "2", "--dir", dir, "--exec", command)
	if got.code != 0 || strings.Contains(got.stdout, "terminal") || strings.Count(got.stderr, "to the terminal\n") != 2 {
		t.Fatalf("exit %d, %q, %q", got.code, got.stdout, got.stderr)
	}
	for name, want := range map[string]string{"0.pem": webID, "1.pem": adminID} {
		s, err := x509svid.Load(filepath.Join(saved, name), filepath.Join(saved, name))
		if err != nil || s.ID.String() != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWatchGoesOnWhenTheCommandFails(t *testing.T) {
	p := newPKI(t)
	for name, command := range map[string]string{
		"fails": "sh -c 'exit 3'", "missing": "/no/such/command", "hangs": "sleep 600", "shell words are not expanded": "$HOME/x",
	} {
		t.Run(name, func(t *testing.T) {
			agent := &fakeAgent{script: sends(message(p.svid(webID, "", 1)), message(p.svid(webID, "", 2)))}
			got := assay(t, map[string]string{endpointEnv: agent.start(t)},
				"svid", "watch", "--count", "2", "--exec", command, "--exec-timeout", "100ms")
			if got.code != 0 || strings.Count(got.stdout, "\n") != 2 || strings.Count(got.stderr, "warning: exec_failed: ") != 2 {
				t.Errorf("exit %d, %q, %q", got.code, got.stdout, got.stderr)
			}
		})
	}
}

// WL-18, WL-21, WL-29: the watch waits out what may get better and starts from
// each message anew; what is final ends it.
func TestWatchOutlivesItsAgentButNotARefusalForGood(t *testing.T) {
	p := newPKI(t)
	agent := &fakeAgent{script: func(stream svidStream, call int) error {
		switch call {
		case 1:
			if err := stream.Send(message(p.svid(webID, "", 1))); err != nil {
				return err
			}
			return fault.Status(fault.New(fault.NotReady, "stopping", "the agent stops"), "R").Err()
		case 2:
			return fault.Status(fault.New(fault.Denied, "no_identity", "no entry matches this process"), "R").Err()
		case 3:
			return stream.Send(message(p.svid(adminID, "", 2)))
		}
		return status.Error(codes.Unimplemented, "unknown method")
	}}
	got := assay(t, map[string]string{endpointEnv: agent.start(t)}, "svid", "watch")
	if got.code != 69 || strings.Count(got.stdout, "\n") != 2 || !strings.Contains(got.stdout, adminID) {
		t.Errorf("exit %d, %q", got.code, got.stdout)
	}
	for _, want := range []string{"warning: stopping: ", "warning: no_identity: ", "error: unimplemented: "} {
		if !strings.Contains(got.stderr, want) {
			t.Errorf("no %q in %q", want, got.stderr)
		}
	}
	wrong := &fakeAgent{script: func(svidStream, int) error { return status.Error(codes.InvalidArgument, "no header") }}
	got = assay(t, map[string]string{endpointEnv: wrong.start(t)}, "svid", "watch")
	if got.code != 65 || wrong.count() != 1 {
		t.Errorf("exit %d after %d calls", got.code, wrong.count())
	}
}

func TestWatchEndsCleanlyWhenInterrupted(t *testing.T) {
	p := newPKI(t)
	agent := &fakeAgent{script: sends(message(p.svid(webID, "", 1)))}
	uri := agent.start(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &cancelOnWrite{cancel: cancel}
	var stderr bytes.Buffer
	code := run(ctx, env{stdin: strings.NewReader(""), stdout: out, stderr: &stderr, getenv: func(string) string { return uri }},
		[]string{"svid", "watch", "--exec", "sleep 600"})
	if code != 0 || stderr.Len() != 0 {
		t.Errorf("exit %d, %q", code, stderr.String())
	}
}

// cancelOnWrite interrupts the tool as soon as it prints something.
type cancelOnWrite struct {
	once   sync.Once
	cancel func()
}

func (c *cancelOnWrite) Write(b []byte) (int, error) {
	c.once.Do(c.cancel)
	return len(b), nil
}

func TestWatchRefusesADirectoryThatNeverWorked(t *testing.T) {
	p := newPKI(t)
	agent := &fakeAgent{script: sends(message(p.svid(webID, "", 1)))}
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	got := assay(t, map[string]string{endpointEnv: agent.start(t)}, "svid", "watch", "--count", "1", "--dir", filepath.Join(open, "tls"))
	if got.code != 77 || !strings.HasPrefix(got.stderr, "error: path_untrusted: ") || got.stdout != "" {
		t.Errorf("exit %d, %q, %q", got.code, got.stdout, got.stderr)
	}
}

// A directory that fails later is tried again: the watch is late, not over.
func TestWatchWaitsForADirectoryThatWorkedBefore(t *testing.T) {
	p := newPKI(t)
	dir := filepath.Join(t.TempDir(), "tls")
	first := make(chan struct{})
	agent := &fakeAgent{script: func(stream svidStream, _ int) error {
		if err := stream.Send(message(p.svid(webID, "", 1))); err != nil {
			return err
		}
		<-first
		if err := stream.Send(message(p.svid(webID, "", 2))); err != nil {
			return err
		}
		<-stream.Context().Done()
		return nil
	}}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	uri := agent.start(t)
	spoiled := filepath.Join(dir, ".assay")
	stdout := writerFunc(func(line string) {
		if strings.Contains(line, "update=1") {
			if err := os.Chmod(spoiled, 0o777); err != nil {
				t.Error(err)
			}
			close(first)
		}
	})
	stderr := writerFunc(func(line string) {
		if !strings.HasPrefix(line, "warning: path_untrusted: ") {
			t.Errorf("%q", line)
		}
		if err := os.Chmod(spoiled, 0o755); err != nil {
			t.Error(err)
		}
	})
	code := run(ctx, env{stdin: strings.NewReader(""), stdout: stdout, stderr: stderr, getenv: func(string) string { return uri }},
		[]string{"svid", "watch", "--count", "2", "--dir", dir})
	if code != 0 || ctx.Err() != nil {
		t.Errorf("exit %d", code)
	}
}

type writerFunc func(string)

func (f writerFunc) Write(b []byte) (int, error) {
	f(string(b))
	return len(b), nil
}

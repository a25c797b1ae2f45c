package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// shortDir is a directory whose sockets have room in a Unix address.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "dev")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// runningDev is `assay dev` in this process.
type runningDev struct {
	shape devShape
	stop  func() outcome
}

// startDev starts `assay dev` and waits until it says that all is ready.
func startDev(t *testing.T, dir string) runningDev {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	ready, stdout := io.Pipe()
	var stderr bytes.Buffer
	done := make(chan int, 1)
	go func() {
		code := run(ctx, env{stdin: strings.NewReader(""), stdout: stdout, stderr: &stderr, getenv: os.Getenv},
			[]string{"dev", "--dir", dir, "-o", "json"})
		_ = stdout.Close()
		done <- code
	}()
	stop := sync.OnceValue(func() outcome {
		cancel()
		return outcome{code: <-done, stderr: stderr.String()}
	})
	t.Cleanup(func() { stop() })
	var d runningDev
	if err := json.NewDecoder(ready).Decode(&d.shape); err != nil {
		t.Fatalf("%v: %+v", err, stop())
	}
	d.stop = stop
	return d
}

func (d runningDev) vars() map[string]string {
	return map[string]string{serverSocketEnv: d.shape.ServerSocket, endpointEnv: d.shape.EndpointSocket}
}

func TestDevGivesAnIdentityAndGoesOnWhereItStopped(t *testing.T) {
	dir := shortDir(t)
	first := startDev(t, dir)
	if err := workloadapi.ValidateAddress(first.shape.EndpointSocket); err != nil { // WL-17, CLIENT-1
		t.Error(err)
	}
	created := assay(t, first.vars(), "entry", "create", "--spiffe-id", "spiffe://example.org/hello",
		"--parent-id", first.shape.AgentID, "--selector", "unix:uid:"+strconv.Itoa(os.Getuid()))
	if created.code != 0 {
		t.Fatal(created.stderr)
	}
	fetch := func(d runningDev) {
		t.Helper()
		got := assay(t, d.vars(), "svid", "fetch", "-o", "json", "--dir", filepath.Join(dir, "tls"))
		var doc fetchShape
		if err := json.Unmarshal([]byte(got.stdout), &doc); err != nil || got.code != 0 {
			t.Fatalf("exit %d, %v: %s", got.code, err, got.stderr)
		}
		if doc.SVIDs[0].SPIFFEID != "spiffe://example.org/hello" {
			t.Errorf("%+v", doc.SVIDs[0])
		}
	}
	fetch(first)
	got := assay(t, nil, "svid", "verify", "--svid", dir+"/tls/svid.pem", "--bundle", dir+"/tls/bundle.pem")
	if got.code != 0 {
		t.Error(got.stderr)
	}
	var status statusShape
	if err := json.Unmarshal([]byte(assay(t, first.vars(), "status", "-o", "json").stdout), &status); err != nil {
		t.Fatal(err)
	}
	if status.Entries != 1 || status.AgentCounts.Connected != 1 || len(status.Authorities) != 1 {
		t.Errorf("%+v", status)
	}
	if end := first.stop(); end.code != 0 {
		t.Errorf("exit %d, %q", end.code, end.stderr)
	}

	second := startDev(t, dir)
	if second.shape.AgentID != first.shape.AgentID {
		t.Errorf("the agent was %s, now %s", first.shape.AgentID, second.shape.AgentID)
	}
	fetch(second)
	if end := second.stop(); end.code != 0 {
		t.Errorf("exit %d, %q", end.code, end.stderr)
	}
}

func TestTokenOfTheToolIsTheAgentsName(t *testing.T) {
	d := startDev(t, shortDir(t))
	var made tokenShape
	if err := json.Unmarshal([]byte(assay(t, d.vars(), "token", "create", "-o", "json").stdout), &made); err != nil {
		t.Fatal(err)
	}
	token, err := os.ReadFile(filepath.Join(d.shape.Dir, "join_token"))
	if err != nil {
		t.Fatal(err)
	}
	// The agent that dev has started joined with that token, so its name shows
	// that tool and server derive names alike.
	if want := tokenAgentID(mustTrustDomain(t), "/assay/", strings.TrimSpace(string(token))); d.shape.AgentID != want {
		t.Errorf("agent %s, want %s", d.shape.AgentID, want)
	}
	if made.AgentID == d.shape.AgentID || len(made.Pin) != 64 {
		t.Errorf("%+v", made)
	}
}

func TestSecondDevInADirectoryIsRefused(t *testing.T) {
	dir := shortDir(t)
	startDev(t, dir)
	if got := assay(t, nil, "dev", "--dir", dir); got.code != 75 || !strings.HasPrefix(got.stderr, "error: ") {
		t.Errorf("exit %d, %q", got.code, got.stderr)
	}
}

func TestDevDirFollowsTheEnvironment(t *testing.T) {
	cases := []struct {
		flag string
		vars map[string]string
		want string
	}{
		{"/x", map[string]string{"XDG_RUNTIME_DIR": "/run/user/7", "HOME": "/h"}, "/x"},
		{"", map[string]string{"XDG_RUNTIME_DIR": "/run/user/7", "HOME": "/h"}, "/run/user/7/assay-dev"},
		{"", map[string]string{"XDG_STATE_HOME": "/s", "HOME": "/h"}, "/s/assay-dev"},
		{"", map[string]string{"HOME": "/h"}, "/h/.local/state/assay-dev"},
	}
	for _, c := range cases {
		if got, err := devDir(c.flag, func(name string) string { return c.vars[name] }); err != nil || got != c.want {
			t.Errorf("%+v: %q, %v", c, got, err)
		}
	}
	if _, err := devDir("", func(string) string { return "" }); err == nil {
		t.Error("a directory out of nowhere")
	}
}

func TestDevPrintsWhatToExport(t *testing.T) {
	var out bytes.Buffer
	shape := devShape{
		TrustDomain: "example.org", AgentID: "spiffe://example.org/assay/agent/join_token/01",
		ServerSocket: "/run/user/7/assay-dev/admin.sock", EndpointSocket: "unix:///run/user/7/assay-dev/public/api.sock", SDSSocket: "/run/user/7/assay-dev/public/sds.sock", Dir: "/run/user/7/assay-dev",
	}
	if err := shape.write(&out); err != nil {
		t.Fatal(err)
	}
	golden(t, "dev.txt", strings.ReplaceAll(out.String(), "unix:uid:"+strconv.Itoa(os.Getuid()), "unix:uid:UID"))
}

func mustTrustDomain(t *testing.T) spiffeid.TrustDomain {
	t.Helper()
	td, err := spiffeid.TrustDomainFromString("example.org")
	if err != nil {
		t.Fatal(err)
	}
	return td
}

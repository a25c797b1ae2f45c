//go:build e2e

package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/test/harness"
)

// NEG-1, ID-18: a text that is nearly a SPIFFE ID makes no entry, in no form.
func TestNearlyAnIDMakesNoEntry(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	const parent = "spiffe://example.org/assay/agent/join_token/x"
	s.CreateEntry(parent, "spiffe://example.org/present")
	before := s.CLI("entry", "list", "-o", "json")
	for _, id := range []string{
		"", "example.org/a", "https://example.org/a", "SPIFFE://example.org/a", "spiffe://EXAMPLE.org/a", "spiffe:///a", "spiffe://example.org/",
		"spiffe://example.org/a/", "spiffe://example.org//a", "spiffe://example.org/a/../b", "spiffe://example.org/./a", "spiffe://example.org/%2e/a",
		"spiffe://example.org/a%2Fb", "spiffe://u@example.org/a", "spiffe://example.org:80/a", "spiffe://example.org/a?", "spiffe://example.org/a#",
		"spiffe://[fe80::1%25eth0]/a", "spiffe://ex\u0430mple.org/a", "spiffe://example.org/\u0430", "spiffe://example.org/a b",
		"spiffe://example.org/" + strings.Repeat("a", 2049-len("spiffe://example.org/")), "spiffe://example.org", "spiffe://other.org/a",
		"spiffe://example.org/assay/server", "spiffe://example.org/assay/agent/join_token/y",
	} {
		stdout, stderr, code := s.Try("assay", "entry", "create", "--parent-id", parent, "--spiffe-id", id, "--selector", "unix:uid:1")
		want, reason := 65, "spiffe_id_invalid"
		if id == "" {
			want, reason = 64, "usage"
		}
		if code != want || stdout != "" || !strings.HasPrefix(stderr, "error: "+reason+": ") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%.60q: exit %d, %q, %q", id, code, stdout, stderr)
		}
	}
	if after := s.CLI("entry", "list", "-o", "json"); after != before {
		t.Errorf("the entries were\n%s\nand are\n%s", before, after)
	}
}

// NEG-55: a server never starts over a store that it can't trust, nor without
// its seal key, and leaves everything as it is.
func TestServerStopsAtADamagedStore(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	root := s.CLI("bundle", "show")
	s.Server.Stop(syscall.SIGTERM)
	file, seal := s.File("server/data/store.db"), s.File("seal/seal.key")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	meta := bytes.Clone(good)
	for i := range 2 * page { // both copies of what says where everything is
		meta[i] ^= 1
	}
	for name, content := range map[string][]byte{
		"empty": nil, "zeros": make([]byte, len(good)), "cut off": good[:2*page+1], "both meta pages": meta, "text": []byte("trust me\n"),
	} {
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
		s.LaunchServer()
		if code := exitCode(s.Server); code != 65 || !logged(t, s, "server.log", "error: store_corrupt: ") {
			t.Errorf("%s: exit %d", name, code)
		}
		if left, err := os.ReadFile(file); err != nil || !bytes.Equal(left, content) {
			t.Errorf("%s: the file is another now: %v", name, err)
		}
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}

	key, err := os.ReadFile(seal)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(seal, []byte("no key\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.LaunchServer()
	if code := exitCode(s.Server); code != 78 {
		t.Errorf("a seal key that is none: exit %d", code)
	}
	if err := os.WriteFile(seal, key, 0o600); err != nil {
		t.Fatal(err)
	}
	s.StartServer()
	if now := s.CLI("bundle", "show"); now != root {
		t.Error("the root is another one")
	}
}

// NEG-44: a daemon does not start over files that others can lay out or read,
// and names the path.
func TestDaemonsStopAtPathsThatOthersControl(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	a.Stop(syscall.SIGTERM)
	victim := s.Write("victim", "untouched")
	chmod := func(path string, mode os.FileMode) func() {
		return func() {
			if err := os.Chmod(s.File(path), mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	replace := func(path string, put func(path string) error) (spoil, mend func()) {
		path = s.File(path)
		spoil = func() {
			if err := os.Rename(path, path+".kept"); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			if err := put(path); err != nil {
				t.Fatal(err)
			}
		}
		mend = func() {
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(path+".kept", path); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
		}
		return spoil, mend
	}
	link := func(path string) error { return os.Symlink(victim, path) }
	linkedSocket, noSocketLink := replace("agent/pub/api.sock", link)
	fileAsSocket, noSocketFile := replace("agent/pub/api.sock", func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) })
	for name, c := range map[string]struct {
		spoil, mend func()
		path        string
	}{
		"data directory for all":     {chmod("agent/data", 0o777), chmod("agent/data", 0o700), "agent/data"},
		"run directory for all":      {chmod("agent/run", 0o777), chmod("agent/run", 0o700), "agent/run"},
		"sockets' directory for all": {chmod("agent/pub", 0o777), chmod("agent/pub", 0o755), "agent/pub"},
		"key for all to read":        {chmod("agent/data/identity.json", 0o644), chmod("agent/data/identity.json", 0o600), "agent/data/identity.json"},
		"socket is a link":           {linkedSocket, noSocketLink, "agent/pub/api.sock"},
		"socket is a file":           {fileAsSocket, noSocketFile, "agent/pub/api.sock"},
	} {
		_ = os.Remove(s.File("agent.log"))
		c.spoil()
		a.Launch(harness.Token{})
		if code := exitCode(a.Process); code != 77 || !logged(t, s, "agent.log", "error: path_untrusted: ") || !logged(t, s, "agent.log", s.File(c.path)) {
			t.Errorf("%s: exit %d", name, code)
		}
		c.mend()
	}
	if got, err := os.ReadFile(victim); err != nil || string(got) != "untouched" {
		t.Errorf("the target of a link: %q, %v", got, err)
	}
	a.Start(harness.Token{})
	if left, err := filepath.Glob(s.File("agent/data/*.kept")); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

// exitCode is of a program that has to end by itself; 0 if it does not.
func exitCode(p *harness.Process) int {
	select {
	case <-p.Done():
		return p.ExitCode()
	case <-time.After(20 * time.Second):
		p.Stop(syscall.SIGTERM)
		return 0
	}
}

// logged says whether a log of the site holds a text.
func logged(t *testing.T, s *harness.Site, file, text string) bool {
	t.Helper()
	data, err := os.ReadFile(s.File(file))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Contains(data, []byte(text))
}

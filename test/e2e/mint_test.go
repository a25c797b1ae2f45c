//go:build e2e

package e2e

import (
	"bytes"
	"encoding/pem"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// An SVID that an operator minted is one for every verifier, and is in the
// audit log; its key is where it was asked for and nowhere else (NEG-18).
func TestMintedSVID(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	dir := s.File("minted")
	s.CLI("x509", "mint", "--spiffe-id", "spiffe://example.org/minted", "--dns", "minted.example.org", "--ttl", "20m", "--write", dir)

	svid, err := x509svid.Load(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid_key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := x509bundle.Load(spiffeid.RequireTrustDomainFromString("example.org"), filepath.Join(dir, "bundle.pem"))
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := x509svid.Verify(svid.Certificates, bundle)
	if err != nil || id.String() != "spiffe://example.org/minted" || len(svid.Certificates) != 2 {
		t.Errorf("go-spiffe: %v, %v", id, err)
	}
	out, err := exec.CommandContext(t.Context(), "openssl", "verify", "-x509_strict", "-verify_hostname", "minted.example.org", "-CAfile", filepath.Join(dir, "bundle.pem"),
		"-untrusted", filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid.pem")).CombinedOutput()
	if err != nil {
		t.Errorf("openssl: %v\n%s", err, out)
	}
	s.CLI("svid", "verify", "--svid", filepath.Join(dir, "svid.pem"), "--bundle", filepath.Join(dir, "bundle.pem"))

	serial := svid.Certificates[0].SerialNumber.Text(16)
	log, err := os.ReadFile(s.Audit())
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, serial) && (!strings.Contains(line, `"rule":"mint"`) || !strings.Contains(line, `"kind":"operator"`)) {
			t.Errorf("audit: %s", line)
		}
	}
	if !bytes.Contains(log, []byte(serial)) {
		t.Errorf("%s is not in the audit log", serial)
	}
	wantKeyOnlyIn(t, s.File(""), filepath.Join(dir, "svid_key.pem"))
}

// wantKeyOnlyIn fails when the key in a PEM file is anywhere else below dir.
func wantKeyOnlyIn(t *testing.T, dir, keyFile string) {
	t.Helper()
	text, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	body := strings.SplitN(string(text), "\n", 3)[1]
	scalar := block.Bytes[36:68] // PKCS #8 of a key on P-256
	found := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte(body)) || bytes.Contains(data, scalar) || bytes.Contains(data, block.Bytes) {
			if found++; filepath.Base(path) != filepath.Base(keyFile) {
				t.Errorf("the key is in %s", path)
			}
		}
		return err
	})
	if err != nil || found != 1 {
		t.Errorf("the key is in %d files, %v", found, err)
	}
}

// NEG-1, NEG-3: what the server does not mint, in the words that a person sees.
func TestRefusedMints(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	dir := s.File("minted")
	for name, c := range map[string]struct {
		args   []string
		code   int
		reason string
	}{
		"the server":    {[]string{"--spiffe-id", "spiffe://example.org/assay/server"}, 65, "spiffe_id_reserved"},
		"an agent":      {[]string{"--spiffe-id", "spiffe://example.org/assay/agent/join_token/x"}, 65, "spiffe_id_reserved"},
		"foreign":       {[]string{"--spiffe-id", "spiffe://other.org/web"}, 65, "spiffe_id_foreign"},
		"trust domain":  {[]string{"--spiffe-id", "spiffe://example.org"}, 65, "spiffe_id_invalid"},
		"no ID":         {[]string{"--spiffe-id", "spiffe://example.org/a/../b"}, 65, "spiffe_id_invalid"},
		"bad DNS name":  {[]string{"--spiffe-id", "spiffe://example.org/web", "--dns", "10.0.0.1"}, 65, "dns_name_invalid"},
		"same DNS name": {[]string{"--spiffe-id", "spiffe://example.org/web", "--dns", "a.example", "--dns", "A.example"}, 65, "dns_name_invalid"},
	} {
		stdout, stderr, code := s.Try("assay", append([]string{"x509", "mint", "--write", dir}, c.args...)...)
		if code != c.code || stdout != "" || !strings.HasPrefix(stderr, "error: "+c.reason+": ") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit %d, %q %q", name, code, stdout, stderr)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, "svid.pem")); err == nil {
		t.Error("something was written")
	}
	// Longer than the cap: cut, and said.
	_, stderr, code := s.Try("assay", "x509", "mint", "--spiffe-id", "spiffe://example.org/web", "--ttl", "24h", "--write", dir)
	if code != 0 || !strings.HasPrefix(stderr, "warning: ttl_cut: ") {
		t.Errorf("exit %d, %q", code, stderr)
	}
	_, stderr, code = s.Try("assay", "x509", "mint", "--spiffe-id", "spiffe://example.org/web", "--write", dir)
	if code != 73 || !strings.HasPrefix(stderr, "error: file_exists: ") {
		t.Errorf("exit %d, %q", code, stderr)
	}
}

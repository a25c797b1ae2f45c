package main

import (
	"crypto/x509"
	"encoding/json"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	spiresvid "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// minter is a server that signs what it is asked for, after a test's change.
func minter(t *testing.T, p *pki, change func(*x509.Certificate)) *fakeServer {
	f := populated(p)
	f.mint = func(req *spiresvid.MintX509SVIDRequest) *types.X509SVID {
		csr, err := x509.ParseCertificateRequest(req.GetCsr())
		if err != nil {
			t.Error(err)
			return nil
		}
		ttl := 100 * 365 * 24 * time.Hour
		if req.GetTtl() > 0 {
			ttl = min(time.Duration(req.GetTtl())*time.Second, time.Hour)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(0xbeef), NotBefore: longAgo, NotAfter: time.Now().Add(ttl), URIs: csr.URIs, DNSNames: csr.DNSNames,
			BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if change != nil {
			change(template)
		}
		return &types.X509SVID{CertChain: [][]byte{p.create(template, p.root, csr.PublicKey).Raw}}
	}
	return f
}

func TestMintWritesFilesThatBelongTogether(t *testing.T) {
	vars := map[string]string{serverSocketEnv: minter(t, newPKI(t), nil).start(t)}
	dir := filepath.Join(t.TempDir(), "tls")
	args := []string{"x509", "mint", "--spiffe-id", webID, "--dns", "web.example.org", "--dns", "w", "--write", dir}
	got := assay(t, vars, args...)
	if got.code != 0 || got.stderr != "" || strings.Count(got.stdout, "\nwrote "+dir) != 3 || !strings.Contains(got.stdout, webID) {
		t.Fatalf("exit %d, %s%s", got.code, got.stdout, got.stderr)
	}
	key, err := os.ReadFile(filepath.Join(dir, "svid_key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	// NEG-18: the key is in its file, and nowhere else.
	if body := strings.Split(string(key), "\n")[1]; strings.Contains(got.stdout, body) || strings.Contains(got.stdout, "PRIVATE") {
		t.Error("the key is in the output")
	}
	if info, err := os.Stat(filepath.Join(dir, "svid_key.pem")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key's file: %v, %v", info, err)
	}
	svid, err := x509svid.Load(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "svid_key.pem"))
	if err != nil || svid.ID.String() != webID || !slices.Equal(svid.Certificates[0].DNSNames, []string{"web.example.org", "w"}) {
		t.Errorf("%v, %v", svid, err)
	}
	if got := assay(t, nil, "svid", "verify", "--svid", dir+"/svid.pem", "--bundle", dir+"/bundle.pem", "--id", webID); got.code != 0 {
		t.Error(got.stderr)
	}

	// What is there stays, and no other certificate is signed for nothing.
	again := assay(t, vars, args...)
	if after, _ := os.ReadFile(filepath.Join(dir, "svid_key.pem")); again.code != 73 || !strings.HasPrefix(again.stderr, "error: file_exists: ") || string(after) != string(key) {
		t.Errorf("exit %d, %s", again.code, again.stderr)
	}
	forced := assay(t, vars, append(args, "--replace")...)
	if after, _ := os.ReadFile(filepath.Join(dir, "svid_key.pem")); forced.code != 0 || string(after) == string(key) {
		t.Errorf("exit %d, %s", forced.code, forced.stderr)
	}
}

func TestMintChecksBeforeItAsks(t *testing.T) {
	f := minter(t, newPKI(t), nil)
	vars := map[string]string{serverSocketEnv: f.start(t)}
	used := t.TempDir()
	if err := os.WriteFile(filepath.Join(used, "bundle.pem"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		code int
		args []string
	}{
		{64, []string{}},
		{64, []string{"--spiffe-id", webID}},
		{64, []string{"--spiffe-id", webID, "-o", "json"}},
		{64, []string{"--spiffe-id", webID, "--with-key"}},
		{64, []string{"--spiffe-id", webID, "--with-key", "-o", "json", "--replace"}},
		{65, []string{"--spiffe-id", "spiffe://example.org", "--write", used}},
		{65, []string{"--spiffe-id", "spiffe://example.org/a/../b", "--write", used}},
		{64, []string{"--spiffe-id", webID, "--ttl", "-1s", "--write", used}},
		{64, []string{"--spiffe-id", webID, "--ttl", "1500ms", "--write", used}},
		{64, []string{"--spiffe-id", webID, "--write", used, "more"}},
		{73, []string{"--spiffe-id", webID, "--write", used}},
	} {
		got := assay(t, vars, append([]string{"x509", "mint"}, c.args...)...)
		if got.code != c.code || got.stdout != "" || !strings.HasPrefix(got.stderr, "error: ") && !strings.HasPrefix(got.stderr, "{") {
			t.Errorf("%v: exit %d, %s%s", c.args, got.code, got.stdout, got.stderr)
		}
	}
	if f.calls != 0 {
		t.Errorf("%d calls for command lines that can't be run", f.calls)
	}
	if data, err := os.ReadFile(filepath.Join(used, "bundle.pem")); string(data) != "precious" {
		t.Errorf("%q, %v", data, err)
	}
}

func TestMintAsJSONHasTheFormOfFetch(t *testing.T) {
	vars := map[string]string{serverSocketEnv: minter(t, newPKI(t), nil).start(t)}
	got := assay(t, vars, "x509", "mint", "--spiffe-id", webID, "--ttl", "24h", "--with-key", "-o", "json")
	if got.code != 0 || !strings.HasPrefix(got.stderr, "warning: ttl_cut: ") {
		t.Fatalf("exit %d: %s", got.code, got.stderr)
	}
	var doc fetchShape
	if err := json.Unmarshal([]byte(got.stdout), &doc); err != nil || len(doc.SVIDs) != 1 || len(doc.Bundles) != 1 || doc.Dir != "" || doc.Files == nil {
		t.Fatalf("%v: %+v", err, doc)
	}
	svid, err := x509svid.Parse([]byte(doc.SVIDs[0].CertificatesPEM), []byte(doc.SVIDs[0].PrivateKeyPEM))
	if err != nil || svid.ID.String() != webID {
		t.Errorf("%v, %v", svid, err)
	}
	if got = assay(t, vars, "x509", "mint", "--spiffe-id", webID, "--ttl", "30m", "--with-key", "-o", "json"); got.code != 0 || got.stderr != "" {
		t.Errorf("exit %d: %s", got.code, got.stderr)
	}
}

// The server is trusted to sign, not to sign the right thing.
func TestMintRefusesAnAnswerThatIsNotWhatWasAsked(t *testing.T) {
	p := newPKI(t)
	for name, f := range map[string]*fakeServer{
		"another ID":   minter(t, p, func(c *x509.Certificate) { c.URIs[0].Path = "/other" }),
		"over already": minter(t, p, func(c *x509.Certificate) { c.NotAfter = longAgo.Add(time.Hour) }),
		"a CA":         minter(t, p, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign }),
		"another root": minter(t, newPKI(t), nil),
		"another key":  minter(t, p, nil),
		"nothing":      minter(t, p, nil),
		"no DER":       minter(t, p, nil),
		"a refusal":    minter(t, p, nil),
	} {
		code, reason := 70, "bad_answer"
		switch name {
		case "another root":
			f.bundle = populated(p).bundle
		case "another key":
			leaf, _ := p.leaf(webID, nil)
			f.mint = func(*spiresvid.MintX509SVIDRequest) *types.X509SVID {
				return &types.X509SVID{CertChain: [][]byte{leaf.Raw}}
			}
		case "nothing":
			f.mint = func(*spiresvid.MintX509SVIDRequest) *types.X509SVID { return nil }
		case "no DER":
			f.mint = func(*spiresvid.MintX509SVIDRequest) *types.X509SVID { return &types.X509SVID{CertChain: [][]byte{{1}}} }
		case "a refusal":
			f.err = fault.New(fault.Invalid, "spiffe_id_reserved", "reserved")
			code, reason = 65, "spiffe_id_reserved"
		}
		dir := t.TempDir()
		got := assay(t, map[string]string{serverSocketEnv: f.start(t)}, "x509", "mint", "--spiffe-id", webID, "--write", dir)
		if got.code != code || !strings.HasPrefix(got.stderr, "error: "+reason+": ") {
			t.Errorf("%s: exit %d, %s%s", name, got.code, got.stdout, got.stderr)
		}
		if _, err := os.Lstat(filepath.Join(dir, "svid.pem")); err == nil {
			t.Errorf("%s: something was written", name)
		}
	}
}

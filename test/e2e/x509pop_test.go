//go:build e2e

package e2e

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/test/harness"
)

// guideCommands returns the commands of a section of the operator's guide that
// begin with one of the words, continued lines joined.
func guideCommands(t *testing.T, heading string, words ...string) (commands []string) {
	t.Helper()
	text, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("the guide has no section %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	section = regexp.MustCompile(`\\\n\s*`).ReplaceAllString(section, "")
	for _, line := range strings.Split(section, "\n") {
		for _, word := range words {
			if strings.HasPrefix(line, "    ") && strings.HasPrefix(strings.TrimSpace(line), word+" ") {
				commands = append(commands, strings.TrimSpace(line))
			}
		}
	}
	return commands
}

// nodeFiles makes what the guide makes and returns the directory and the agent
// ID that its last command prints.
func nodeFiles(t *testing.T, s *harness.Site) (dir, agentID string) {
	t.Helper()
	dir = s.File("nodes")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	commands := guideCommands(t, "Nodes with a certificate", "openssl", "echo")
	if len(commands) != 5 {
		t.Fatalf("the guide's commands: %q", commands)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", strings.Join(commands, "\n"))
	cmd.Dir = dir
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("the guide's commands: %v\n%s", err, errs.String())
	}
	return dir, strings.TrimSpace(out.String())
}

// The life of a node that has a certificate, as the guide describes it.
func TestNodeWithACertificate(t *testing.T) {
	s := newSite(t, "")
	dir, id := nodeFiles(t, s)
	s.More = fmt.Sprintf("attestation:\n  x509pop:\n    ca_bundle_file: %s\n", filepath.Join(dir, "nodes-ca.pem"))
	s.StartServer()
	node := func(name string) *harness.Agent {
		a := s.NewAgent(name)
		a.CertificateFile, a.KeyFile = filepath.Join(dir, "node.pem"), filepath.Join(dir, "node.key")
		return a
	}
	serves := func(a *harness.Agent) {
		t.Helper()
		if _, err := fetch(t, a, 30*time.Second); err != nil {
			t.Fatalf("%v", err)
		}
	}
	a := node("a")
	s.CreateEntry(id, "spiffe://example.org/w") // before the node has ever been there
	a.Start(harness.Token{})
	serves(a)
	var shown map[string]any
	s.CLIJSON(&shown, "agent", "show", id)
	if text := fmt.Sprint(shown); !strings.Contains(text, "subject:cn:node-1") || !strings.Contains(text, "x509pop") {
		t.Errorf("agent show: %v", text)
	}

	// A machine that was set up anew: nobody has to do anything.
	a.Stop(syscall.SIGTERM)
	if err := os.RemoveAll(filepath.Dir(a.DataDir())); err != nil {
		t.Fatal(err)
	}
	a.Start(harness.Token{})
	serves(a)

	// NEG-19: a second machine with the same certificate takes over, and the
	// first one's connection is cut with an alarm.
	b := node("b")
	b.Start(harness.Token{})
	a.Eventually(30*time.Second, "the first machine to be told", func() error {
		if !strings.Contains(a.Log(), "agent_svid_not_active") {
			return errors.New("not yet")
		}
		return nil
	})
	serves(a) // what it holds, until that ends (I9)
	a.Stop(syscall.SIGKILL)
	alarm := regexp.MustCompile(`"action":"call.refuse".*"reason":"agent_svid_not_active"`)
	b.Eventually(10*time.Second, "the alarm in the audit log", func() error { // written shortly after
		if !alarm.MatchString(read(t, s.Audit())) {
			return errors.New("not yet")
		}
		return nil
	})
	if text := scrape(t, s.Ops); !regexp.MustCompile(`assay_rpc_denials_total\{reason="agent_svid_not_active",server="agents"\} [1-9]`).MatchString(text) {
		t.Errorf("the alarm is not counted: %s", text)
	}
	serves(b)

	// NEG-13: banned, it is out, whatever it still has; evicted, it is in.
	b.WaitReady(b.Ops)
	s.CLI("agent", "ban", "--yes", id)
	<-b.Done()
	if code := b.ExitCode(); code != 77 {
		t.Errorf("exit code after the ban: %d", code)
	}
	b.Launch(harness.Token{})
	<-b.Done()
	if code := b.ExitCode(); code != 77 || !strings.Contains(b.Log(), "agent_banned") {
		t.Errorf("exit code of a banned agent that comes back: %d", code)
	}
	s.CLI("agent", "evict", "--yes", id)
	b.Start(harness.Token{})
	serves(b)
	b.Stop(syscall.SIGTERM)
	nodeKeyIsNowhere(t, s, filepath.Join(dir, "node.key"))
}

// An expired certificate gets nobody in; the node says why, and joins as soon
// as there is another one.
func TestNodeWithAnExpiredCertificate(t *testing.T) {
	s := newSite(t, "")
	dir, _ := nodeFiles(t, s)
	s.More = fmt.Sprintf("attestation:\n  x509pop:\n    ca_bundle_file: %s\n", filepath.Join(dir, "nodes-ca.pem"))
	s.StartServer()
	late := s.NewAgent("late")
	late.CertificateFile, late.KeyFile = expired(t, dir)
	late.Launch(harness.Token{})
	late.Eventually(30*time.Second, "the refusal", func() error {
		if !strings.Contains(late.Log(), "node_certificate_expired") {
			return errors.New("not yet")
		}
		return nil
	})
	if audit := read(t, s.Audit()); !strings.Contains(audit, `"reason":"x509pop_refused","cause":"certificate_expired"`) {
		t.Errorf("the audit log does not say why")
	}
	if list := s.CLI("agent", "list", "-o", "json"); strings.Contains(list, "x509pop") {
		t.Errorf("it is on record: %s", list)
	}
	for name, to := range map[string]string{"node.pem": late.CertificateFile, "node.key": late.KeyFile} {
		if err := os.Rename(filepath.Join(dir, name), to); err != nil {
			t.Fatal(err)
		}
	}
	late.WaitReady(late.Ops)
	// Entries may hang on what its certificate says, whichever that is.
	s.CLI("entry", "create", "--parent-id", "spiffe://example.org/assay/server", "--spiffe-id", "spiffe://example.org/host/node-1", "--selector", "x509pop:subject:cn:node-1")
	s.CreateEntry("spiffe://example.org/host/node-1", "spiffe://example.org/w")
	if _, err := fetch(t, late, 30*time.Second); err != nil {
		t.Error(err)
	}
}

// expired makes a certificate that ended a minute ago, and its key.
func expired(t *testing.T, dir string) (certFile, keyFile string) {
	t.Helper()
	ca, err := x509.ParseCertificate(pemBlock(t, filepath.Join(dir, "nodes-ca.pem")))
	if err != nil {
		t.Fatal(err)
	}
	caKey, err := x509.ParsePKCS8PrivateKey(pemBlock(t, filepath.Join(dir, "nodes-ca.key")))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "late"}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(-time.Minute),
	}, ca, key.Public(), caKey.(crypto.Signer))
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "late.pem"), filepath.Join(dir, "late.key")
	for path, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert}, keyFile: {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

func pemBlock(t *testing.T, path string) []byte {
	t.Helper()
	block, _ := pem.Decode([]byte(read(t, path)))
	if block == nil {
		t.Fatalf("no PEM in %s", path)
	}
	return block.Bytes
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func scrape(t *testing.T, port int) string {
	t.Helper()
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", port))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// nodeKeyIsNowhere looks for the node's key in all that server and agents
// wrote (NEG-18).
func nodeKeyIsNowhere(t *testing.T, s *harness.Site, keyFile string) {
	t.Helper()
	key, err := x509.ParsePKCS8PrivateKey(pemBlock(t, keyFile))
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := key.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	forms := [][]byte{scalar, []byte(hex.EncodeToString(scalar)), []byte(base64.StdEncoding.EncodeToString(pemBlock(t, keyFile)))[:64]}
	seen := 0
	err = filepath.WalkDir(s.File(""), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		for _, form := range forms {
			if bytes.Contains(data, form) {
				seen++
				if path != keyFile {
					t.Errorf("the node's key is in %s", path)
				}
			}
		}
		return err
	})
	if err != nil || seen == 0 {
		t.Errorf("the search sees nothing: %d, %v", seen, err)
	}
}

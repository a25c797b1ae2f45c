package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// TrustDomain of a site that is not told otherwise.
const TrustDomain = "example.org"

// Site is one trust domain on this machine: a server and the files of it.
type Site struct {
	// Bins has the three binaries.
	Bins string
	// TrustDomain is example.org unless it is set before the first start.
	TrustDomain string
	// More is appended to server.yaml.
	More string
	// RemoteOperators is the server's admin.remote_spiffe_ids.
	RemoteOperators []string
	// Under is a command that the server is run by; it has to become the server.
	Under []string
	// Port of the server for agents, Ops for metrics; they stay over restarts.
	Port, Ops int
	Server    *Process

	tb    TB
	dir   string
	ports Ports
}

// NewSite makes an empty site with the binaries in bins. Its directory has a
// short name, since socket paths have at most 107 bytes.
func NewSite(tb TB, bins, more string) *Site {
	tb.Helper()
	dir, err := os.MkdirTemp("", "assay")
	if err != nil {
		tb.Fatalf("make a directory: %v", err)
	}
	s := &Site{Bins: bins, TrustDomain: TrustDomain, More: more, tb: tb, dir: dir}
	s.Port, s.Ops = s.ports.Free(tb), s.ports.Free(tb)
	tb.Cleanup(func() {
		if tb.Failed() {
			s.dumpLogs()
		}
		_ = os.RemoveAll(dir)
	})
	return s
}

func (s *Site) dumpLogs() {
	logs, _ := filepath.Glob(filepath.Join(s.dir, "*.log"))
	for _, name := range logs {
		data, _ := os.ReadFile(name)
		s.tb.Logf("--- %s\n%s", filepath.Base(name), data[max(0, len(data)-8<<10):])
	}
}

// File returns the path of a file of the site.
func (s *Site) File(name string) string { return filepath.Join(s.dir, name) }

// Write makes a private file of the site and returns its path.
func (s *Site) Write(name, text string) string {
	s.tb.Helper()
	if err := os.WriteFile(s.File(name), []byte(text), 0o600); err != nil {
		s.tb.Fatalf("%v", err)
	}
	return s.File(name)
}

// ServeMesh makes the server the CA of an Istio mesh of one cluster, from its next
// start on, whose tokens are verified by a JSON Web Key Set, and returns its port.
func (s *Site) ServeMesh(issuer string, keys []byte) int {
	s.tb.Helper()
	port := s.ports.Free(s.tb)
	s.More += fmt.Sprintf(`istio:
  listen: 127.0.0.1:%d
  dns_names: [assay-server.assay.svc]
  ip_addresses: [127.0.0.1]
  clusters:
    mesh:
      issuer: %s
      oidc: {jwks_file: %s}
`, port, issuer, s.Write("jwks.json", string(keys)))
	return port
}

// AdminSocket is where operators talk to the server.
func (s *Site) AdminSocket() string { return s.File("server/admin.sock") }

// Audit is the server's audit log.
func (s *Site) Audit() string { return s.File("server/data/audit.log") }

func (s *Site) bin(name string) string { return filepath.Join(s.Bins, name) }

// StartServer starts assay-server and waits until it is ready.
func (s *Site) StartServer(env ...string) *Process {
	s.tb.Helper()
	s.LaunchServer(env...)
	s.Server.WaitReady(s.Ops)
	return s.Server
}

// LaunchServer writes server.yaml and starts assay-server without waiting.
func (s *Site) LaunchServer(env ...string) {
	s.tb.Helper()
	seal := s.File("seal/seal.key")
	if _, err := os.Stat(seal); errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(seal), 0o700); err != nil {
			s.tb.Fatalf("%v", err)
		}
		s.Run("assay-server", "seal-key", seal)
	}
	config := s.Write("server.yaml", fmt.Sprintf(`trust_domain: %s
bootstrap: %s
seal_key_file: %s
listen: 127.0.0.1:%d
admin:
  socket: %s
  remote_spiffe_ids: [%s]
data_dir: %s
metrics:
  listen: 127.0.0.1:%d
%s`, s.TrustDomain, time.Now().UTC().Format(time.DateOnly), seal, s.Port, s.AdminSocket(), strings.Join(s.RemoteOperators, ", "), s.File("server/data"), s.Ops, s.More))
	command := append(slices.Clone(s.Under), s.bin("assay-server"), "run", "--config", config)
	s.Server = Start(s.tb, s.File("server.log"), env, command[0], command[1:]...)
}

// Try runs one of the binaries to its end, for at most a minute.
func (s *Site) Try(name string, args ...string) (stdout, stderr string, code int) {
	s.tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.bin(name), args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Env = append(os.Environ(), "ASSAY_SERVER_SOCKET="+s.AdminSocket())
	err := cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		s.tb.Fatalf("run %s: %v", name, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// Launch starts one of the binaries and does not wait for it. What it prints is
// in launched.log.
func (s *Site) Launch(name string, args ...string) *Process {
	s.tb.Helper()
	return Start(s.tb, s.File("launched.log"), []string{"ASSAY_SERVER_SOCKET=" + s.AdminSocket()}, s.bin(name), args...)
}

// Run is Try for what has to succeed; it returns the standard output.
func (s *Site) Run(name string, args ...string) string {
	s.tb.Helper()
	stdout, stderr, code := s.Try(name, args...)
	if code != 0 {
		s.tb.Fatalf("%s %s: exit %d\n%s%s", name, strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout
}

// CLI runs assay, which has to succeed.
func (s *Site) CLI(args ...string) string {
	s.tb.Helper()
	return s.Run("assay", args...)
}

// CLIJSON runs assay with -o json and decodes what it prints.
func (s *Site) CLIJSON(into any, args ...string) {
	s.tb.Helper()
	out := s.CLI(append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		s.tb.Fatalf("assay %s: %v in %q", strings.Join(args, " "), err, out)
	}
}

// CreateEntry registers an identity for this user's processes.
func (s *Site) CreateEntry(agentID, spiffeID string, more ...string) {
	s.tb.Helper()
	s.CLI(append([]string{
		"entry", "create", "--parent-id", agentID, "--spiffe-id", spiffeID,
		"--selector", fmt.Sprintf("unix:uid:%d", os.Getuid()),
	}, more...)...)
}

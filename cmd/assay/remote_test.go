package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	spirebundle "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

const opsID = "spiffe://example.org/ops/ci"

// startTLS serves f over the network as id and returns its address.
func (f *fakeServer) startTLS(t *testing.T, p *pki, id string) string {
	t.Helper()
	leaf, key := p.leaf(id, nil)
	roots := x509.NewCertPool()
	roots.AddCert(p.root)
	srv := grpc.NewServer(grpc.Creds(rpc.ServerTLS(
		func() (*tls.Certificate, error) {
			return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
		},
		func() (spiffeid.TrustDomain, *x509.CertPool) {
			return spiffeid.RequireTrustDomainFromString("example.org"), roots
		})))
	adminv1.RegisterAdminServer(srv, f)
	spireentry.RegisterEntryServer(srv, fakeEntries{fakeServer: f})
	spireagent.RegisterAgentServer(srv, fakeAgents{fakeServer: f})
	spirebundle.RegisterBundleServer(srv, fakeBundles{fakeServer: f})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return ln.Addr().String()
}

// identityDir is what svid watch would have written for an ID.
func (p *pki) identityDir(t *testing.T, id string) string {
	t.Helper()
	got := assay(t, map[string]string{endpointEnv: (&fakeAgent{script: sends(message(p.svid(id, "", 7)))}).start(t)}, "svid", "fetch", "--dir", t.TempDir())
	if got.code != 0 {
		t.Fatal(got)
	}
	for line := range strings.Lines(got.stdout) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "wrote "); ok {
			return filepath.Dir(path)
		}
	}
	t.Fatal("svid fetch wrote nothing")
	return ""
}

func TestServerOverTheNetworkAsWhoeverHasTheIdentity(t *testing.T) {
	p := newPKI(t)
	f := populated(p)
	address := f.startTLS(t, p, "spiffe://example.org/assay/server")
	agent := &fakeAgent{script: sends(message(p.svid("spiffe://example.org/other", "", 8), p.svid(opsID, "", 9)))}
	endpoint := agent.start(t)
	dir := p.identityDir(t, opsID)
	for name, c := range map[string]struct {
		vars map[string]string
		args []string
	}{
		"directory":                {nil, []string{"--server", address, "--identity", dir}},
		"directory, by name":       {nil, []string{"--server", address, "--identity", dir, "--as", opsID}},
		"Workload API, flag":       {nil, []string{"--server", address, "--identity", endpoint}},
		"Workload API, standard":   {map[string]string{endpointEnv: endpoint}, []string{"--server", address, "--as", opsID}},
		"all from the environment": {map[string]string{serverEnv: address, identityEnv: dir, serverIDEnv: "spiffe://example.org/assay/server"}, nil},
		"flag before the socket's": {map[string]string{serverSocketEnv: "/nowhere"}, []string{"--server", address, "--identity", dir}},
	} {
		for _, verb := range [][]string{{"status"}, {"entry", "list"}, {"agent", "list"}, {"bundle", "show"}, {"entry", "delete", "e-1"}} {
			if got := assay(t, c.vars, append(verb, c.args...)...); got.code != 0 || got.stdout == "" {
				t.Errorf("%s: %v: %+v", name, verb, got)
			}
		}
	}
}

// The tool asks nothing of a server that is not exactly the expected one.
func TestOnlyTheServerOfTheTrustDomainIsAsked(t *testing.T) {
	p, foreign := newPKI(t), newPKI(t)
	dir := p.identityDir(t, opsID)
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := plain.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("220 mail ready\r\n"))
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() { _ = plain.Close() })
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = gone.Close()
	f := populated(p)
	for name, c := range map[string]struct {
		address string
		args    []string
		code    int
		reason  string
	}{
		"a workload":       {f.startTLS(t, p, "spiffe://example.org/web"), nil, 77, "server_untrusted"},
		"an agent":         {f.startTLS(t, p, "spiffe://example.org/assay/agent/join_token/1"), nil, 77, "server_untrusted"},
		"longer ID":        {f.startTLS(t, p, "spiffe://example.org/assay/server/x"), nil, 77, "server_untrusted"},
		"other prefix":     {f.startTLS(t, p, "spiffe://example.org/spire/server"), nil, 77, "server_untrusted"},
		"other roots":      {f.startTLS(t, foreign, "spiffe://example.org/assay/server"), nil, 77, "server_untrusted"},
		"no TLS":           {plain.Addr().String(), nil, 69, "server_unreachable"},
		"nobody":           {gone.Addr().String(), nil, 69, "unreachable"},
		"not what we said": {f.startTLS(t, p, "spiffe://example.org/assay/server"), []string{"--server-id", "spiffe://example.org/spire/server"}, 77, "server_untrusted"},
	} {
		got := assay(t, nil, append([]string{"status", "--server", c.address, "--identity", dir}, c.args...)...)
		if got.code != c.code || !strings.HasPrefix(got.stderr, "error: "+c.reason+": ") || !strings.Contains(got.stderr, c.address) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if f.calls != 0 {
		t.Errorf("%d calls were made", f.calls)
	}
	address := f.startTLS(t, p, "spiffe://example.org/spire/server")
	if got := assay(t, nil, "status", "--server", address, "--identity", dir, "--server-id", "spiffe://example.org/spire/server"); got.code != 0 {
		t.Errorf("another prefix that we named: %+v", got)
	}
}

func TestRefusalOfARemoteOperatorNamesItsID(t *testing.T) {
	p := newPKI(t)
	f := &fakeServer{err: fault.New(fault.Denied, "operator_not_allowed", "no")}
	address := f.startTLS(t, p, "spiffe://example.org/assay/server")
	got := assay(t, nil, "status", "--server", address, "--identity", p.identityDir(t, opsID))
	if got.code != 77 || !strings.Contains(got.stderr, "operator_not_allowed: no; it is "+opsID) || !strings.Contains(got.stderr, "REQ7") {
		t.Errorf("%+v", got)
	}
	// A certificate that the server can't verify ends the connection.
	foreign := newPKI(t)
	dir := foreign.identityDir(t, opsID)
	if err := os.WriteFile(filepath.Join(dir, "bundle2.pem"), certificatesPEM([]*x509.Certificate{p.root}), 0o600); err != nil {
		t.Fatal(err)
	}
	mixed := t.TempDir()
	for from, to := range map[string]string{"svid.pem": "svid.pem", "svid_key.pem": "svid_key.pem", "bundle2.pem": "bundle.pem"} {
		data, err := os.ReadFile(filepath.Join(dir, from))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(mixed, to), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got = assay(t, nil, "status", "--server", address, "--identity", mixed)
	if got.code != 69 || !strings.Contains(got.stderr, "unavailable: ") || !strings.Contains(got.stderr, opsID) {
		t.Errorf("%+v", got)
	}
}

// What is for the server's host alone is neither tried over the network nor
// done on this host instead.
func TestLocalVerbsRefuseAServerOverTheNetwork(t *testing.T) {
	p := newPKI(t)
	f := populated(p)
	address := f.startTLS(t, p, "spiffe://example.org/assay/server")
	socket := f.start(t)
	dir := p.identityDir(t, opsID)
	verbs := [][]string{
		{"token", "create"},
		{"agent", "ban", "--yes", "spiffe://example.org/a"},
		{"agent", "evict", "--yes", "spiffe://example.org/a"},
		{"agent", "purge", "--dry-run"},
	}
	for _, verb := range verbs {
		for name, got := range map[string]outcome{
			"flags":       assay(t, nil, append(verb, "--server", address, "--identity", dir)...),
			"environment": assay(t, map[string]string{serverEnv: address, identityEnv: dir}, verb...),
		} {
			if got.code != 77 || !strings.HasPrefix(got.stderr, "error: local_only: assay "+strings.Join(verb[:2], " ")+" ") {
				t.Errorf("%v by %s: %+v", verb, name, got)
			}
		}
	}
	if f.calls != 0 {
		t.Errorf("%d calls were made", f.calls)
	}
	for _, verb := range verbs {
		if got := assay(t, map[string]string{serverEnv: address}, append(verb, "--socket", socket)...); got.code != 0 {
			t.Errorf("%v at the socket: %+v", verb, got)
		}
	}
}

func TestIdentityThatIsOfNoUse(t *testing.T) {
	p := newPKI(t)
	good := p.identityDir(t, opsID)
	change := func(file string, data []byte, perm os.FileMode) string {
		dir := t.TempDir()
		for _, name := range []string{"svid.pem", "svid_key.pem", "bundle.pem"} {
			content, err := os.ReadFile(filepath.Join(good, name))
			if err != nil {
				t.Fatal(err)
			}
			mode := os.FileMode(0o600)
			if name == file {
				content, mode = data, perm
			}
			if mode == 0 {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, name), content, mode); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	key, err := os.ReadFile(filepath.Join(good, "svid_key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.ReadFile(filepath.Join(p.identityDir(t, opsID), "svid_key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := p.leaf("spiffe://example.org/x", nil)
	for name, c := range map[string]struct {
		args   []string
		reason string
	}{
		"nothing there":       {[]string{"--identity", filepath.Join(good, "none")}, "file_missing"},
		"a file":              {[]string{"--identity", filepath.Join(good, "svid.pem")}, "usage"},
		"no key":              {[]string{"--identity", change("svid_key.pem", nil, 0)}, "path_missing"},
		"key for all to read": {[]string{"--identity", change("svid_key.pem", key, 0o644)}, "path_untrusted"},
		"another key":         {[]string{"--identity", change("svid_key.pem", other, 0o600)}, "identity_invalid"},
		"no bundle":           {[]string{"--identity", change("bundle.pem", nil, 0)}, "file_missing"},
		"leaf as bundle":      {[]string{"--identity", change("bundle.pem", certificatesPEM([]*x509.Certificate{leaf}), 0o600)}, "bundle_invalid"},
		"no certificate":      {[]string{"--identity", change("svid.pem", []byte("x"), 0o600)}, "file_malformed"},
		"another ID":          {[]string{"--identity", good, "--as", "spiffe://example.org/x"}, "identity_not_found"},
		"bad ID":              {[]string{"--identity", good, "--as", "x"}, "spiffe_id_invalid"},
		"bad URI":             {[]string{"--identity", "unix://host/x"}, "usage"},
		"server elsewhere":    {[]string{"--identity", good, "--server-id", "spiffe://other.org/assay/server"}, "usage"},
		"server without path": {[]string{"--identity", good, "--server-id", "spiffe://example.org"}, "spiffe_id_invalid"},
	} {
		got := assay(t, nil, append([]string{"status", "--server", "127.0.0.1:1"}, c.args...)...)
		if got.code == 0 || !strings.HasPrefix(got.stderr, "error: "+c.reason+": ") || strings.Count(got.stderr, "\n") != 1 {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestServerIsNamedOnce(t *testing.T) {
	for name, c := range map[string]struct {
		vars map[string]string
		args []string
	}{
		"two flags":          {nil, []string{"--server", "a:1", "--socket", "/a"}},
		"two variables":      {map[string]string{serverEnv: "a:1", serverSocketEnv: "/a"}, nil},
		"identity for none":  {nil, []string{"--identity", "/a"}},
		"identity of socket": {nil, []string{"--identity", "/a", "--socket", "/a"}},
		"no host":            {nil, []string{"--server", ":8443"}},
		"a URL":              {nil, []string{"--server", "https://a:8443"}},
		"port 0":             {nil, []string{"--server", "a:0"}},
		"variable":           {map[string]string{serverEnv: "a:http"}, nil},
	} {
		if got := assay(t, c.vars, append([]string{"status"}, c.args...)...); got.code != exitUsage || !strings.HasPrefix(got.stderr, "error: usage: ") {
			t.Errorf("%s: %+v", name, got)
		}
	}
	for text, want := range map[string]string{
		"ca.example.org": "ca.example.org:8443", "ca.example.org:9": "ca.example.org:9", "192.0.2.1": "192.0.2.1:8443",
		"::1": "[::1]:8443", "[::1]": "[::1]:8443", "[::1]:9": "[::1]:9", "a:b:c": "", "a b": "", "": "", "a:99999": "", "a:": "",
	} {
		if got, ok := hostPort(text); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v", text, got, ok)
		}
	}
}

// A command that runs for longer than its certificate takes the newest for the
// next connection, and what it has while there is none.
func TestIdentityIsReadAgainAtHalfLife(t *testing.T) {
	p := newPKI(t)
	made := func(from, to time.Duration) *x509svid.SVID {
		cert, key := p.leaf(opsID, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(from), time.Now().Add(to)
		})
		return &x509svid.SVID{ID: spiffeid.RequireFromString(opsID), Certificates: []*x509.Certificate{cert}, PrivateKey: key}
	}
	old, fresh := made(-40*time.Minute, 20*time.Minute), made(0, time.Hour)
	answer, reads := fault.New(fault.NotReady, "away", "away"), 0
	o := &operator{id: old.ID, svid: old, read: func(context.Context) (*x509svid.SVID, []*x509.Certificate, error) {
		reads++
		return fresh, []*x509.Certificate{p.root}, answer
	}}
	if o.leaf().Leaf != old.Certificates[0] || reads != 1 {
		t.Errorf("with nobody to ask, after %d reads", reads)
	}
	answer = nil
	if o.leaf().Leaf != fresh.Certificates[0] || len(o.roots()) != 1 || reads != 2 {
		t.Errorf("the new one was not taken, after %d reads", reads)
	}
	if o.leaf().Leaf != fresh.Certificates[0] || reads != 2 {
		t.Errorf("a young one was read again: %d reads", reads)
	}
}

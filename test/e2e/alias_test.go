//go:build e2e

package e2e

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/test/harness"
)

const hostAlias = "spiffe://example.org/host/web"

// An alias by token reaches the workload, outlives a restart of the agent, is
// shared by the node that replaces it, and ends with its entry.
func TestAliasOfATokenGivesItsEntries(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	first, second := s.NewAgent("first"), s.NewAgent("second")
	first.Start(first.Join("--agent-id", hostAlias))
	s.CreateEntry(hostAlias, "spiffe://example.org/w")
	wantIdentity(t, first, "spiffe://example.org/w")
	wantAliases(t, s, first.ID, hostAlias)

	second.Start(second.Join("--agent-id", hostAlias))
	wantIdentity(t, second, "spiffe://example.org/w")
	second.Restart(syscall.SIGTERM)
	wantIdentity(t, second, "spiffe://example.org/w")

	ctx := metadata.NewOutgoingContext(t.Context(), metadata.Pairs("workload.spiffe.io", "true"))
	stream, code := call(ctx, dialRaw(t, first.Endpoint()), api+"FetchX509SVID", nil)
	if code != codes.OK {
		t.Fatal(code)
	}
	var of struct {
		Entries []struct {
			ID string `json:"id"`
		} `json:"entries"`
	}
	s.CLIJSON(&of, "entry", "list", "--parent-id", first.ID)
	if len(of.Entries) != 1 {
		t.Fatalf("of the first agent: %+v", of)
	}
	s.CLI("entry", "delete", of.Entries[0].ID)
	if got := ends(stream); got != codes.PermissionDenied {
		t.Errorf("the stream of a workload whose node lost the alias ended with %v", got)
	}
	wantAliases(t, s, first.ID)
	wantIdentity(t, second, "spiffe://example.org/w") // the other node keeps it
}

// An alias made for an agent that is there already, from the server's side.
func TestAliasOfNodesReachesAnAgentAtWork(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	s.CreateEntry(a.ID, "spiffe://example.org/own")
	wantIdentity(t, a, "spiffe://example.org/own")
	ctx := metadata.NewOutgoingContext(t.Context(), metadata.Pairs("workload.spiffe.io", "true"))
	stream, code := call(ctx, dialRaw(t, a.Endpoint()), api+"FetchX509SVID", nil)
	if code != codes.OK {
		t.Fatal(code)
	}
	s.CreateEntry(hostAlias, "spiffe://example.org/w")
	s.CLI("entry", "create", "--node", "--spiffe-id", hostAlias, "--selector", "spiffe_id:"+a.ID)
	var reply []byte
	if err := stream.RecvMsg(&reply); err != nil {
		t.Fatal(err)
	}
	wantIdentity(t, a, "spiffe://example.org/own", "spiffe://example.org/w")
	wantAliases(t, s, a.ID, hostAlias)
}

// A renewed certificate makes its node another agent; by an alias of what the
// certificate says, the entries stay.
func TestAliasByCertificateOutlivesTheCertificate(t *testing.T) {
	s := newSite(t, "")
	dir, _ := nodeFiles(t, s)
	s.More = fmt.Sprintf("attestation:\n  x509pop:\n    ca_bundle_file: %s\n", filepath.Join(dir, "nodes-ca.pem"))
	s.StartServer()
	_, warning, code := s.Try("assay", "entry", "create", "--node", "--spiffe-id", hostAlias, "--selector", "x509pop:subject:cn:node-1")
	if code != 0 || !strings.Contains(warning, "warning: alias_unheld: ") {
		t.Errorf("exit %d, %q", code, warning)
	}
	s.CreateEntry(hostAlias, "spiffe://example.org/w")
	renew := `openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -keyout $0.key -out $0.csr -subj "/CN=$1"
openssl x509 -req -in $0.csr -CA nodes-ca.pem -CAkey nodes-ca.key -days 30 -out $0.pem -extfile <(echo "keyUsage=critical,digitalSignature")`
	for name, cn := range map[string]string{"renewed": "node-1", "stranger": "node-2"} {
		cmd := exec.CommandContext(t.Context(), "bash", "-euc", renew, name, cn)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	for _, name := range []string{"node", "renewed", "stranger"} {
		a := s.NewAgent(name)
		a.CertificateFile, a.KeyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
		a.Start(harness.Token{})
		if name == "stranger" {
			ctx := metadata.NewOutgoingContext(t.Context(), metadata.Pairs("workload.spiffe.io", "true"))
			if _, code := call(ctx, dialRaw(t, a.Endpoint()), api+"FetchX509SVID", nil); code != codes.PermissionDenied {
				t.Errorf("a workload on a node of another name got %v", code)
			}
			continue
		}
		wantIdentity(t, a, "spiffe://example.org/w")
	}
	var of struct {
		Agents []struct {
			ID string `json:"id"`
		} `json:"agents"`
	}
	s.CLIJSON(&of, "agent", "list")
	if len(of.Agents) != 3 {
		t.Errorf("the agents are %+v", of.Agents)
	}
}

// wantIdentity fetches what the agent has for this process.
func wantIdentity(t *testing.T, a *harness.Agent, want ...string) {
	t.Helper()
	ctx, cancel := patient(t, 20*time.Second)
	defer cancel()
	svids, err := workloadapi.FetchX509SVIDs(ctx, workloadapi.WithAddr(a.Endpoint()))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, svid := range svids {
		got = append(got, svid.ID.String())
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func ends(stream grpc.ClientStream) codes.Code {
	for {
		var reply []byte
		if err := stream.RecvMsg(&reply); err != nil {
			return status.Code(err)
		}
	}
}

func wantAliases(t *testing.T, s *harness.Site, agent string, want ...string) {
	t.Helper()
	var got struct {
		Aliases []string `json:"aliases"`
	}
	s.CLIJSON(&got, "agent", "show", agent)
	if !slices.Equal(got.Aliases, want) {
		t.Errorf("%s has the aliases %v, want %v", agent, got.Aliases, want)
	}
}

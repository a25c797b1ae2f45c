//go:build kube

package kube

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/test/harness"
)

// forged is an agent of somebody's own making: it has a node's identity and asks
// for whatever it likes.
type forged struct {
	t    *testing.T
	site *harness.Site
	// cluster is the name that the server has for the token's.
	cluster string
	key     *ecdsa.PrivateKey
	leaf    *tls.Certificate // nil before it attested
	conn    agentv1.AgentClient
}

func newForged(t *testing.T, site *harness.Site) *forged {
	t.Helper()
	return &forged{t: t, site: site, cluster: "test", key: newKey(t)}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (f *forged) csr(key *ecdsa.PrivateKey) []byte {
	f.t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		f.t.Fatal(err)
	}
	return csr
}

// client connects, under what identity it has by now.
func (f *forged) client() agentv1.AgentClient {
	f.t.Helper()
	if f.conn != nil {
		return f.conn
	}
	block, _ := pem.Decode([]byte(f.site.CLI("bundle", "show")))
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		f.t.Fatal(err)
	}
	creds := rpc.ClientTLS(spiffeid.RequireFromString("spiffe://example.org/assay/server"),
		func() []*x509.Certificate { return []*x509.Certificate{root} }, func() *tls.Certificate { return f.leaf })
	conn, err := grpc.NewClient(fmt.Sprintf("passthrough:///127.0.0.1:%d", f.site.Port), grpc.WithTransportCredentials(creds))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = conn.Close() })
	f.conn = agentv1.NewAgentClient(conn)
	return f.conn
}

// attest shows a pod's token and takes the identity that it gets.
func (f *forged) attest(token string) error {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Minute)
	defer cancel()
	stream, err := f.client().Attest(ctx)
	if err != nil {
		return err
	}
	payload, err := proto.Marshal(&agentv1.K8SPsatPayload{Cluster: f.cluster, Token: token})
	if err != nil {
		return err
	}
	_ = stream.Send(&agentv1.AttestRequest{Step: &agentv1.AttestRequest_Start_{Start: &agentv1.AttestRequest_Start{
		Attestor: agentv1.AttestorK8SPsat, Payload: payload, Csr: f.csr(f.key),
	}}})
	resp, err := stream.Recv()
	if err != nil {
		return fault.FromStatus(err)
	}
	f.leaf, f.conn = &tls.Certificate{Certificate: resp.GetIdentity().GetChain(), PrivateKey: f.key}, nil
	return nil
}

// sign asks for one certificate and returns its SPIFFE ID, or the reason why
// there is none.
func (f *forged) sign(entryID string) string {
	f.t.Helper()
	return f.signFor(entryID, f.key)
}

func (f *forged) signFor(entryID string, key *ecdsa.PrivateKey) string {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Minute)
	defer cancel()
	resp, err := f.client().SignX509(ctx, &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{EntryId: entryID, Csr: f.csr(key)}}})
	if err != nil {
		f.t.Fatal(err)
	}
	result := resp.GetResults()[0]
	if failure := result.GetFailure(); failure != nil {
		return failure.GetReason()
	}
	leaf, err := x509.ParseCertificate(result.GetChain().GetCertificates()[0])
	if err != nil {
		f.t.Fatal(err)
	}
	if ou := leaf.Subject.OrganizationalUnit; len(ou) != 1 || ou[0] != f.cluster {
		f.t.Errorf("the certificate for %s is of cluster %q, want %s", entryID, ou, f.cluster)
	}
	return leaf.URIs[0].String()
}

// signs waits until an answer is the one that is wanted: the server hears of the
// API server's objects a moment later than the test.
func (f *forged) signs(entryID, want string) {
	f.t.Helper()
	f.site.Server.Eventually(30*time.Second, "the answer for "+entryID, func() error {
		if got := f.sign(entryID); got != want {
			return fmt.Errorf("got %s, want %s", got, want)
		}
		return nil
	})
}

// NEG-22: whoever has a node's identity gets certificates for the pods that the
// API server has on that node, whatever it says, and for no other.
func TestAForgedAgentGetsWhatRunsOnItsNodeAlone(t *testing.T) {
	s := cluster.NewSpace(t)
	node, other := s.Node("a"), s.Node("b")
	s.Account("web")
	s.Account("db")
	site := s.site(t, "")
	agentPod := s.Run(Pod{Name: "agent", Node: node.Name, Account: "assay-agent"})
	mine := s.Run(Pod{Name: "web-1", Node: node.Name, Account: "web"})
	foreign := s.Run(Pod{Name: "db-1", Node: other.Name, Account: "db"})
	f := newForged(t, site)
	if err := f.attest(s.Token("assay-agent", audience, agentPod)); err != nil {
		t.Fatal(err)
	}
	agentID := "spiffe://example.org/assay/agent/k8s_psat/test/" + string(node.UID)
	entry := func(path string, selectors ...string) string {
		args := []string{"entry", "create", "--parent-id", agentID, "--spiffe-id", "spiffe://example.org" + path}
		for _, selector := range selectors {
			args = append(args, "--selector", selector)
		}
		var made struct {
			ID string `json:"id"`
		}
		site.CLIJSON(&made, args...)
		return made.ID
	}
	const none = "no_such_workload_on_node"
	web := "spiffe://example.org/ns/" + s.Namespace + "/sa/web"
	f.signs("pod/"+string(mine.UID), web)
	f.signs("pod/"+string(foreign.UID), none)
	f.signs("pod/"+string(agentPod.UID)+"x", none)
	f.signs("pod/", none)
	ns := "k8s:ns:" + s.Namespace
	f.signs(entry("/frontend", ns, "k8s:sa:web"), "spiffe://example.org/frontend")
	f.signs(entry("/database", ns, "k8s:sa:db"), none) // the right pod, on another node
	f.signs(entry("/mixed", ns, "k8s:sa:web", "k8s:pod-name:db-1"), none)
	f.signs(entry("/unix", "unix:uid:0"), "entry_without_pod")
	f.signs(entry("/node-tool", "unix:uid:0", "k8s:host:true"), "spiffe://example.org/node-tool")

	// Nor does it get certificates for key after key, of one of its own.
	spare := s.Run(Pod{Name: "web-2", Node: node.Name, Account: "web"})
	for i := range 10 {
		key, want := newKey(t), web
		if i >= 7 { // besides the one that it has
			want = "limit_live_keys"
		}
		if got := f.signFor("pod/"+string(mine.UID), key); got != want {
			t.Errorf("key %d: %s, want %s", i, got, want)
		}
	}
	f.signs("pod/"+string(mine.UID), web) // for the key of before
	f.signs("pod/"+string(spare.UID), web)
	if n := harness.Metric(t, site.Ops, `assay_x509_svid_refusals_total{reason="limit_live_keys"}`); n != 3 {
		t.Errorf("%v refusals are counted", n)
	}

	s.Delete(mine)
	f.signs("pod/"+string(mine.UID), none)
	if audit := readFile(t, site.Audit()); !strings.Contains(audit, none) || !strings.Contains(audit, `"rule":"template"`) {
		t.Error("the audit log does not have the refusals")
	}
}

// NEG-15, NEG-16, with the real API server: each token that is no agent's, or
// not any more, makes no agent, and the one that there is goes on.
func TestTokensThatMakeNoAgent(t *testing.T) {
	s := cluster.NewSpace(t)
	node := s.Node("a")
	s.Account("web")
	site := s.site(t, "")
	agentPod := s.Run(Pod{Name: "agent", Node: node.Name, Account: "assay-agent"})
	web := s.Run(Pod{Name: "web-1", Node: node.Name, Account: "web"})
	agent := newForged(t, site)
	token := s.Token("assay-agent", audience, agentPod)
	if err := agent.attest(token); err != nil {
		t.Fatal(err)
	}
	gone := s.Run(Pod{Name: "gone", Node: node.Name, Account: "assay-agent"})
	goneToken := s.Token("assay-agent", audience, gone)
	s.Delete(gone)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := poll(ctx, nil, func() error { // the API server's own view follows
		got, err := review(ctx, s, goneToken, audience)
		if err == nil && got.Authenticated {
			err = errors.New("the token of a deleted pod is valid")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"another ServiceAccount's":   s.Token("web", audience, web),
		"for the API server":         s.Token("assay-agent", "", agentPod),
		"for another audience":       s.Token("assay-agent", "vault", agentPod),
		"of no pod":                  s.Token("assay-agent", audience, nil),
		"of a pod that is gone":      goneToken,
		"copied, with another key":   token,
		"no token at all":            "x",
		"changed in one character":   token[:len(token)-2] + "xx",
		"a ServiceAccount's, longer": token + ".x",
	} {
		if err := newForged(t, site).attest(bad); fault.ReasonOf(err) != "psat_rejected" {
			t.Errorf("%s: %v", name, err)
		}
	}
	agent.signs("pod/"+string(web.UID), "spiffe://example.org/ns/"+s.Namespace+"/sa/web")
	var agents struct {
		Agents []any `json:"agents"`
	}
	if site.CLIJSON(&agents, "agent", "list"); len(agents.Agents) != 1 {
		t.Errorf("there are %d agents", len(agents.Agents))
	}
	// NEG-18: neither a token that was taken nor one that was refused.
	backup := site.File("one.backup")
	site.CLI("backup", backup)
	site.Server.Stop(15)
	for _, path := range []string{site.Audit(), site.File("server.log"), site.File("server/data/store.db"), backup} {
		for _, secret := range []string{token, goneToken, s.AdminToken} {
			if strings.Contains(readFile(t, path), secret) {
				t.Errorf("%s has a token", path)
			}
		}
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

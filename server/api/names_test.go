package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/peer"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/attest"
)

// namer is an attestor that was talked into a name.
type namer struct{ id spiffeid.ID }

func (n namer) Attest(context.Context, attest.Evidence, func(context.Context, []byte) ([]byte, error)) (attest.Result, error) {
	return attest.Result{AgentID: n.id}, nil
}

// NEG-2: whatever an attestor made a name of, it is an agent's, of our trust
// domain, or nothing is signed and nobody is on record: the service under test
// has neither an authority nor a registry to do it with.
func TestAttestorsNameAgentsOnly(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: &rpc.TLSInfo{}})
	td := spiffeid.RequireTrustDomainFromString("example.org")
	for name, id := range map[string]spiffeid.ID{
		"none":                 {},
		"the server":           spiffeid.RequireFromPath(td, "/assay/server"),
		"a workload":           spiffeid.RequireFromPath(td, "/web"),
		"the prefix alone":     spiffeid.RequireFromPath(td, "/assay/agent"),
		"beside the prefix":    spiffeid.RequireFromPath(td, "/assay/agents/x"),
		"in other letters":     spiffeid.RequireFromPath(td, "/Assay/agent/x"),
		"another trust domain": spiffeid.RequireFromString("spiffe://example.com/assay/agent/x"),
	} {
		s := NewAgentService(AgentConfig{
			TrustDomain: td, ReservedPrefix: "/assay/", AttestRate: 1, Attestors: map[string]NodeAttestor{"namer": namer{id}},
		})
		_, err := s.attest(ctx, &agentv1.AttestRequest_Start{Attestor: "namer", Csr: csr}, &node{})
		if fault.ReasonOf(err) != "agent_id_invalid" {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What has no meaning as a path can't even be asked for.
	for _, part := range []string{"../server", "..", ".", "", "a//b", "a/", "%2e%2e", strings.Repeat("ä", 3)} {
		if id, err := spiffeid.FromPath(td, "/assay/agent/namer/"+part); err == nil {
			t.Errorf("%q became %v", part, id)
		}
	}
}

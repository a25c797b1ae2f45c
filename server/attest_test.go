package server

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

func TestAgentJoinsWithATokenAndIsOnRecord(t *testing.T) {
	h := start(t)
	key := newKey(t)
	identity, err := h.attest(key, h.token())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(identity.GetAgentId(), "spiffe://example.org/assay/agent/join_token/") {
		t.Errorf("agent ID %s", identity.GetAgentId())
	}
	leaf := certificate(t, identity, key)
	issuer, err := x509.ParseCertificate(identity.GetChain()[1])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	for _, a := range identity.GetBundle().GetX509Authorities() {
		root, err := x509.ParseCertificate(a.GetCertificate())
		if err != nil {
			t.Fatal(err)
		}
		roots.AddCert(root)
	}
	id, err := rpc.VerifyPeer([]*x509.Certificate{leaf.Leaf, issuer}, roots, serverID.TrustDomain(), time.Now())
	if err != nil || id.String() != identity.GetAgentId() {
		t.Errorf("the chain verifies to %v, %v", id, err)
	}
	// The lines were on disk before the answer.
	if line := h.audited("agent.attest"); sub(line, "target", "agent_id") != identity.GetAgentId() ||
		sub(line, "result", "code") != "ok" || sub(line, "why", "rule") != "join_token" {
		t.Errorf("audit of the attestation: %v", line)
	}
	if line := h.audited("x509_svid.issue"); sub(line, "cert", "serial") != leaf.Leaf.SerialNumber.Text(16) {
		t.Errorf("audit of the issuance: %v", line)
	}
	agents, err := h.operator().agents.ListAgents(t.Context(), &spireagentv1.ListAgentsRequest{})
	if err != nil || len(agents.GetAgents()) != 1 {
		t.Fatalf("agents: %v, %v", agents, err)
	}
	a := agents.GetAgents()[0]
	if a.GetId().GetPath() != id.Path() || a.GetAttestationType() != "join_token" ||
		a.GetX509SvidSerialNumber() != leaf.Leaf.SerialNumber.String() || a.GetX509SvidExpiresAt() != leaf.Leaf.NotAfter.Unix() {
		t.Errorf("agent on record: %v", a)
	}
}

// NEG-11: every bad token gets the same words.
func TestBadTokensAreRefusedAlike(t *testing.T) {
	h := start(t)
	token := h.token()
	if _, err := h.attest(newKey(t), token); err != nil {
		t.Fatal(err)
	}
	texts := map[string]bool{}
	for _, bad := range []string{token, "", "unknown", token[:len(token)-1], strings.ToUpper(token), token + " ", "ｔ" + token} {
		_, err := h.attest(newKey(t), bad)
		wantReason(t, "bad token", err, fault.Denied, "join_token_invalid")
		text, _, _ := strings.Cut(status.Convert(err).Message(), " (request_id")
		texts[text] = true
	}
	if len(texts) != 1 {
		t.Errorf("the refusals differ: %v", texts)
	}
	if line := h.audited("agent.attest"); sub(line, "result", "reason") != "join_token_invalid" || sub(line, "actor", "kind") != "none" {
		t.Errorf("audit: %v", line)
	}
	if strings.Contains(h.logs.String(), token) {
		t.Error("the token is in the log") // NEG-18
	}
}

// NEG-12, I8
func TestOfManyThatRedeemATokenOneWins(t *testing.T) {
	h := start(t)
	token := h.token()
	var mu sync.Mutex
	won, lost := 0, 0
	var wg sync.WaitGroup
	for range 40 {
		key := newKey(t)
		wg.Go(func() {
			_, err := h.attest(key, token)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won++
			case fault.ReasonOf(fault.FromStatus(err)) == "join_token_invalid":
				lost++
			default:
				t.Errorf("neither won nor lost: %v", err)
			}
		})
	}
	wg.Wait()
	if won != 1 || lost != 39 {
		t.Errorf("%d won, %d lost", won, lost)
	}
	if n := len(h.rooms.registry.Agents()); n != 1 {
		t.Errorf("%d agents on record", n)
	}
}

// NEG-14: the answer was lost; the same key asks again and gets the same name.
// Once the certificate was used, the token is worth nothing to anybody.
func TestLostAnswerIsRepeatedForTheSameKey(t *testing.T) {
	h := start(t)
	token, key := h.token(), newKey(t)
	first, err := h.attest(key, token)
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.attest(newKey(t), token)
	wantReason(t, "another key", err, fault.Denied, "join_token_invalid")
	again, err := h.attest(key, token)
	if err != nil || again.GetAgentId() != first.GetAgentId() {
		t.Fatalf("the same key: %v, %v", again.GetAgentId(), err)
	}
	// The first certificate is void: only the one that was recorded last works.
	_, err = h.agentOf(first, key).Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, key, nil)})
	wantReason(t, "first answer", err, fault.Denied, "agent_svid_not_active")
	if _, err := h.agentOf(again, key).Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, key, nil)}); err != nil {
		t.Fatal(err)
	}
	_, err = h.attest(key, token)
	wantReason(t, "after first use", err, fault.Denied, "join_token_invalid")
}

// NEG-3, NEG-4, NEG-25 on the agents' own road: a CSR that asks for anything is
// refused before the evidence is looked at, so the token survives it. So it
// does a kind of attestation that nobody knows.
func TestCSRWithNamesIsRefusedAndCostsNoToken(t *testing.T) {
	h := start(t)
	token := h.token()
	client := h.dial(nil)
	for reason, csr := range map[string][]byte{
		"csr_san_forbidden": newCSR(t, newKey(t), func(r *x509.CertificateRequest) { r.URIs = []*url.URL{serverID.URL()} }),
		"csr_malformed":     []byte("not a CSR"),
		"csr_too_large":     make([]byte, 20<<10),
	} {
		_, err := attestOver(t, client, &agentv1.AttestRequest_Start{Attestor: "join_token", Payload: []byte(token), Csr: csr})
		wantReason(t, reason, err, fault.Invalid, reason)
		if line := h.audited("agent.attest"); sub(line, "result", "reason") != reason {
			t.Errorf("audit: %v", line)
		}
	}
	_, err := attestOver(t, client, &agentv1.AttestRequest_Start{Attestor: "x", Payload: []byte(token), Csr: newCSR(t, newKey(t), nil)})
	wantReason(t, "unknown attestor", err, fault.Invalid, "attestor_unknown")
	if line := h.audited("agent.attest"); sub(line, "why", "rule") != "unknown_attestor" {
		t.Errorf("a stranger's text is in the audit log: %v", line)
	}
	if _, err := h.attest(newKey(t), token); err != nil {
		t.Errorf("the token was used up: %v", err)
	}
}

func TestAttestationBeginsWithItsStart(t *testing.T) { // NEG-25
	h := start(t)
	stream, err := h.dial(nil).Attest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&agentv1.AttestRequest{Step: &agentv1.AttestRequest_ChallengeResponse{ChallengeResponse: []byte("x")}}); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantReason(t, "answer without a question", err, fault.Invalid, "attest_order")
}

// NEG-19: the renewed certificate becomes the active one by its first use; then
// the one before is void, on open streams within a second.
func TestRenewedCertificateReplacesTheOldOneAtItsFirstUse(t *testing.T) {
	h := start(t)
	old := h.newAgent()
	key := newKey(t)
	renewed, err := old.Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, key, nil)})
	if err != nil {
		t.Fatal(err)
	}
	if renewed.GetIdentity().GetAgentId() != old.id.String() {
		t.Errorf("renewed as %s", renewed.GetIdentity().GetAgentId())
	}
	stream := openSync(t, old, nil)
	if _, err := stream.Recv(); err != nil {
		t.Fatalf("the old one is valid until the new one is used: %v", err)
	}
	next := h.agentOf(renewed.GetIdentity(), key)
	if _, err := next.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
		t.Fatal(err)
	}
	used := time.Now()
	_, err = old.Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, key, nil)})
	wantReason(t, "old serial", err, fault.Denied, "agent_svid_not_active")
	for err = nil; err == nil; {
		_, err = stream.Recv()
	}
	wantReason(t, "old stream", err, fault.Denied, "agent_svid_not_active")
	t.Logf("the old stream lived %v longer", time.Since(used)) // looked at every recheckEvery
	eventually(t, "audit of the refusal", 5*time.Second, func() bool {
		line := h.audited("call.refuse")
		return sub(line, "result", "reason") == "agent_svid_not_active" && sub(line, "actor", "spiffe_id") == old.id.String()
	})
}

func TestRenewalTakesAKeyAndNoNames(t *testing.T) {
	h := start(t)
	a := h.newAgent()
	_, err := a.Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, a.key, func(r *x509.CertificateRequest) { r.DNSNames = []string{"a.example"} })})
	wantReason(t, "CSR with a name", err, fault.Invalid, "csr_san_forbidden")
	if line := h.audited("agent.renew"); sub(line, "target", "agent_id") != a.id.String() || sub(line, "result", "reason") != "csr_san_forbidden" {
		t.Errorf("audit: %v", line)
	}
}

// An agent whose certificate has ended is turned away on the connection that
// it has, on a new one and on its stream, and comes back by its key.
func TestExpiredAgentIsTurnedAwayAndRejoins(t *testing.T) {
	h := start(t, func(c *Config) { c.Attestation.AgentSVIDTTL = 5 * time.Second })
	a := h.newAgent()
	stream := openSync(t, a, nil)
	var err error
	for err == nil {
		_, err = stream.Recv()
	}
	wantReason(t, "open stream", err, fault.Unauthenticated, "agent_svid_expired")
	if time.Now().Before(a.leaf.Leaf.NotAfter) {
		t.Error("the stream ended before the certificate")
	}
	_, err = a.SignX509(t.Context(), &agentv1.SignX509Request{})
	wantReason(t, "open connection", err, fault.Unauthenticated, "agent_svid_expired")
	fresh := h.dial(a.leaf)
	_, err = fresh.SignX509(t.Context(), &agentv1.SignX509Request{})
	wantReason(t, "new connection", err, fault.Unauthenticated, "agent_svid_expired")

	key := newKey(t)
	identity, err := h.rejoin(fresh, a, a.key, key)
	if err != nil {
		t.Fatal(err)
	}
	back := h.agentOf(identity, key)
	if back.id != a.id {
		t.Errorf("came back as %s", back.id)
	}
	if _, err := back.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
		t.Error(err)
	}
	_, err = h.rejoin(h.dial(nil), a, newKey(t), key)
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a key that is not on record: %v", err)
	}
}

// rejoin signs the exported keying material of the connection with by.
func (h *harness) rejoin(client agentv1.AgentClient, a *agent, by, key *ecdsa.PrivateKey) (*agentv1.Identity, error) {
	h.t.Helper()
	stream, err := client.Attest(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	p, ok := peer.FromContext(stream.Context())
	if !ok {
		h.t.Fatal("the stream has no peer")
	}
	state, ok := rpc.PeerConnectionState(p)
	if !ok {
		h.t.Fatal("the peer has no TLS state")
	}
	material, err := state.ExportKeyingMaterial("EXPORTER-assay-rejoin", []byte(a.id.String()), 32)
	if err != nil {
		h.t.Fatal(err)
	}
	digest := sha256.Sum256(material)
	signature, err := ecdsa.SignASN1(rand.Reader, by, digest[:])
	if err != nil {
		h.t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(by.Public())
	if err != nil {
		h.t.Fatal(err)
	}
	payload, err := proto.Marshal(&agentv1.RejoinPayload{AgentId: a.id.String(), PublicKey: spki, Signature: signature})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := stream.Send(&agentv1.AttestRequest{Step: &agentv1.AttestRequest_Start_{Start: &agentv1.AttestRequest_Start{
		Attestor: "rejoin", Payload: payload, Csr: newCSR(h.t, key, nil),
	}}}); err != nil {
		h.t.Fatal(err)
	}
	resp, err := stream.Recv()
	return resp.GetIdentity(), err
}

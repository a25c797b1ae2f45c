package server

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// nodes is an authority that vouches for nodes.
type nodes struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newNodes(t *testing.T) *nodes {
	t.Helper()
	n := &nodes{t: t, key: newKey(t)}
	n.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "nodes"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	n.cert = n.sign(n.cert, n.key)
	return n
}

func (n *nodes) sign(c *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	n.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, n.cert, key.Public(), n.key)
	if err != nil {
		n.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		n.t.Fatal(err)
	}
	return cert
}

// machine is what a node has from its authority.
type machine struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (n *nodes) machine(name string, life time.Duration) *machine {
	n.t.Helper()
	m := &machine{key: newKey(n.t)}
	m.cert = n.sign(&x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life),
	}, m.key)
	return m
}

func (m *machine) agentID() string {
	sum := sha256.Sum256(m.cert.RawTBSCertificate)
	return "spiffe://example.org/assay/agent/x509pop/" + hex.EncodeToString(sum[:])
}

// configure has the server trust the authority.
func (n *nodes) configure(c *Config) {
	n.t.Helper()
	path := filepath.Join(filepath.Dir(c.SealKeyFile), "nodes.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: n.cert.Raw}), 0o644); err != nil {
		n.t.Fatal(err)
	}
	c.Attestation.X509Pop.CABundleFile = path
}

// prove attests m over a connection of its own and has key certified.
func (h *harness) prove(m *machine, key *ecdsa.PrivateKey) (*agentv1.Identity, error) {
	h.t.Helper()
	conn := h.connect(nil)
	defer conn.Close()
	stream, err := agentv1.NewAgentClient(conn).Attest(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	payload, err := proto.Marshal(&agentv1.X509PopPayload{Certificates: [][]byte{m.cert.Raw}})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := stream.Send(&agentv1.AttestRequest{Step: &agentv1.AttestRequest_Start_{Start: &agentv1.AttestRequest_Start{
		Attestor: "x509pop", Payload: payload, Csr: newCSR(h.t, key, nil),
	}}}); err != nil {
		h.t.Logf("send start: %v", err)
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	var question agentv1.X509PopChallenge
	if err := proto.Unmarshal(resp.GetChallenge(), &question); err != nil {
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
	exported, err := state.ExportKeyingMaterial("EXPORTER-assay-x509pop", question.GetNonce(), 32)
	if err != nil {
		h.t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		h.t.Fatal(err)
	}
	digest := sha256.Sum256(agentv1.X509PopMessage(exported, m.cert.Raw, spki))
	signature, err := ecdsa.SignASN1(rand.Reader, m.key, digest[:])
	if err != nil {
		h.t.Fatal(err)
	}
	answer, err := proto.Marshal(&agentv1.X509PopResponse{Signature: signature})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := stream.Send(&agentv1.AttestRequest{Step: &agentv1.AttestRequest_ChallengeResponse{ChallengeResponse: answer}}); err != nil {
		h.t.Logf("send answer: %v", err)
	}
	resp, err = stream.Recv()
	return resp.GetIdentity(), err
}

// proven is an agent that attested by certificate and has used its SVID.
func (h *harness) proven(m *machine) *agent {
	h.t.Helper()
	key := newKey(h.t)
	identity, err := h.prove(m, key)
	if err != nil {
		h.t.Fatal(err)
	}
	a := h.agentOf(identity, key)
	if _, err := a.SignX509(h.t.Context(), &agentv1.SignX509Request{}); err != nil {
		h.t.Fatal(err)
	}
	return a
}

func TestNodeAttestsByItsCertificateAsOftenAsItLikes(t *testing.T) {
	n := newNodes(t)
	h := start(t, n.configure)
	m := n.machine("node-1", time.Hour)
	first := h.proven(m)
	if first.id.String() != m.agentID() {
		t.Errorf("agent ID %s", first.id)
	}
	if line := h.audited("agent.attest"); sub(line, "target", "agent_id") != m.agentID() || sub(line, "result", "code") != "ok" || sub(line, "why", "rule") != "x509pop" {
		t.Errorf("audit: %v", line)
	}
	record := func() (want []string) {
		t.Helper()
		got, err := h.operator().agents.GetAgent(t.Context(), &spireagentv1.GetAgentRequest{Id: protoID(first.id)})
		if err != nil || got.GetAttestationType() != "x509pop" || !got.GetCanReattest() {
			t.Fatalf("%v, %v", got, err)
		}
		for _, s := range got.GetSelectors() {
			want = append(want, s.GetType()+":"+s.GetValue())
		}
		return want
	}
	if got := record(); len(got) != 4 || !strings.Contains(strings.Join(got, " "), "x509pop:subject:cn:node-1") {
		t.Errorf("selectors: %v", got)
	}
	// A wiped disk, a new key: the old certificate is good until the new one is
	// used, and then it is not.
	key := newKey(t)
	identity, err := h.prove(m, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
		t.Errorf("the old one, before the new one is used: %v", err)
	}
	second := h.agentOf(identity, key)
	if _, err := second.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil || second.id != first.id {
		t.Errorf("%v, %v", second.id, err)
	}
	_, err = first.SignX509(t.Context(), &agentv1.SignX509Request{})
	wantReason(t, "the old one", err, fault.Denied, "agent_svid_not_active")
	if got := len(h.rooms.registry.Agents()); got != 1 {
		t.Errorf("%d agents", got)
	}
	// By its certificate is the only way: rejoin is for those who have none.
	_, err = h.rejoin(h.dial(nil), second, second.key, newKey(t))
	wantReason(t, "rejoin", err, fault.Denied, "rejoin_refused")
	h.restart()
	record()
	h.proven(m)
}

// NEG-13: a ban holds whatever the node attests with, and an eviction lifts it.
func TestBannedNodeStaysBannedUntilItIsEvicted(t *testing.T) {
	n := newNodes(t)
	h := start(t, n.configure)
	m := n.machine("node", time.Hour)
	a := h.proven(m)
	o := h.operator()
	if _, err := o.agents.BanAgent(t.Context(), &spireagentv1.BanAgentRequest{Id: protoID(a.id)}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_, err := h.prove(m, newKey(t))
		wantReason(t, "banned", err, fault.Denied, "agent_banned")
		if line := h.audited("agent.attest"); sub(line, "target", "agent_id") != m.agentID() || sub(line, "result", "reason") != "agent_banned" {
			t.Errorf("audit: %v", line)
		}
		h.restart()
	}
	if _, err := h.operator().agents.DeleteAgent(t.Context(), &spireagentv1.DeleteAgentRequest{Id: protoID(a.id)}); err != nil {
		t.Fatal(err)
	}
	h.proven(m)
}

// NEG-19: two machines have one certificate. The later one takes over with the
// first use of its SVID; the other is told so, on the stream that it has open
// and nothing else, and that is counted and in the audit log.
func TestSecondMachineWithTheSameCertificateTakesOver(t *testing.T) {
	n := newNodes(t)
	h := start(t, n.configure)
	m := n.machine("node", time.Hour)
	first := h.proven(m)
	stream := openSync(t, first, nil)
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	h.proven(m)
	var err error
	for err == nil {
		_, err = stream.Recv()
	}
	wantReason(t, "the first machine's stream", err, fault.Denied, "agent_svid_not_active")
	eventually(t, "the alarm in the audit log", 10*time.Second, func() bool {
		line := h.audited("call.refuse")
		return sub(line, "result", "reason") == "agent_svid_not_active" && sub(line, "actor", "spiffe_id") == first.id.String() &&
			sub(line, "actor", "serial") == first.leaf.Leaf.SerialNumber.Text(16)
	})
	if h.denials(t, "agent_svid_not_active") != 1 {
		t.Error("the alarm is not counted")
	}
	// The first machine may do the same in its turn.
	h.proven(m)
}

// The node is told one thing; the log and the audit log have the reason.
func TestRefusedCertificateIsExplainedToOperatorsAlone(t *testing.T) {
	n, others := newNodes(t), newNodes(t)
	h := start(t, n.configure)
	told := map[string]bool{}
	for why, m := range map[string]*machine{
		"certificate_expired": n.machine("late", -time.Minute),
		"chain_untrusted":     others.machine("stranger", time.Hour),
		"possession_unproven": {cert: n.machine("stolen", time.Hour).cert, key: newKey(t)},
	} {
		_, err := h.prove(m, newKey(t))
		wantReason(t, why, err, fault.Denied, "x509pop_refused")
		text, _, _ := strings.Cut(status.Convert(err).Message(), " (request_id")
		told[text] = true
		line := h.audited("agent.attest")
		if sub(line, "result", "reason") != "x509pop_refused" || sub(line, "result", "cause") != why || !strings.Contains(h.logs.String(), why) {
			t.Errorf("%s: audit %v", why, line)
		}
	}
	if len(told) != 1 || len(h.rooms.registry.Agents()) != 0 {
		t.Errorf("told %v", told)
	}
}

func TestX509PopIsOffUnlessConfigured(t *testing.T) {
	h := start(t)
	_, err := h.prove(newNodes(t).machine("node", time.Hour), newKey(t))
	wantReason(t, "off", err, fault.Invalid, "attestor_unknown")
}

// NEG-55: what can't be used stops the start; there is no going on without.
func TestUnusableNodeAuthoritiesStopTheStart(t *testing.T) {
	n := newNodes(t)
	for name, c := range map[string]struct {
		text, reason string
		mode         fs.FileMode
	}{
		"empty":             {"", "config_x509pop", 0o644},
		"a node's":          {string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: n.machine("node", time.Hour).cert.Raw})), "config_x509pop", 0o644},
		"others can change": {string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: n.cert.Raw})), "path_untrusted", 0o666},
		"missing":           {"", "path_missing", 0},
	} {
		cfg := newConfig(t)
		cfg.Attestation.X509Pop.CABundleFile = filepath.Join(filepath.Dir(cfg.SealKeyFile), "nodes.pem")
		if c.mode != 0 {
			err := errors.Join(os.WriteFile(cfg.Attestation.X509Pop.CABundleFile, []byte(c.text), c.mode), os.Chmod(cfg.Attestation.X509Pop.CABundleFile, c.mode))
			if err != nil {
				t.Fatal(err)
			}
		}
		s, err := New(cfg, Deps{Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Run(t.Context()); fault.ReasonOf(err) != c.reason {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(filepath.Join(cfg.DataDir, "store.db")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: a store was made: %v", name, err)
		}
	}
	bad := newConfig(t)
	bad.Attestation.X509Pop.CABundleFile = "nodes.pem"
	if _, err := bad.Validate(); !strings.Contains(fault.SafeText(err), "attestation.x509pop.ca_bundle_file: /") {
		t.Errorf("a relative path: %v", err)
	}
}

// The trust bundle of the domain is no list of authorities for nodes:
// every workload would be one.
func TestOwnRootIsNoNodeAuthority(t *testing.T) {
	h := start(t)
	h.stop()
	path := filepath.Join(filepath.Dir(h.cfg.SealKeyFile), "nodes.pem")
	root := h.rooms.authority.Bundle().Roots[0].Certificate
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	h.cfg.Attestation.X509Pop.CABundleFile = path
	s, err := New(h.cfg, Deps{Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); fault.ReasonOf(err) != "config_x509pop" {
		t.Errorf("started with its own root as an authority of nodes: %v", err)
	}
}

// NEG-19: a key that is another agent's is certified for nobody else, by
// renewal, token, certificate or old key; a token survives it.
func TestKeyOfAnotherAgentIsRefused(t *testing.T) {
	n := newNodes(t)
	h := start(t, n.configure)
	a, b := h.newAgent(), h.newAgent()
	for _, x := range []*agent{a, b} {
		if _, err := x.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
			t.Fatal(err)
		}
	}
	_, err := b.Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, a.key, nil)})
	wantReason(t, "renewal", err, fault.Denied, "binding_mismatch")
	if line := h.audited("agent.renew"); sub(line, "target", "agent_id") != b.id.String() || sub(line, "result", "reason") != "binding_mismatch" {
		t.Errorf("audit: %v", line)
	}
	if h.denials(t, "binding_mismatch") != 1 {
		t.Error("the alarm is not counted")
	}
	_, err = h.rejoin(h.dial(nil), b, b.key, a.key)
	wantReason(t, "rejoin", err, fault.Denied, "binding_mismatch")
	m := n.machine("node", time.Hour)
	_, err = h.prove(m, a.key)
	wantReason(t, "certificate", err, fault.Denied, "binding_mismatch")
	token := h.token()
	_, err = h.attest(a.key, token)
	wantReason(t, "token", err, fault.Denied, "binding_mismatch")
	_, err = h.attest(a.key, "no token")
	wantReason(t, "no token", err, fault.Denied, "join_token_invalid")
	if _, err := h.attest(newKey(t), token); err != nil {
		t.Errorf("the token was used up: %v", err)
	}
	if strings.Contains(status.Convert(err).Message(), a.id.String()) {
		t.Errorf("b learns who has the key: %v", err)
	}
	// Material bound to a is worth nothing to b: its old key, nor its serial.
	_, err = h.rejoin(h.dial(nil), a, b.key, newKey(t))
	wantReason(t, "b as a", err, fault.Denied, "rejoin_refused")
	for _, x := range []*agent{a, b} {
		if got, _ := h.rooms.registry.Agent(x.id); got.ActiveSerial != x.leaf.Leaf.SerialNumber.Text(16) {
			t.Errorf("the active serial of %s changed", x.id)
		}
	}
	// What is its own it may keep.
	if _, err := a.Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, a.key, nil)}); err != nil {
		t.Error(err)
	}
	h.restart() // the index of keys is made anew
	_, err = h.attest(a.key, h.token())
	wantReason(t, "after a restart", err, fault.Denied, "binding_mismatch")
}

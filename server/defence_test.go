package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// Who holds a certificate that is void takes no place among the connections of
// its agent: else a stolen, replaced SVID could lock the agent out.
func TestVoidCertificateTakesNoPlaceOfItsAgent(t *testing.T) {
	h := start(t, func(c *Config) { c.Limits.AgentConnections = 3 })
	old := h.newAgent()
	key := newKey(t)
	renewed, err := old.Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, key, nil)})
	if err != nil {
		t.Fatal(err)
	}
	current := h.agentOf(renewed.GetIdentity(), key)
	if _, err := current.SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
		t.Fatal(err) // from here on the old certificate is void
	}
	for range 4 {
		if _, err := h.dial(old.leaf).Bundle(t.Context(), &agentv1.BundleRequest{}); err != nil && status.Code(err) != codes.Unavailable {
			t.Fatal(err)
		}
	}
	// Two are taken: by old when it was valid, and by current.
	if _, err := h.dial(current.leaf).SignX509(t.Context(), &agentv1.SignX509Request{}); err != nil {
		t.Errorf("the agent's own next connection: %v", err)
	}
}

// One agent's streams hold views in the server's memory: as many as it may
// have connections, not a hundred on each of them.
func TestSyncStreamsOfOneAgentAreBounded(t *testing.T) {
	h := start(t, func(c *Config) { c.Limits.AgentConnections = 2 })
	a, other := h.newAgent(), h.newAgent()
	ctx, cancel := context.WithCancel(t.Context())
	first, err := a.Sync(ctx)
	if err != nil {
		t.Fatal(err)
	}
	say(t, first, &agentv1.SyncRequest{Message: &agentv1.SyncRequest_Hello_{Hello: &agentv1.SyncRequest_Hello{}}})
	one(t, first)
	one(t, openSync(t, a, nil))
	third, err := a.Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = third.Recv()
	wantReason(t, "a third stream", err, fault.Exhausted, "limit_sync_streams")
	one(t, openSync(t, other, nil))
	cancel()
	eventually(t, "a place for a new stream", 5*time.Second, func() bool {
		stream := openSync(t, a, nil)
		_, err := stream.Recv()
		return err == nil
	})
}

// An entry that is accepted can be issued: what the authority would refuse to
// put into a certificate is refused when the entry is made.
func TestEntryWithNamesThatCannotBeIssuedIsRefused(t *testing.T) {
	h := start(t)
	o, a := h.operator(), h.newAgent()
	for _, name := range []string{"1.2", "10", "host.7", "*.1", "0.0.0.0.0"} {
		e := entry(a.id, "/numeric")
		e.DnsNames = []string{name}
		resp, err := o.entries.BatchCreateEntry(t.Context(), createOf(e))
		if err != nil {
			t.Fatal(err)
		}
		if s := resp.GetResults()[0].GetStatus(); s.GetCode() != int32(codes.InvalidArgument) || !strings.HasPrefix(s.GetMessage(), "dns_name_invalid") {
			t.Errorf("%s: %v", name, s)
		}
	}
	e := entry(a.id, "/named")
	e.DnsNames = []string{"7.host", "*.host2", "a.b1", "xn--nxasmq6b.example"}
	id := o.create(t, e)[0]
	resp, err := a.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{EntryId: id, Csr: newCSR(t, newKey(t), nil)}}})
	if err != nil || resp.GetResults()[0].GetFailure() != nil {
		t.Errorf("%v, %v", resp, err)
	}
}

// A server that can't sign is not ready, whatever else works.
func TestServerThatCannotSignIsNotReady(t *testing.T) {
	cfg := newConfig(t)
	synctest.Test(t, func(t *testing.T) {
		cfg.Bootstrap = time.Now().UTC().Format(time.DateOnly) // a bubble has a clock of its own
		s, err := New(cfg, Deps{Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
		if err != nil {
			t.Fatal(err)
		}
		r, err := s.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := r.close(); err != nil {
				t.Error(err)
			}
		}()
		own, err := s.newIdentity(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		if err := health(r, own); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute) // nothing runs, so nobody hears from the store
		if err := health(r, own); fault.ReasonOf(err) != "store_silent" {
			t.Errorf("got %v", err)
		}
	})
}

// NEG-18: what is secret is in no log, no audit line, no metric, no error and
// no file of the server, after flows that work and flows that fail, at debug
// level.
func TestSecretsAreNowhere(t *testing.T) {
	m := startMesh(t)
	h := m.harness
	o := h.operator()
	told := &strings.Builder{} // every error that a peer saw
	tell := func(err error) {
		if err != nil {
			told.WriteString(err.Error() + "\n")
		}
	}
	canaries := map[string][]byte{}
	newSecretKey := func(name string) *ecdsa.PrivateKey {
		key := newKey(t)
		scalar, err := key.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		canaries[name] = scalar
		return key
	}
	csrOf := func(name string, key *ecdsa.PrivateKey, ask func(*x509.CertificateRequest)) []byte {
		der := newCSR(t, key, ask)
		canaries[name] = der
		return der
	}
	seal, err := os.ReadFile(h.cfg.SealKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	canaries["seal key"] = bytes.TrimSpace(seal)
	if canaries["seal key, decoded"], err = base64.StdEncoding.DecodeString(string(canaries["seal key"])); err != nil {
		t.Fatal(err)
	}

	// Tokens: made here, chosen, refused as weak, unknown; used, used again.
	chosen, weak, unknown := "chosen-CANARY-0123456789abcdef-token", "weakCANARY1", "unknown-CANARY-0123456789abcdef"
	_, err = o.agents.CreateJoinToken(t.Context(), &spireagentv1.CreateJoinTokenRequest{Ttl: 60, Token: chosen})
	if err != nil {
		t.Fatal(err)
	}
	_, err = o.agents.CreateJoinToken(t.Context(), &spireagentv1.CreateJoinTokenRequest{Ttl: 60, Token: chosen})
	tell(err)
	_, err = o.agents.CreateJoinToken(t.Context(), &spireagentv1.CreateJoinTokenRequest{Ttl: 60, Token: weak})
	tell(err)
	made := h.token()
	canaries["chosen token"], canaries["weak token"] = []byte(chosen), []byte(weak)
	canaries["unknown token"], canaries["made token"] = []byte(unknown), []byte(made)
	key := newSecretKey("agent key")
	identity, err := h.attest(key, made)
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{made, chosen, unknown, chosen} {
		_, err := h.attest(newSecretKey("key for "+token), token)
		tell(err)
	}

	// CSRs: good, with names, with a broken signature, of nobody's making.
	a := h.agentOf(identity, key)
	id := o.create(t, entry(a.id, "/canary"))[0]
	good := csrOf("good CSR", newSecretKey("workload key"), nil)
	named := csrOf("CSR with a name", newSecretKey("named key"), func(r *x509.CertificateRequest) { r.Subject.CommonName = "CANARY-subject" })
	broken := bytes.Clone(csrOf("CSR that gets broken", newSecretKey("broken key"), nil))
	broken[len(broken)-1] ^= 1
	canaries["subject"], canaries["broken CSR"] = []byte("CANARY-subject"), broken
	canaries["nonsense CSR"] = []byte("CANARY-nonsense-request")
	resp, err := a.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{
		{EntryId: id, Csr: good}, {EntryId: id, Csr: named}, {EntryId: id, Csr: broken}, {EntryId: id, Csr: canaries["nonsense CSR"]},
	}})
	if err != nil {
		t.Fatal(err)
	}
	told.WriteString(resp.String()) // texts of the items
	for _, csr := range [][]byte{csrOf("renewal CSR", newSecretKey("renewed key"), nil), named, canaries["nonsense CSR"]} {
		_, err := a.Renew(t.Context(), &agentv1.RenewRequest{Csr: csr})
		tell(err)
	}
	// CSRs of operators, who may name somebody and nothing else.
	minting := csrOf("mint CSR", newSecretKey("minted key"), asksFor("/CANARY-minted"))
	if _, err := o.svids.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: minting}); err != nil {
		t.Fatal(err)
	}
	subject := csrOf("mint CSR with a subject", newSecretKey("refused key"), asksFor("/x", func(r *x509.CertificateRequest) { r.Subject.CommonName = "CANARY-subject" }))
	evil := csrOf("mint CSR with no ID", newSecretKey("another refused key"), func(r *x509.CertificateRequest) { r.DNSNames = []string{"CANARY-name"} })
	canaries["DNS name"] = []byte("CANARY-name")
	for _, csr := range [][]byte{subject, evil, broken, canaries["nonsense CSR"]} {
		_, err := o.svids.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csr})
		tell(err)
	}
	// The tokens of proxies: one that is good, one that is nobody's.
	for name, proxy := range map[string]string{"proxy": m.sign(m.issuer.Claims("foo", "sleep")), "forged proxy": signToken(t, p256Key(t), "k1", m.issuer.Claims("foo", "sleep"))} {
		canaries["token of a "+name] = []byte(proxy)
		canaries["signature of the token of a "+name] = []byte(proxy[strings.LastIndexByte(proxy, '.')+1:])
		p := m.proxy("foo", "sleep")
		p.Token = func() (string, error) { return proxy, nil }
		_, err := p.Fetch(t.Context())
		tell(err)
	}
	conn := h.connect(nil)
	for _, attestor := range []string{"rejoin", "join_token", "x509pop", "CANARY-attestor"} {
		_, err := attestOver(t, agentv1.NewAgentClient(conn), &agentv1.AttestRequest_Start{
			Attestor: attestor, Payload: []byte("CANARY-evidence-of-nothing"), Csr: good,
		})
		tell(err)
	}
	canaries["evidence"], canaries["attestor"] = []byte("CANARY-evidence-of-nothing"), []byte("CANARY-attestor")
	tell(conn.Invoke(t.Context(), "/CANARY.Service/Method", &agentv1.BundleRequest{}, &agentv1.BundleResponse{}))
	canaries["method"] = []byte("CANARY.Service")
	if _, err := o.admin.Status(t.Context(), &adminv1.StatusRequest{}); err != nil {
		t.Fatal(err)
	}

	// Selectors tell what runs where. They are the store's content, and nothing
	// else's: an entry that is made, found, changed, refused and deleted.
	chosenBy := "user:CANARY-selector"
	canaries["selector"] = []byte("CANARY-selector")
	selected := o.create(t, entry(a.id, "/selected", chosenBy))[0]
	weakly := entry(a.id, "/weakly", "path:/CANARY-selector")
	for _, e := range []*types.Entry{weakly, entry(a.id, "/selected", chosenBy), entry(a.id, "bad path", chosenBy), entry(a.id, "/x", chosenBy, "CANARY-selector")} {
		resp, err := o.entries.BatchCreateEntry(t.Context(), createOf(e))
		if err != nil {
			t.Fatal(err)
		}
		told.WriteString(resp.GetResults()[0].GetStatus().String())
	}
	changed := entry(a.id, "/selected", chosenBy, "uid:7")
	changed.Id = selected
	if _, err := o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{changed}}); err != nil {
		t.Fatal(err)
	}
	one(t, openSync(t, a, nil))
	if _, err := o.entries.BatchDeleteEntry(t.Context(), deleteOf(selected)); err != nil {
		t.Fatal(err)
	}

	places := map[string][]byte{"an error": []byte(told.String())}
	families, err := h.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		places["metrics"] = append(places["metrics"], family.String()...)
	}
	h.stop()
	places["the log"] = []byte(h.logs.String())
	err = filepath.WalkDir(h.cfg.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			places[filepath.Base(path)], err = os.ReadFile(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, needed := range []string{"store.db", "audit.log", "the log", "metrics", "an error"} {
		if len(places[needed]) == 0 {
			t.Errorf("nothing to look at: %s", needed)
		}
	}
	for name, canary := range canaries {
		for place, content := range places {
			if name == "selector" && place == "store.db" {
				continue
			}
			for form, needle := range map[string][]byte{
				"as it is": canary, "in hex": []byte(hex.EncodeToString(canary)), "in base64": []byte(base64.StdEncoding.EncodeToString(canary)),
				"quoted": []byte(strings.Trim(strconv.Quote(string(canary)), `"`)), "as numbers": []byte(strings.Trim(fmt.Sprint(canary), "[]")),
			} {
				if bytes.Contains(content, needle) {
					t.Errorf("%s holds the %s %s", place, name, form)
				}
			}
		}
	}
	// No private key in the clear, whosever it is: PKCS #8 and SEC 1 on P-256.
	for _, head := range []string{"308187020100301306072a8648ce3d020106082a8648ce3d030107046d306b0201010420", "30770201010420"} {
		pattern, err := hex.DecodeString(head)
		if err != nil {
			t.Fatal(err)
		}
		for place, content := range places {
			if bytes.Contains(content, pattern) || bytes.Contains(content, []byte("PRIVATE KEY")) {
				t.Errorf("%s holds a private key", place)
			}
		}
	}
}

// NEG-27: a handshake that fails shows in a counter and nowhere else: neither
// log nor audit log can be filled by somebody without a certificate.
func TestFailedHandshakesAreCounted(t *testing.T) {
	h := start(t)
	stranger := newNodes(t).machine("stranger", time.Hour)
	leaf := &tls.Certificate{Certificate: [][]byte{stranger.cert.Raw}, PrivateKey: stranger.key}
	lines := len(h.audit())
	if _, err := h.dial(leaf).Bundle(t.Context(), &agentv1.BundleRequest{}); err == nil {
		t.Fatal("a stranger's certificate was taken")
	}
	conn, err := net.Dial("tcp", h.server.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	for _, reason := range []string{"svid_invalid", "tls"} {
		eventually(t, reason, 10*time.Second, func() bool { return h.counted(t, "assay_rpc_handshakes_failed_total", reason) > 0 })
	}
	if got := len(h.audit()); got != lines {
		t.Errorf("%d lines more in the audit log", got-lines)
	}
}

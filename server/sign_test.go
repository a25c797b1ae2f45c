package server

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// NEG-21: of ten different entries, each is answered for itself, and foreign
// and unknown ones alike.
func TestEachItemOfABatchIsDecidedByItself(t *testing.T) {
	h := start(t)
	o, a, other := h.operator(), h.newAgent(), h.newAgent()
	var mine, theirs []string
	for i := range 5 {
		e := entry(a.id, fmt.Sprintf("/mine/%d", i))
		e.DnsNames, e.X509SvidTtl = []string{fmt.Sprintf("m%d.example.org", i)}, int32(600+i)
		mine = append(mine, o.create(t, e)...)
	}
	for i := range 3 {
		theirs = append(theirs, o.create(t, entry(other.id, fmt.Sprintf("/theirs/%d", i)))...)
	}
	expired := entry(a.id, "/expired")
	expired.ExpiresAt = time.Now().Unix() + 3 // time to make it in
	gone := o.create(t, expired)[0]

	ids := []string{mine[0], theirs[0], mine[1], "no-such-entry", mine[2], theirs[1], mine[3], gone, theirs[2], mine[4]}
	keys := make([]*ecdsa.PrivateKey, len(ids))
	req := &agentv1.SignX509Request{}
	for i, id := range ids {
		keys[i] = newKey(t)
		req.Items = append(req.Items, &agentv1.SignX509Request_Item{EntryId: id, Csr: newCSR(t, keys[i], nil)})
	}
	eventually(t, "the end of an entry", time.Minute, func() bool { return time.Now().Unix() > expired.ExpiresAt })
	resp, err := a.SignX509(t.Context(), req)
	if err != nil || len(resp.GetResults()) != len(ids) {
		t.Fatalf("%d results, %v", len(resp.GetResults()), err)
	}
	signed := 0
	for i, r := range resp.GetResults() {
		which := indexOf(mine, ids[i])
		if which < 0 {
			if f := r.GetFailure(); f.GetCode() != int32(codes.NotFound) || f.GetReason() != "entry_not_authorized" || f.GetMessage() == "" || r.GetChain() != nil {
				t.Errorf("item %d: %v", i, r)
			}
			continue
		}
		signed++
		leaf, err := x509.ParseCertificate(r.GetChain().GetCertificates()[0])
		if err != nil {
			t.Fatal(err)
		}
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != fmt.Sprintf("spiffe://example.org/mine/%d", which) {
			t.Errorf("item %d is for %v", i, leaf.URIs)
		}
		if !keys[i].PublicKey.Equal(leaf.PublicKey) {
			t.Errorf("item %d has the key of another", i)
		}
		if len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != fmt.Sprintf("m%d.example.org", which) {
			t.Errorf("item %d has names %v", i, leaf.DNSNames)
		}
		if life := time.Until(leaf.NotAfter); life > time.Duration(600+which)*time.Second || life < 590*time.Second {
			t.Errorf("item %d lives %v", i, life)
		}
	}
	if signed != 5 {
		t.Errorf("%d were signed", signed)
	}
	h.wantIssued(t, resp)
}

func indexOf(list []string, s string) int {
	for i, one := range list {
		if one == s {
			return i
		}
	}
	return -1
}

// wantIssued checks that the audit log has a line for each certificate of an
// answer, and no line of a certificate more for those entries (P8).
func (h *harness) wantIssued(t *testing.T, resp *agentv1.SignX509Response) {
	t.Helper()
	serials := map[string]bool{}
	for _, r := range resp.GetResults() {
		if certs := r.GetChain().GetCertificates(); len(certs) > 0 {
			leaf, err := x509.ParseCertificate(certs[0])
			if err != nil {
				t.Fatal(err)
			}
			serials[leaf.SerialNumber.Text(16)] = true
		}
	}
	refused := 0
	for _, line := range h.audit() {
		if line["action"] != "x509_svid.issue" || sub(line, "why", "rule") != "entry" {
			continue
		}
		switch serial, _ := sub(line, "cert", "serial").(string); {
		case serial == "":
			refused++
			if sub(line, "actor", "kind") != "agent" || sub(line, "actor", "spiffe_id") == nil || sub(line, "result", "reason") == nil {
				t.Errorf("audit of a refusal: %v", line)
			}
		case !serials[serial]:
			t.Errorf("a certificate that nobody asked for: %v", line)
		default:
			delete(serials, serial)
		}
	}
	if len(serials) != 0 || refused == 0 {
		t.Errorf("not in the audit log: %v; %d refusals are", serials, refused)
	}
}

// NEG-3: an authorised entry and a CSR that names somebody else.
func TestCSRThatNamesSomebodyIsRefused(t *testing.T) {
	h := start(t)
	a := h.newAgent()
	id := h.operator().create(t, entry(a.id, "/a"))[0]
	for _, name := range []*url.URL{serverID.URL(), {Scheme: "spiffe", Host: domain, Path: "/other"}, {Scheme: "spiffe", Host: domain, Path: "/a"}} {
		resp, err := a.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{
			{EntryId: id, Csr: newCSR(t, newKey(t), func(r *x509.CertificateRequest) { r.URIs = []*url.URL{name} })},
		}})
		if err != nil {
			t.Fatal(err)
		}
		if f := resp.GetResults()[0].GetFailure(); f.GetCode() != int32(codes.InvalidArgument) || f.GetReason() != "csr_san_forbidden" {
			t.Errorf("%v: %v", name, resp.GetResults()[0])
		}
		line := h.audited("x509_svid.issue")
		if sub(line, "actor", "spiffe_id") != a.id.String() || sub(line, "target", "spiffe_id") != "spiffe://example.org/a" ||
			sub(line, "result", "reason") != "csr_san_forbidden" || line["cert"] != nil {
			t.Errorf("audit: %v", line)
		}
	}
	// What was asked for in vain is in no later certificate.
	resp, err := a.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{EntryId: id, Csr: newCSR(t, newKey(t), nil)}}})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(resp.GetResults()[0].GetChain().GetCertificates()[0])
	if err != nil || len(leaf.URIs) != 1 || leaf.URIs[0].Path != "/a" || len(leaf.DNSNames) != 0 || leaf.IsCA {
		t.Errorf("clean CSR: %v, %v", leaf, err)
	}
}

// NEG-28
func TestTooLongBatchesAndMessagesAreRefused(t *testing.T) {
	h := start(t, func(c *Config) { c.Limits.SignBatch = 10 })
	a := h.newAgent()
	req := &agentv1.SignX509Request{}
	for range 11 {
		req.Items = append(req.Items, &agentv1.SignX509Request_Item{EntryId: "x"})
	}
	_, err := a.SignX509(t.Context(), req)
	wantReason(t, "11 items", err, fault.Exhausted, "limit_sign_batch")
	req.Items = []*agentv1.SignX509Request_Item{{EntryId: "x", Csr: make([]byte, maxAgentMessage+1)}}
	if _, err := a.SignX509(t.Context(), req); fault.KindOf(fault.FromStatus(err)) != fault.Exhausted {
		t.Errorf("a message of more than 256 KiB: %v", err)
	}
	resp, err := a.SignX509(t.Context(), &agentv1.SignX509Request{})
	if err != nil || len(resp.GetResults()) != 0 {
		t.Errorf("nothing asked: %v, %v", resp, err)
	}
}

// An audit log that can't be written means no answer: nothing is signed, and
// an act of an operator that may have happened is not reported as done.
func TestWithoutAuditThereIsNoAnswer(t *testing.T) {
	h := start(t)
	o, a := h.operator(), h.newAgent()
	id := o.create(t, entry(a.id, "/a"))[0]
	token := h.token()
	path := filepath.Join(h.cfg.DataDir, "audit.log")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Somebody else's line in it: the chain would break.
	if err := os.WriteFile(path, append(bytes.Clone(whole), "{}\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = a.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{EntryId: id, Csr: newCSR(t, newKey(t), nil)}}})
	wantReason(t, "sign", err, fault.NotReady, "audit_failed")
	if strings.Contains(err.Error(), h.cfg.DataDir) || !strings.Contains(h.logs.String(), path) {
		t.Errorf("an agent is told of the server's files, or the log is not: %v", err)
	}
	_, err = a.SignX509(t.Context(), &agentv1.SignX509Request{Items: []*agentv1.SignX509Request_Item{{EntryId: "foreign"}}})
	wantReason(t, "refusal of a signature", err, fault.NotReady, "audit_failed")
	_, err = a.Renew(t.Context(), &agentv1.RenewRequest{Csr: newCSR(t, a.key, nil)})
	wantReason(t, "renew", err, fault.NotReady, "audit_failed")
	_, err = h.attest(newKey(t), token)
	wantReason(t, "attest", err, fault.NotReady, "audit_failed")
	_, err = h.attest(newKey(t), "bad")
	wantReason(t, "refusal of an attestation", err, fault.NotReady, "audit_failed")
	_, err = o.entries.BatchCreateEntry(t.Context(), createOf(entry(a.id, "/b")))
	wantReason(t, "create", err, fault.NotReady, "audit_failed")
	_, err = o.entries.BatchDeleteEntry(t.Context(), deleteOf(id))
	wantReason(t, "delete", err, fault.NotReady, "audit_failed")
	_, err = o.agents.CreateJoinToken(t.Context(), tokenOf(60))
	wantReason(t, "token", err, fault.NotReady, "audit_failed")
	_, err = o.svids.MintX509SVID(t.Context(), mintOf(t, "/minted"))
	wantReason(t, "mint", err, fault.NotReady, "audit_failed")
	_, err = o.svids.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{})
	wantReason(t, "refusal of a mint", err, fault.NotReady, "audit_failed")

	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.server.Ready(t.Context()); err != nil {
		t.Errorf("the log is as it was: %v", err)
	}
	o.create(t, entry(a.id, "/c"))
}

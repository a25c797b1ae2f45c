package server

import (
	"crypto/x509"
	"net/url"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// asksFor makes a CSR ask for a SPIFFE ID of our trust domain, and for more.
func asksFor(path string, more ...func(*x509.CertificateRequest)) func(*x509.CertificateRequest) {
	return func(r *x509.CertificateRequest) {
		r.URIs = []*url.URL{{Scheme: "spiffe", Host: domain, Path: path}}
		for _, m := range more {
			m(r)
		}
	}
}

func mintOf(t *testing.T, path string, more ...func(*x509.CertificateRequest)) *svidv1.MintX509SVIDRequest {
	t.Helper()
	return &svidv1.MintX509SVIDRequest{Csr: newCSR(t, newKey(t), asksFor(path, more...))}
}

// SPIRE's contract: the ID comes from the CSR's one URI, DNS names may come
// with it, and the life is a wish.
func TestOperatorMintsAnSVID(t *testing.T) {
	h := start(t)
	o := h.operator()
	for name, c := range map[string]struct {
		ttl  int32
		want time.Duration
	}{"default": {0, time.Hour}, "short": {600, 10 * time.Minute}, "over the cap": {24 * 3600, time.Hour}} {
		key := newKey(t)
		before := time.Now().Truncate(time.Second)
		resp, err := o.svids.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Ttl: c.ttl, Csr: newCSR(t, key, asksFor("/minted",
			func(r *x509.CertificateRequest) { r.DNSNames = []string{"db.example.org", "*.db.example.org"} }))})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		svid := resp.GetSvid()
		var chain []*x509.Certificate
		for _, der := range svid.GetCertChain() {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			chain = append(chain, cert)
		}
		id, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString(domain), h.roots()))
		leaf := chain[0]
		if err != nil || id.String() != "spiffe://example.org/minted" || !key.PublicKey.Equal(leaf.PublicKey) ||
			!slices.Equal(leaf.DNSNames, []string{"db.example.org", "*.db.example.org"}) || leaf.IsCA {
			t.Errorf("%s: %v, %v, %v", name, err, id, leaf.DNSNames)
		}
		if svid.GetId().GetPath() != "/minted" || svid.GetExpiresAt() != leaf.NotAfter.Unix() || svid.GetHint() != "" {
			t.Errorf("%s: %v", name, svid)
		}
		if least, most := before.Add(c.want), time.Now().Add(c.want); leaf.NotAfter.Before(least) || leaf.NotAfter.After(most) {
			t.Errorf("%s: ends at %v, want %v to %v", name, leaf.NotAfter, least, most)
		}
		line := h.audited("x509_svid.issue")
		if sub(line, "actor", "kind") != "operator" || sub(line, "actor", "uid") != float64(os.Getuid()) || sub(line, "why", "rule") != "mint" ||
			sub(line, "target", "spiffe_id") != "spiffe://example.org/minted" || sub(line, "cert", "serial") != leaf.SerialNumber.Text(16) || sub(line, "result", "code") != "ok" {
			t.Errorf("%s: audit: %v", name, line)
		}
	}
}

// NEG-1, NEG-4: what is not minted, and that the refusal is written down.
func TestWhatIsNotMinted(t *testing.T) {
	h := start(t)
	o := h.operator()
	foreign := func(r *x509.CertificateRequest) { r.URIs[0].Host = "other.org" }
	twoURIs := func(r *x509.CertificateRequest) { r.URIs = append(r.URIs, serverID.URL()) }
	subject := func(r *x509.CertificateRequest) { r.Subject.CommonName = "web" }
	badDNS := func(r *x509.CertificateRequest) { r.DNSNames = []string{"10.0.0.1"} }
	negative := mintOf(t, "/web")
	negative.Ttl = -1
	for name, c := range map[string]struct {
		req    *svidv1.MintX509SVIDRequest
		reason string
		id     any
	}{
		"nothing":          {&svidv1.MintX509SVIDRequest{}, "csr_malformed", nil},
		"no ID":            {&svidv1.MintX509SVIDRequest{Csr: newCSR(t, newKey(t), nil)}, "csr_spiffe_id_missing", nil},
		"the server":       {mintOf(t, "/assay/server"), "spiffe_id_reserved", "spiffe://example.org/assay/server"}, // NEG-3
		"an agent":         {mintOf(t, "/assay/agent/join_token/x"), "spiffe_id_reserved", "spiffe://example.org/assay/agent/join_token/x"},
		"the trust domain": {mintOf(t, ""), "spiffe_id_invalid", "spiffe://example.org"},
		"foreign":          {mintOf(t, "/web", foreign), "spiffe_id_foreign", "spiffe://other.org/web"},
		"no ID at all":     {mintOf(t, "/a/../b"), "spiffe_id_invalid", nil},
		"two IDs":          {mintOf(t, "/web", twoURIs), "csr_san_forbidden", nil},
		"subject":          {mintOf(t, "/web", subject), "csr_subject_forbidden", nil},
		"DNS name":         {mintOf(t, "/web", badDNS), "dns_name_invalid", "spiffe://example.org/web"},
		"life":             {negative, "ttl_out_of_range", "spiffe://example.org/web"},
	} {
		before := len(h.audit())
		_, err := o.svids.MintX509SVID(t.Context(), c.req)
		wantReason(t, name, err, fault.Invalid, c.reason)
		lines := h.audit()[before:]
		if len(lines) != 1 || sub(lines[0], "action") != "x509_svid.issue" || sub(lines[0], "why", "rule") != "mint" || sub(lines[0], "cert") != nil ||
			sub(lines[0], "actor", "kind") != "operator" || sub(lines[0], "result", "reason") != c.reason || sub(lines[0], "target", "spiffe_id") != c.id {
			t.Errorf("%s: audit: %v", name, lines)
		}
	}
	for _, method := range []string{"MintJWTSVID", "MintWITSVID", "BatchNewX509SVID", "NewJWTSVID", "BatchNewWITSVID", "NewDownstreamX509CA"} {
		err := o.conn.Invoke(t.Context(), "/spire.api.server.svid.v1.SVID/"+method, &svidv1.MintX509SVIDRequest{}, &svidv1.MintX509SVIDResponse{})
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", method, err)
		}
	}
}

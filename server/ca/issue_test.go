package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/audit"
)

func TestEachKindGetsItsCertificate(t *testing.T) { // X509-8, X509-20
	a := newWorld(t).open()
	for name, c := range map[string]struct {
		req  X509Request
		life time.Duration
	}{
		"workload": {workload("/ns/default/sa/web"), time.Hour},
		"agent":    {agentRequest(), 12 * time.Hour},
		"server":   {serverRequest(), time.Hour},
	} {
		leaf := issue(t, a, c.req)
		if left := time.Until(leaf.NotAfter); left > c.life || left < c.life-5*time.Second {
			t.Errorf("%s: lives for another %v, want %v", name, left, c.life)
		}
	}
}

// The contents of every certificate, field by field, and nothing besides:
// nothing that changes, such as labels or selectors. // ID-28
func TestProfileFields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.open()
		// Times are whole seconds: not on one, to see which way they are cut.
		advance(time.Hour + 300*time.Millisecond)
		a.hear(time.Now())

		root, iss := a.Bundle().Roots[0].Certificate, a.current.Load().issuer.cert
		req := workload("/web")
		bare := issue(t, a, req)
		req.Cluster, req.DNSNames = "prod-eu", []string{"web.example", "*.web.example"}
		full := issue(t, a, req)
		for name, c := range map[string]struct {
			cert *x509.Certificate
			want string
		}{
			// ID-20, ID-21, X509-13, X509-15, X509-16, X509-17, X509-21, X509-24, X509-25,
			// X509-28, X509-32, D-2, D-3, D-12
			"root": {root, `CN=Assay root authority,O=Assay by CN=Assay root authority,O=Assay ECDSA-SHA256
1999-12-31T23:00:00Z to 2000-12-31T00:00:00Z CA pathlen -1 no-aki
2.5.29.15 critical 03020106
2.5.29.19 critical 30030101ff
2.5.29.14 ski
2.5.29.17 spiffe://example.org`},
			// X509-13, X509-14, X509-15, X509-24, X509-28, X509-32
			"issuer": {iss, `CN=Assay issuer,O=Assay by CN=Assay root authority,O=Assay ECDSA-SHA256
1999-12-31T23:58:00Z to 2000-01-02T00:00:00Z CA pathlen 0 aki
2.5.29.15 critical 03020106
2.5.29.19 critical 30060101ff020100
2.5.29.14 ski
2.5.29.35 aki
2.5.29.17 spiffe://example.org`},
			// X509-1, X509-7, X509-10, X509-21, X509-22, X509-23, X509-24, X509-26,
			// X509-27, X509-32
			"bare leaf": {bare, ` by CN=Assay issuer,O=Assay ECDSA-SHA256
2000-01-01T00:58:00Z to 2000-01-01T02:00:00Z pathlen -1 aki
2.5.29.15 critical 03020780
2.5.29.37 301406082b0601050507030106082b06010505070302
2.5.29.19 critical 3000
2.5.29.14 ski
2.5.29.35 aki
2.5.29.17 critical spiffe://example.org/web`},
			// X509-6: other names may stand beside the one URI
			"full leaf": {full, `OU=prod-eu by CN=Assay issuer,O=Assay ECDSA-SHA256
2000-01-01T00:58:00Z to 2000-01-01T02:00:00Z pathlen -1 aki
2.5.29.15 critical 03020780
2.5.29.37 301406082b0601050507030106082b06010505070302
2.5.29.19 critical 3000
2.5.29.14 ski
2.5.29.35 aki
2.5.29.17 web.example *.web.example spiffe://example.org/web`},
		} {
			if got := describe(c.cert); got != c.want {
				t.Errorf("%s: got\n%s\nwant\n%s", name, got, c.want)
			}
		}
		if bytes.Equal(root.RawSubject, iss.RawSubject) {
			t.Error("root and issuer have one name")
		}
	})
}

func describe(c *x509.Certificate) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s by %s %s\n%s to %s ", c.Subject, c.Issuer, c.SignatureAlgorithm, c.NotBefore.Format(time.RFC3339), c.NotAfter.Format(time.RFC3339))
	if c.IsCA {
		b.WriteString("CA ")
	}
	fmt.Fprintf(&b, "pathlen %d ", c.MaxPathLen)
	if c.AuthorityKeyId == nil {
		b.WriteString("no-")
	}
	b.WriteString("aki")
	for _, e := range c.Extensions {
		fmt.Fprintf(&b, "\n%s", e.Id)
		if e.Critical {
			b.WriteString(" critical")
		}
		switch {
		case e.Id.Equal(oidSubjectKeyID):
			b.WriteString(" ski")
		case e.Id.Equal(oidAuthorityKeyID):
			b.WriteString(" aki")
		case e.Id.Equal(oidSubjectAltName):
			for _, name := range c.DNSNames {
				b.WriteString(" " + name)
			}
			for _, uri := range c.URIs {
				b.WriteString(" " + uri.String())
			}
		default:
			b.WriteString(" " + hex.EncodeToString(e.Value))
		}
	}
	return b.String()
}

func TestIdentityMustBelongToTheKind(t *testing.T) {
	a := newWorld(t).open()
	id := func(path string) spiffeid.ID { return spiffeid.RequireFromPath(example, path) }
	long := func(n int) spiffeid.ID { return id("/" + strings.Repeat("a", n-len("spiffe://example.org/"))) }
	foreign := spiffeid.RequireFromString("spiffe://example.com/web")
	for name, c := range map[string]struct {
		kind   Kind
		id     spiffeid.ID
		reason string // empty: signed
	}{
		"none":                        {Workload, spiffeid.ID{}, "spiffe_id_invalid"},
		"foreign workload":            {Workload, foreign, "spiffe_id_foreign"}, // ID-25
		"foreign agent":               {Agent, spiffeid.RequireFromString("spiffe://example.com/assay/agent/x/1"), "spiffe_id_foreign"},
		"foreign server":              {Server, spiffeid.RequireFromString("spiffe://example.com/assay/server"), "spiffe_id_foreign"},
		"subdomain":                   {Workload, spiffeid.RequireFromString("spiffe://a.example.org/web"), "spiffe_id_foreign"},
		"root path":                   {Workload, example.ID(), "spiffe_id_invalid"},               // X509-4
		"workload as server":          {Workload, id("/assay/server"), "spiffe_id_reserved"},       // NEG-3
		"minted":                      {Minted, id("/web"), ""},                                    //
		"minted, foreign":             {Minted, foreign, "spiffe_id_foreign"},                      //
		"minted, root path":           {Minted, example.ID(), "spiffe_id_invalid"},                 //
		"minted as server":            {Minted, id("/assay/server"), "spiffe_id_reserved"},         //
		"mesh":                        {Mesh, id("/ns/a/sa/b"), ""},                                //
		"mesh, foreign":               {Mesh, foreign, "spiffe_id_foreign"},                        //
		"mesh as agent":               {Mesh, id("/assay/agent/x/1"), "spiffe_id_reserved"},        //
		"minted as agent":             {Minted, id("/assay/agent/x/1"), "spiffe_id_reserved"},      //
		"workload as agent":           {Workload, id("/assay/agent/x/1"), "spiffe_id_reserved"},    //
		"workload under the prefix":   {Workload, id("/assay/anything"), "spiffe_id_reserved"},     //
		"workload beside the prefix":  {Workload, id("/assayer/x"), ""},                            //
		"case counts":                 {Workload, id("/Assay/server"), ""},                         // ID-17
		"2048 bytes":                  {Workload, long(2048), ""},                                  // ID-10
		"2049 bytes":                  {Workload, long(2049), "spiffe_id_invalid"},                 // ID-11
		"agent elsewhere":             {Agent, id("/agent/x/1"), "spiffe_id_invalid"},              //
		"agent as server":             {Agent, id("/assay/server"), "spiffe_id_invalid"},           //
		"agent without a name":        {Agent, id("/assay/agent"), "spiffe_id_invalid"},            //
		"agent":                       {Agent, id("/assay/agent/k8s_psat/c/1"), ""},                //
		"server below":                {Server, id("/assay/server/1"), "spiffe_id_invalid"},        //
		"server as workload":          {Server, id("/web"), "spiffe_id_invalid"},                   //
		"server":                      {Server, id("/assay/server"), ""},                           //
		"opaque path":                 {Workload, id("/6e0b1f9e-62a7-4a2c-a2a1-0c0f0d0e0a0b"), ""}, // ID-19
		"three dots are a name":       {Workload, id("/..."), ""},                                  // ID-14
		"unknown kind":                {Kind(7), id("/web"), "kind_unknown"},
		"negative kind":               {Kind(-1), id("/web"), "kind_unknown"},
		"workload as another's agent": {Workload, id("/spire/agent/x"), ""},
	} {
		svids, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{{Kind: c.kind, ID: c.id, PublicKey: newKey().Public()}})
		if err != nil {
			t.Fatal(err)
		}
		if got := svids[0].Err; c.reason == "" && got != nil {
			t.Errorf("%s: refused: %v", name, got)
		} else if c.reason != "" && (fault.ReasonOf(got) != c.reason || !errors.Is(got, fault.Invalid)) {
			t.Errorf("%s: got error %v, want invalid %s", name, got, c.reason)
		}
		if (svids[0].Err == nil) == (svids[0].Chain == nil) {
			t.Errorf("%s: certificate and error, or neither", name) // NEG-53
		}
	}
}

func TestReservedPrefixIsConfigurable(t *testing.T) {
	w := newWorld(t)
	w.opts.ReservedPrefix = "/spire/"
	a := w.open()
	for path, want := range map[string]string{"/spire/agent/x": "spiffe_id_reserved", "/assay/agent/x": "internal"} {
		svids, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{workload(path)})
		if err != nil {
			t.Fatal(err)
		}
		if got := svids[0].Err; (got == nil) != (want == "internal") || got != nil && fault.ReasonOf(got) != want {
			t.Errorf("%s: got %v", path, got)
		}
	}
	for _, prefix := range []string{"", "/", "//", "assay/", "/assay"} {
		w.opts.ReservedPrefix = prefix
		_, err := Open(t.Context(), w.opts)
		wantReason(t, err, fault.Precondition, "config_reserved_prefix")
	}
}

func TestLifetimesAreBounded(t *testing.T) {
	w := newWorld(t)
	w.opts.Config = Config{X509SVIDTTL: 30 * time.Minute, MaxX509SVIDTTL: 2 * time.Hour}
	a := w.open()
	for name, c := range map[string]struct {
		req  X509Request
		ttl  time.Duration
		want time.Duration
	}{
		"default":          {workload("/w"), 0, 30 * time.Minute},
		"shorter":          {workload("/w"), time.Minute, time.Minute},
		"longer":           {workload("/w"), time.Hour, time.Hour},
		"past the cap":     {workload("/w"), 3 * time.Hour, 2 * time.Hour},
		"absurd":           {workload("/w"), math.MaxInt64, 2 * time.Hour}, // NEG-8: no overflow
		"server's default": {serverRequest(), 0, 30 * time.Minute},
		"server's cap":     {serverRequest(), 24 * time.Hour, 2 * time.Hour},
		"agent's default":  {agentRequest(), 0, 12 * time.Hour},
		"agent's cap":      {agentRequest(), 13 * time.Hour, 12 * time.Hour},
	} {
		c.req.TTL = c.ttl
		leaf := issue(t, a, c.req)
		if left := time.Until(leaf.NotAfter); left > c.want || left < c.want-5*time.Second {
			t.Errorf("%s: %v left, want %v", name, left, c.want)
		}
		// Back-dating never eats a short life.
		if back := time.Since(leaf.NotBefore); back > c.want/4+5*time.Second {
			t.Errorf("%s: back-dated by %v", name, back)
		}
	}
	for _, ttl := range []time.Duration{-1, math.MinInt64, 1, 999 * time.Millisecond} {
		req := workload("/w")
		req.TTL = ttl
		svids, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{req})
		if err != nil {
			t.Fatal(err)
		}
		wantReason(t, svids[0].Err, fault.Invalid, "ttl_out_of_range")
	}
}

func TestNamesAreChecked(t *testing.T) {
	a := newWorld(t).open()
	reason := func(change func(*X509Request)) string {
		t.Helper()
		req := workload("/w")
		change(&req)
		svids, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{req})
		if err != nil {
			t.Fatal(err)
		}
		if svids[0].Err == nil {
			inspect(t, a, req, svids[0])
			return ""
		}
		return fault.ReasonOf(svids[0].Err)
	}
	for cluster, want := range map[string]string{
		"prod": "", "prod eu_1": "", "Zürich": "", strings.Repeat("x", 64): "", strings.Repeat("ü", 64): "",
		strings.Repeat("x", 65): "cluster_invalid", "a\x00b": "cluster_invalid", "a\nb": "cluster_invalid", "\xff": "cluster_invalid",
	} {
		if got := reason(func(r *X509Request) { r.Cluster = cluster }); got != want {
			t.Errorf("cluster %q: got %q, want %q", cluster, got, want)
		}
	}
	many := make([]string, name.MaxDNSNames+1)
	for i := range many {
		many[i] = fmt.Sprintf("n%d.example", i)
	}
	for _, c := range []struct {
		names []string
		want  string
	}{
		{[]string{"web"}, ""},
		{[]string{"web.example", "*.example"}, ""},
		{[]string{"a_b.example"}, "dns_name_invalid"},
		{[]string{"1.example"}, ""},
		{many[:name.MaxDNSNames], ""},
		{[]string{strings.Repeat("a", 63) + ".example"}, ""},
		{many, "dns_name_invalid"},
		{[]string{""}, "dns_name_invalid"},
		{[]string{"a..b"}, "dns_name_invalid"},
		{[]string{"a."}, "dns_name_invalid"},
		{[]string{"*"}, "dns_name_invalid"},
		{[]string{"a.*.b"}, "dns_name_invalid"},
		{[]string{"*a.b"}, "dns_name_invalid"},
		{[]string{"-a.b"}, "dns_name_invalid"},
		{[]string{"a-.b"}, "dns_name_invalid"},
		{[]string{"ä.b"}, "dns_name_invalid"},
		{[]string{"a b"}, "dns_name_invalid"},
		{[]string{"10.0.0.1"}, "dns_name_invalid"},
		{[]string{"::1"}, "dns_name_invalid"},
		{[]string{"a.b", "A.b"}, "dns_name_invalid"},
		{[]string{strings.Repeat("a", 64) + ".b"}, "dns_name_invalid"},
		{[]string{strings.Repeat("a.", 127) + "b"}, "dns_name_invalid"},
	} {
		if got := reason(func(r *X509Request) { r.DNSNames = c.names }); got != c.want {
			t.Errorf("DNS names %q: got %q, want %q", c.names, got, c.want)
		}
	}
}

// The lesson of the CAA recheck: N different items, each with its own answer.
func TestBatchAnswersEachItemForItself(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	var reqs []X509Request
	for i := range 50 {
		req := workload(fmt.Sprintf("/w/%d", i))
		switch i % 7 {
		case 3:
			req.ID = spiffeid.RequireFromString("spiffe://example.com/x")
		case 5:
			req.PublicKey = nil
		}
		req.EntryID, req.EntryRevision, req.Rule = fmt.Sprintf("entry-%d", i), int64(i), "entry"
		reqs = append(reqs, req)
	}
	by := audit.Origin{RequestID: "r1", Actor: audit.Actor{Kind: "agent", SPIFFEID: "spiffe://example.org/assay/agent/x/1", Serial: "0a"}, From: "10.0.0.1:1"}
	svids, err := a.IssueX509(t.Context(), by, reqs)
	if err != nil {
		t.Fatal(err)
	}
	lines := w.audit.taken("x509_svid.issue")
	if len(svids) != len(reqs) || len(lines) != len(reqs) {
		t.Fatalf("%d answers and %d audit lines for %d requests", len(svids), len(lines), len(reqs))
	}
	seen := map[string]bool{}
	for i, svid := range svids {
		line := lines[i]
		if line.Origin.RequestID != "r1" || line.Origin.Actor.Serial != "0a" || line.Target.EntryID != reqs[i].EntryID ||
			line.Target.EntryRevision != int64(i) || line.Target.SPIFFEID != reqs[i].ID.String() || line.Why.Rule != "entry" {
			t.Errorf("item %d: audit line %+v is not about it", i, line)
		}
		if want := map[int]string{3: "spiffe_id_foreign", 5: "key_not_allowed"}[i%7]; want != "" {
			if fault.ReasonOf(svid.Err) != want || svid.Chain != nil {
				t.Errorf("item %d: got %v, want %s", i, svid.Err, want)
			}
			if line.Result != (audit.Result{Code: "invalid", Reason: want}) || line.Cert != nil {
				t.Errorf("item %d: audit says %+v", i, line.Result)
			}
			continue
		}
		if svid.Err != nil {
			t.Fatalf("item %d: %v", i, svid.Err)
		}
		leaf := inspect(t, a, reqs[i], svid)
		if seen[svid.Serial] {
			t.Errorf("item %d: serial %s is there twice", i, svid.Serial)
		}
		seen[svid.Serial] = true
		// The line must let the certificate be found again.
		if line.Result.Code != "ok" || line.Cert == nil || line.Cert.Serial != svid.Serial || line.Cert.SPKISHA256 != Pin(leaf) ||
			line.Cert.IssuerSKI != hex.EncodeToString(leaf.AuthorityKeyId) || !line.Cert.NotAfter.Equal(leaf.NotAfter) ||
			!line.Cert.NotBefore.Equal(leaf.NotBefore) || line.Target.AuthorityID != svid.AuthorityID {
			t.Errorf("item %d: audit line %+v does not describe the certificate", i, line)
		}
	}
	if svids, err := a.IssueX509(t.Context(), by, nil); err != nil || len(svids) != 0 {
		t.Errorf("no requests: got %v, %v", svids, err)
	}
}

// countingSigner counts the signatures of an issuer.
type countingSigner struct {
	crypto.Signer
	n atomic.Int64
}

func (s *countingSigner) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	s.n.Add(1)
	return s.Signer.Sign(random, digest, opts)
}

func count(a *Authority) *countingSigner {
	cur := *a.current.Load()
	iss := *cur.issuer
	s := &countingSigner{Signer: iss.key}
	iss.key, cur.issuer = s, &iss
	a.current.Store(&cur)
	return s
}

// P8: the line is there before the signature, and without it there is none.
func TestNothingIsSignedBeforeItsAuditLine(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	signer := count(a)
	w.audit.before = func() {
		if signer.n.Load() != 0 {
			t.Error("there was a signature before its audit line")
		}
	}
	w.audit.err = fault.New(fault.Exhausted, "audit_full", "no space")
	svids, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{workload("/w"), workload("/v")})
	wantReason(t, err, fault.Exhausted, "audit_full")
	if svids != nil || signer.n.Load() != 0 {
		t.Errorf("%d signatures and answer %v without an audit line", signer.n.Load(), svids)
	}
	w.audit.err = nil
	if _, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{workload("/w"), workload("/v")}); err != nil || signer.n.Load() != 2 {
		t.Errorf("%d signatures, error %v", signer.n.Load(), err)
	}
}

type brokenSigner struct{ crypto.Signer }

func (brokenSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("broken")
}

func TestFailedSignatureIsAnErrorOfItsItem(t *testing.T) {
	a := newWorld(t).open()
	cur := *a.current.Load()
	iss := *cur.issuer
	iss.key, cur.issuer = brokenSigner{iss.key}, &iss
	a.current.Store(&cur)
	svids, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{workload("/w")})
	if err != nil {
		t.Fatal(err)
	}
	wantReason(t, svids[0].Err, fault.Internal, "sign_failed")
	if svids[0].Chain != nil {
		t.Error("a certificate came with the error")
	}
}

func TestConcurrentIssuesAreAllSound(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	start(t, a)
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 10 {
				reqs := []X509Request{workload(fmt.Sprintf("/w/%d/%d", worker, i)), agentRequest(), serverRequest()}
				svids, err := a.IssueX509(context.Background(), audit.Origin{}, reqs)
				if err != nil {
					t.Error(err)
					return
				}
				for j, svid := range svids {
					inspect(t, a, reqs[j], svid)
				}
			}
		})
	}
	wg.Wait()
	var serials []string
	for _, line := range w.audit.taken("x509_svid.issue") {
		serials = append(serials, line.Cert.Serial)
	}
	slices.Sort(serials)
	if n := len(slices.Compact(serials)); n != 240 {
		t.Errorf("%d different serials for 240 certificates", n) // P2
	}
}

func TestRSAAndP384KeysAreCertified(t *testing.T) {
	a := newWorld(t).open()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, pub := range []crypto.PublicKey{rsaKey.Public(), p384.Public()} {
		req := workload("/w")
		req.PublicKey = pub
		issue(t, a, req)
	}
}

func TestOtherKeysAreRefused(t *testing.T) {
	a := newWorld(t).open()
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, pub := range []crypto.PublicKey{nil, p521.Public(), &rsa.PublicKey{N: odd(t, 1024), E: 65537}} {
		req := workload("/w")
		req.PublicKey = pub
		svids, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{req})
		if err != nil {
			t.Fatal(err)
		}
		wantReason(t, svids[0].Err, fault.Invalid, "key_not_allowed")
	}
}

// X509-20
func TestPlanStaysInsideTheIssuersLife(t *testing.T) {
	p, now := testProfiles(), time.Now()
	at := func(d time.Duration) time.Time { return now.Add(d).UTC().Truncate(time.Second) }
	l := p.plan(workload("/w"), &x509.Certificate{NotBefore: at(-time.Second), NotAfter: at(time.Minute)}, now)
	if l.err != nil || !l.notBefore.Equal(at(-time.Second)) || !l.notAfter.Equal(at(time.Minute)) {
		t.Errorf("planned %v to %v, error %v", l.notBefore, l.notAfter, l.err)
	}
	l = p.plan(workload("/w"), &x509.Certificate{NotBefore: at(-time.Hour), NotAfter: at(0)}, now)
	wantReason(t, l.err, fault.NotReady, "issuer_expired")
}

// NEG-58 b: however old the issuer is, a clock that is set back stops signing, and
// one that is right again starts it.
func TestClockThatIsSetBackStopsSigning(t *testing.T) {
	w := newWorld(t)
	var set atomic.Int64
	began := time.Now()
	w.opts.Clock = schedule.NewClock(
		func() time.Time { return time.Now().Round(0).Add(time.Duration(set.Load())) },
		func() time.Duration { return time.Since(began) },
	)
	a := w.open()
	issue := func() error {
		_, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{workload("/w")})
		return err
	}
	for _, by := range []time.Duration{-25 * time.Hour, -6 * time.Minute} {
		set.Store(int64(by))
		wantReason(t, issue(), fault.NotReady, "clock_backwards")
		wantReason(t, a.Ready(), fault.NotReady, "clock_backwards")
		set.Store(0)
		if err := issue(); err != nil {
			t.Errorf("right again after %v: %v", by, err)
		}
	}
	for _, by := range []time.Duration{-4 * time.Minute, 3 * time.Hour} { // the latter: it was stopped by its host
		set.Store(int64(by))
		if err := issue(); err != nil {
			t.Errorf("%v: %v", by, err)
		}
		set.Store(0)
	}
}

func TestClockBeforeTheIssuerStopsSigning(t *testing.T) {
	a := newWorld(t).open()
	iss := a.current.Load().issuer
	wantReason(t, iss.usable(iss.cert.NotBefore.Add(-time.Second)), fault.NotReady, "clock_backwards") // NEG-58 b
	wantReason(t, iss.usable(iss.cert.NotAfter), fault.NotReady, "issuer_expired")
	if err := iss.usable(time.Now()); err != nil {
		t.Error(err)
	}
}

// An entry's expires_at bounds its certificates: else its last one would live
// on for as long as any.
func TestNoCertificateOutlivesTheRightToIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newWorld(t).open()
		req := workload("/web")
		req.NotAfter = time.Now().Add(10 * time.Minute)
		if leaf := issue(t, a, req); leaf.NotAfter.After(req.NotAfter) {
			t.Errorf("ends at %v, the right at %v", leaf.NotAfter, req.NotAfter)
		}
		req.NotAfter = time.Now().Add(2 * time.Hour)
		if leaf := issue(t, a, req); time.Until(leaf.NotAfter) > time.Hour {
			t.Errorf("a late end made a long life: %v", leaf.NotAfter)
		}
		req.NotAfter = time.Now().Add(-time.Second)
		svids, err := a.IssueX509(t.Context(), audit.Origin{}, []X509Request{req})
		if err != nil || fault.ReasonOf(svids[0].Err) != "right_expired" {
			t.Errorf("%v, %v", svids, err)
		}
	})
}

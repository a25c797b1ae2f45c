package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// benchPKI is a root and an issuer with their keys, and templates in the image of
// what the profiles sign, for certificates that this package would not sign.
type benchPKI struct {
	p               profiles
	root, issuer    *x509.Certificate
	rootKey, issKey crypto.Signer
}

func testProfiles() profiles {
	return newProfiles(example, testPrefix, Config{}.WithDefaults(), 12*time.Hour)
}

func newBenchPKI(t testing.TB) *benchPKI {
	t.Helper()
	b := &benchPKI{p: testProfiles()}
	draw, now := &serials{random: rand.Reader}, time.Now()
	var err error
	if b.root, b.rootKey, err = lintAuthority(b.p.root, b.p.root.ttl, nil, nil, draw, now); err != nil {
		t.Fatal(err)
	}
	if b.issuer, b.issKey, err = lintAuthority(b.p.issuer, b.p.issuer.ttl, b.root, b.rootKey, draw, now); err != nil {
		t.Fatal(err)
	}
	return b
}

// template returns a flawless template of a profile and what signs it.
func (b *benchPKI) template(t testing.TB, p Profile) (template, parent *x509.Certificate, key crypto.Signer) {
	t.Helper()
	number, err := (&serials{random: rand.Reader}).next()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	template, err = p.authorityTemplate(number, newKey().Public(), now.Add(-p.backdate), now.Add(p.maxTTL))
	if err != nil {
		t.Fatal(err)
	}
	switch p.name {
	case "root":
		self := newKey()
		if template, err = p.authorityTemplate(number, self.Public(), now.Add(-p.backdate), now.Add(p.maxTTL)); err != nil {
			t.Fatal(err)
		}
		return template, template, self
	case "issuer":
		return template, b.root, b.rootKey
	}
	template.Subject = pkix.Name{}
	template.URIs = []*url.URL{spiffeid.RequireFromPath(example, "/web").URL()}
	return template, b.issuer, b.issKey
}

func (b *benchPKI) sign(t testing.TB, template, parent *x509.Certificate, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, template.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// A mutant is a certificate with one flaw, made by changing a flawless
// template, its parent, or the parsed result where package x509 can't be made
// to sign the flaw.
type mutant struct {
	name     string
	lint     string
	profile  func(p profiles) Profile
	template func(c *x509.Certificate)
	parent   func(c *x509.Certificate)
	parsed   func(c *x509.Certificate)
}

func workloadProfile(p profiles) Profile { return p.leaf[Workload] }
func rootProfile(p profiles) Profile     { return p.root }
func issuerProfile(p profiles) Profile   { return p.issuer }

func uris(all ...string) pkix.Extension {
	var names []byte
	for _, u := range all {
		names = append(names, tlv(tagURI, []byte(u))...)
	}
	return pkix.Extension{Id: oidSubjectAltName, Critical: true, Value: tlv(tagSequence, names)}
}

func extra(e pkix.Extension) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.ExtraExtensions = append(c.ExtraExtensions, e) }
}

func dropExtension(id asn1.ObjectIdentifier) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.Extensions = slices.DeleteFunc(slices.Clone(c.Extensions), func(e pkix.Extension) bool { return e.Id.Equal(id) })
	}
}

func mutants(t testing.TB) []mutant {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	critical := func(id asn1.ObjectIdentifier, to bool) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.Extensions = slices.Clone(c.Extensions)
			for i := range c.Extensions {
				if c.Extensions[i].Id.Equal(id) {
					c.Extensions[i].Critical = to
				}
			}
		}
	}
	san := func(uri ...string) func(*x509.Certificate) { return extra(uris(uri...)) }
	leaf, root, iss := workloadProfile, rootProfile, issuerProfile
	return []mutant{
		{name: "version 1", lint: "version", profile: leaf, parsed: func(c *x509.Certificate) { c.Version = 1 }},
		{name: "short serial", lint: "serial", profile: leaf, template: func(c *x509.Certificate) { c.SerialNumber = big.NewInt(1 << 62) }},
		{name: "21 bytes of serial", lint: "serial", profile: leaf, parsed: func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 160) }},
		{name: "negative serial", lint: "serial", profile: leaf, parsed: func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Neg(c.SerialNumber) }},
		{name: "SHA-512", lint: "signature_algorithm", profile: leaf, template: func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA512 }},
		{name: "CN", lint: "subject", profile: leaf, template: func(c *x509.Certificate) { c.Subject.CommonName = "web" }},
		{name: "two OUs", lint: "subject", profile: leaf, template: func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"a", "b"} }},
		{name: "long OU", lint: "subject", profile: leaf, template: func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{strings.Repeat("x", 65)} }},
		{name: "root's own name", lint: "subject", profile: root, template: func(c *x509.Certificate) { c.Subject.CommonName = "root 2" }},
		{name: "nameless issuer", lint: "subject", profile: iss, template: func(c *x509.Certificate) { c.Subject = pkix.Name{} }},
		{name: "issuer with the root's name", lint: "subject", profile: iss, template: func(c *x509.Certificate) { c.Subject = rootSubject }},
		{name: "leaf of a root", lint: "issuer", profile: leaf, parent: func(c *x509.Certificate) { c.Subject, c.RawSubject = rootSubject, nil }},
		{name: "no issuer name", lint: "issuer", profile: leaf, parent: func(c *x509.Certificate) { c.Subject, c.RawSubject = pkix.Name{}, nil }},
		{name: "backwards", lint: "validity_order", profile: leaf, template: func(c *x509.Certificate) { c.NotBefore, c.NotAfter = c.NotAfter, c.NotBefore }},
		{name: "one instant", lint: "validity_order", profile: leaf, template: func(c *x509.Certificate) { c.NotAfter = c.NotBefore }},
		{name: "one second", lint: "validity_span", profile: leaf, template: func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Second) }},
		{name: "root one second", lint: "validity_span", profile: root, template: func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Second) }},
		{name: "issuer one second", lint: "validity_span", profile: iss, template: func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(-time.Second) }},
		{name: "weak key", lint: "public_key", profile: leaf, template: func(c *x509.Certificate) { c.PublicKey = weak.Public() }},
		{name: "issuer on P-384", lint: "public_key", profile: iss, template: func(c *x509.Certificate) { c.PublicKey = p384.Public() }},
		{name: "keyCertSign", lint: "key_usage", profile: leaf, template: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},                   // X509-23
		{name: "cRLSign", lint: "key_usage", profile: leaf, template: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }},                        // X509-23
		{name: "no digitalSignature", lint: "key_usage", profile: leaf, template: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }},        // X509-22
		{name: "root digitalSignature", lint: "key_usage", profile: root, template: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }}, // X509-25, D-12
		{name: "issuer keyEncipherment", lint: "key_usage", profile: iss, template: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment }},  // X509-24
		{name: "key usage not critical", lint: "key_usage_critical", profile: leaf, parsed: critical(oidKeyUsage, false)},
		{name: "no key usage", lint: "key_usage_critical", profile: root, template: func(c *x509.Certificate) { c.KeyUsage = 0 }},
		{name: "server only", lint: "ext_key_usage", profile: leaf, template: func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }},
		{name: "client only", lint: "ext_key_usage", profile: leaf, template: func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }},
		{name: "no EKU", lint: "ext_key_usage", profile: leaf, template: func(c *x509.Certificate) { c.ExtKeyUsage = nil }},
		{name: "any EKU too", lint: "ext_key_usage", profile: leaf, template: func(c *x509.Certificate) { c.ExtKeyUsage = append(slices.Clone(c.ExtKeyUsage), x509.ExtKeyUsageAny) }},
		{name: "unknown EKU too", lint: "ext_key_usage", profile: leaf, template: func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }},
		{name: "critical EKU", lint: "ext_key_usage", profile: leaf, parsed: critical(oidExtKeyUsage, true)},
		{name: "EKU on an issuer", lint: "ext_key_usage", profile: iss, template: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }},
		{name: "leaf is CA", lint: "basic_constraints", profile: leaf, template: func(c *x509.Certificate) { c.IsCA = true }},
		{name: "leaf without constraints", lint: "basic_constraints", profile: leaf, template: func(c *x509.Certificate) { c.BasicConstraintsValid = false }},
		{name: "root is no CA", lint: "basic_constraints", profile: root, template: func(c *x509.Certificate) { c.IsCA = false }},
		{name: "constraints not critical", lint: "basic_constraints", profile: iss, parsed: critical(oidBasicConstraints, false)},
		{name: "issuer without limit", lint: "path_length", profile: iss, template: func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = -1, false }},
		{name: "issuer with an issuer below", lint: "path_length", profile: iss, template: func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }},
		{name: "root with a limit", lint: "path_length", profile: root, template: func(c *x509.Certificate) { c.MaxPathLen = 1 }},
		{name: "no SKI", lint: "subject_key_id", profile: leaf, template: func(c *x509.Certificate) { c.SubjectKeyId = nil }},
		{name: "another SKI", lint: "subject_key_id", profile: root, template: func(c *x509.Certificate) { c.SubjectKeyId = make([]byte, 20) }},
		{name: "critical SKI", lint: "subject_key_id", profile: leaf, parsed: critical(oidSubjectKeyID, true)},
		{name: "no AKI", lint: "authority_key_id", profile: leaf, parsed: dropExtension(oidAuthorityKeyID)},
		{name: "own AKI", lint: "authority_key_id", profile: leaf, parsed: func(c *x509.Certificate) { c.AuthorityKeyId = c.SubjectKeyId }},
		{name: "short AKI", lint: "authority_key_id", profile: iss, parsed: func(c *x509.Certificate) { c.AuthorityKeyId = c.AuthorityKeyId[:8] }},
		{name: "root with another's AKI", lint: "authority_key_id", profile: root, template: extra(pkix.Extension{Id: oidAuthorityKeyID, Value: append([]byte{0x30, 0x16, 0x80, 0x14}, make([]byte, 20)...)})},
		{name: "two URIs", lint: "one_uri", profile: leaf, template: san("spiffe://example.org/a", "spiffe://example.org/b")}, // X509-2
		{name: "a URI of another scheme too", lint: "one_uri", profile: leaf, template: san("spiffe://example.org/a", "https://x.example")},
		{name: "DNS name only", lint: "one_uri", profile: leaf, template: func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"web"} }},
		{name: "nameless root", lint: "one_uri", profile: root, template: func(c *x509.Certificate) { c.URIs = nil }},
		{name: "https", lint: "spiffe_id", profile: leaf, template: san("https://example.org/web")},                 // X509-3
		{name: "upper-case scheme", lint: "spiffe_id", profile: leaf, template: san("SPIFFE://example.org/web")},    // X509-3
		{name: "bare fragment", lint: "spiffe_id", profile: leaf, template: san("spiffe://example.org/web#")},       // ID-3
		{name: "bare query", lint: "spiffe_id", profile: leaf, template: san("spiffe://example.org/web?")},          // ID-3
		{name: "port", lint: "spiffe_id", profile: leaf, template: san("spiffe://example.org:80/web")},              // ID-4
		{name: "escape", lint: "spiffe_id", profile: leaf, template: san("spiffe://example.org/a%2Fb")},             // ID-13
		{name: "trailing slash", lint: "spiffe_id", profile: leaf, template: san("spiffe://example.org/web/")},      // ID-15
		{name: "no path", lint: "spiffe_id", profile: leaf, template: san("spiffe://example.org")},                  // X509-4
		{name: "foreign", lint: "spiffe_id", profile: leaf, template: san("spiffe://example.com/web")},              // ID-25
		{name: "reserved", lint: "spiffe_id", profile: leaf, template: san("spiffe://example.org/assay/agent/x/1")}, // ID of an agent
		{name: "too long", lint: "spiffe_id", profile: leaf, template: san("spiffe://example.org/" + strings.Repeat("a", 2028))},
		{name: "workload's ID for an agent", lint: "spiffe_id", profile: func(p profiles) Profile { return p.leaf[Agent] }},
		{name: "workload's ID for a server", lint: "spiffe_id", profile: func(p profiles) Profile { return p.leaf[Server] }},
		{name: "root with a path", lint: "spiffe_id", profile: root, template: san("spiffe://example.org/ca")},     // X509-16
		{name: "issuer of another domain", lint: "spiffe_id", profile: iss, template: san("spiffe://example.com")}, // X509-17
		{name: "SAN not critical", lint: "san_critical", profile: leaf, parsed: critical(oidSubjectAltName, false)},
		{name: "SAN critical with a subject", lint: "san_critical", profile: root, parsed: critical(oidSubjectAltName, true)},
		{name: "IP address", lint: "other_names", profile: leaf, template: func(c *x509.Certificate) { c.IPAddresses = []net.IP{{10, 0, 0, 1}} }},
		{name: "e-mail", lint: "other_names", profile: leaf, template: func(c *x509.Certificate) { c.EmailAddresses = []string{"a@example.org"} }},
		{name: "DNS name on an issuer", lint: "other_names", profile: iss, template: func(c *x509.Certificate) { c.DNSNames = []string{"ca"} }},
		{name: "bad DNS name", lint: "other_names", profile: leaf, template: func(c *x509.Certificate) { c.DNSNames = []string{"a b"} }},
		{name: "name constraints", lint: "extensions", profile: root, template: func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} }},
		{name: "CRL pointer", lint: "extensions", profile: leaf, template: func(c *x509.Certificate) { c.CRLDistributionPoints = []string{"http://crl.example"} }},
		{name: "unknown extension", lint: "extensions", profile: leaf, template: extra(pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: []byte{5, 0}})},
	}
}

// NEG-9, PLAN-1: each lint kills its mutants, and nothing flawless.
func TestLintsKillTheirMutants(t *testing.T) {
	b := newBenchPKI(t)
	killed := map[string]int{}
	for _, m := range mutants(t) {
		p := m.profile(b.p)
		template, parent, key := b.template(t, p)
		if p.name != "agent" && p.name != "server" {
			if err := Lint(b.sign(t, template, parent, key), p); err != nil {
				t.Fatalf("%s: the template without its flaw fails: %v", m.name, err)
			}
		}
		if m.template != nil {
			m.template(template)
		}
		if m.parent != nil {
			changed := *parent
			m.parent(&changed)
			parent = &changed
		}
		cert := b.sign(t, template, parent, key)
		if m.parsed != nil {
			m.parsed(cert)
		}
		err := Lint(cert, p)
		if fault.ReasonOf(err) != "lint_failed" || fault.KindOf(err) != fault.Internal {
			t.Errorf("%s: got %v", m.name, err)
			continue
		}
		if !strings.Contains(fault.SafeText(err), m.lint+": ") {
			t.Errorf("%s: killed by %v, not by %s", m.name, err, m.lint)
			continue
		}
		killed[m.lint]++
	}
	for _, l := range lints {
		if killed[l.name] == 0 {
			t.Errorf("lint %s has no mutant that it kills", l.name)
		}
	}
}

// NEG-9: a profile that would sign something wrong stops Open before the real
// key is used, or the store even read.
func TestFlawedProfileStopsOpen(t *testing.T) {
	for name, flaw := range map[string]func(p *profiles){
		"leaf keyCertSign":    func(p *profiles) { p.leaf[Workload].keyUsage |= x509.KeyUsageCertSign },
		"agent without EKU":   func(p *profiles) { p.leaf[Agent].extKeyUsage = nil },
		"server, client only": func(p *profiles) { p.leaf[Server].extKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} },
		"issuer path length":  func(p *profiles) { p.issuer.maxPathLen = 1 },
		"root path length":    func(p *profiles) { p.root.maxPathLen = 3 },
		"root usage":          func(p *profiles) { p.root.keyUsage = x509.KeyUsageDigitalSignature },
		"issuer EKU":          func(p *profiles) { p.issuer.extKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
		"one name":            func(p *profiles) { p.issuer.subject = p.root.subject },
	} {
		p := testProfiles()
		flaw(&p)
		if err := lintProfiles(p); fault.ReasonOf(err) != "lint_failed" {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if err := lintProfiles(testProfiles()); err != nil {
		t.Error(err)
	}
}

func TestProfileIsFoundByKind(t *testing.T) {
	a := newWorld(t).open()
	for _, k := range []Kind{Workload, Agent, Server, Minted, Mesh} {
		p, err := a.Profile(k)
		if err != nil || p.name != k.String() {
			t.Errorf("%v: got %q, %v", k, p.name, err)
		}
	}
	for _, k := range []Kind{-1, 5} {
		if _, err := a.Profile(k); err == nil {
			t.Errorf("%v has a profile", k)
		}
	}
}

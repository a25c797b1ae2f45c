package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
)

// A lint judges one aspect of a certificate and returns what is wrong, or "".
// Lints hold what the standards and the design ask for in their own words; of
// the profile they take what differs between profiles, not what it would sign.
type lint struct {
	name  string
	check func(c *lintee) string
}

// lintee is a certificate with what package x509 does not keep of it.
type lintee struct {
	*x509.Certificate
	p     Profile
	names []asn1.RawValue // GeneralNames of the SAN extension, as encoded
}

var lints = []lint{
	{"version", lintVersion},
	{"serial", lintSerial},
	{"signature_algorithm", lintSignatureAlgorithm},
	{"subject", lintSubject},
	{"issuer", lintIssuer},
	{"validity_order", lintValidityOrder},
	{"validity_span", lintValiditySpan},
	{"public_key", lintPublicKey},
	{"key_usage", lintKeyUsage},
	{"key_usage_critical", lintKeyUsageCritical},
	{"ext_key_usage", lintExtKeyUsage},
	{"basic_constraints", lintBasicConstraints},
	{"path_length", lintPathLength},
	{"subject_key_id", lintSubjectKeyID},
	{"authority_key_id", lintAuthorityKeyID},
	{"one_uri", lintOneURI},
	{"spiffe_id", lintSPIFFEID},
	{"san_critical", lintSANCritical},
	{"other_names", lintOtherNames},
	{"extensions", lintExtensions},
}

// Lint says whether cert is a flawless certificate of its profile. The error is
// Internal with reason lint_failed and names the lints.
func Lint(cert *x509.Certificate, p Profile) error {
	c := &lintee{Certificate: cert, p: p}
	if san := c.extension(oidSubjectAltName); san != nil {
		if rest, err := asn1.Unmarshal(san.Value, &c.names); err != nil || len(rest) > 0 {
			c.names = nil
		}
	}
	var found []string
	for _, l := range lints {
		if wrong := l.check(c); wrong != "" {
			found = append(found, l.name+": "+wrong)
		}
	}
	if len(found) == 0 {
		return nil
	}
	return fault.Newf(fault.Internal, "lint_failed", "a %s certificate fails %s", p.name, strings.Join(found, "; "))
}

// lintProfiles signs one certificate of every shape with throw-away keys and
// lints it.
func lintProfiles(p profiles) error {
	now := time.Now()
	draw := &serials{random: rand.Reader}
	root, rootKey, err := lintAuthority(p.root, p.root.ttl, nil, nil, draw, now)
	if err != nil {
		return err
	}
	cert, key, err := lintAuthority(p.issuer, p.issuer.ttl, root, rootKey, draw, now)
	if err != nil {
		return err
	}
	iss, err := newIssuer(cert, key, "", root.NotAfter, &p)
	if err != nil {
		return err
	}
	for k := range p.leaf {
		if err := lintLeaf(p, Kind(k), iss, draw, now); err != nil {
			return err
		}
	}
	return nil
}

// lintAuthority makes a root (parent nil) or an issuer; signing lints it.
func lintAuthority(p Profile, ttl time.Duration, parent *x509.Certificate, parentKey crypto.Signer, draw *serials, now time.Time) (*x509.Certificate, crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate throw-away key: %w", err)
	}
	number, err := draw.next()
	if err != nil {
		return nil, nil, err
	}
	template, err := p.authorityTemplate(number, key.Public(), now.Add(-p.backdate), now.Add(ttl))
	if err != nil {
		return nil, nil, err
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	cert, err := p.signAuthority(template, parent, key.Public(), parentKey)
	return cert, key, err
}

// lintLeaf signs and lints the two forms of an end entity: with no name but its
// SPIFFE ID, and with everything a request may add.
func lintLeaf(p profiles, k Kind, iss *issuer, draw *serials, now time.Time) error {
	shape := p.leaf[k]
	path := map[Kind]string{
		Workload: "/lint", Agent: shape.prefix + "agent/lint", Server: shape.prefix + "server", Minted: "/lint", Mesh: "/lint",
	}[k]
	id, err := spiffeid.FromPath(shape.td, path)
	if err != nil {
		return fmt.Errorf("make throw-away SPIFFE ID: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("generate throw-away key: %w", err)
	}
	bare := X509Request{Kind: k, ID: id, PublicKey: key.Public(), TTL: shape.maxTTL}
	full := bare
	full.Cluster, full.DNSNames = "lint", []string{"lint.example"}
	if k == Server {
		full.IPAddresses = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	}
	for _, req := range []X509Request{bare, full} {
		l := p.plan(req, iss.cert, now)
		if l.err != nil {
			return l.err
		}
		if l.serial, err = draw.next(); err != nil {
			return err
		}
		b := batch{issuer: iss, items: []planned{l}}
		b.sign()
		if err := b.items[0].err; err != nil {
			return err
		}
		cert, err := x509.ParseCertificate(b.items[0].der)
		if err != nil {
			return fault.Wrap(fault.Internal, err, "lint_failed", "a "+shape.name+" certificate can't be parsed")
		}
		if err := errors.Join(Lint(cert, shape), cert.CheckSignatureFrom(iss.cert)); err != nil {
			return err
		}
	}
	return nil
}

func (c *lintee) extension(id asn1.ObjectIdentifier) *pkix.Extension {
	for i := range c.Extensions {
		if c.Extensions[i].Id.Equal(id) {
			return &c.Extensions[i]
		}
	}
	return nil
}

// uris are the URI names as encoded: package net/url would normalise them.
func (c *lintee) uris() []string {
	var all []string
	for _, name := range c.names {
		if name.Class == asn1.ClassContextSpecific && name.Tag == 6 {
			all = append(all, string(name.Bytes))
		}
	}
	return all
}

func complain(wrong bool, text string) string {
	if wrong {
		return text
	}
	return ""
}

func lintVersion(c *lintee) string {
	return complain(c.Version != 3, "the version is not 3")
}

// RFC 5280 section 4.1.2.2, and 64 bits that nobody can guess (X509-32).
func lintSerial(c *lintee) string {
	n := c.SerialNumber
	return complain(n.Sign() <= 0 || n.BitLen() < 64 || n.BitLen() > 159, "it is not positive, or shorter than 8 or longer than 20 bytes")
}

func lintSignatureAlgorithm(c *lintee) string {
	return complain(c.SignatureAlgorithm != x509.ECDSAWithSHA256, "it is not ECDSA with SHA-256")
}

func isNamed(raw []byte, name pkix.Name) bool {
	want, err := asn1.Marshal(name.ToRDNSequence())
	return err == nil && bytes.Equal(raw, want)
}

func lintSubject(c *lintee) string {
	if c.p.ca {
		want := issuerSubject
		if c.p.name == "root" {
			want = rootSubject
		}
		return complain(!isNamed(c.RawSubject, want), "an authority's name is not the constant one")
	}
	s := c.Subject
	if len(s.Names) > 1 || len(s.Names) != len(s.OrganizationalUnit) {
		return "an end entity's subject is more than one organizational unit"
	}
	return complain(len(s.Names) == 1 && checkCluster(s.OrganizationalUnit[0]) != nil, "the organizational unit is no name of a cluster")
}

func lintIssuer(c *lintee) string {
	want := rootSubject
	if !c.p.ca {
		want = issuerSubject
	}
	return complain(!isNamed(c.RawIssuer, want), "it is not the name of what signs this profile")
}

func lintValidityOrder(c *lintee) string {
	return complain(!c.NotBefore.Before(c.NotAfter), "it ends before it begins")
}

// The span is NotAfter minus NotBefore. Both are cut to whole seconds, which
// lets a span that is no whole number of seconds grow to the next one.
func lintValiditySpan(c *lintee) string {
	allowed := c.p.maxTTL + c.p.backdate
	if cut := allowed.Truncate(time.Second); cut < allowed {
		allowed = cut + time.Second
	}
	return complain(c.NotAfter.Sub(c.NotBefore) > allowed, "it lives longer than its profile allows")
}

func lintPublicKey(c *lintee) string {
	if key, ok := c.PublicKey.(*ecdsa.PublicKey); c.p.ca && (!ok || key.Curve != elliptic.P256()) {
		return "an authority's key is not on P-256"
	}
	return complain(checkKey(c.PublicKey) != nil, "it is of a kind that is not allowed")
}

// X509-22 to X509-25.
func lintKeyUsage(c *lintee) string {
	want := x509.KeyUsageDigitalSignature
	if c.p.ca {
		want = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	}
	return complain(c.KeyUsage != want, "it has too many or too few bits")
}

// X509-21.
func lintKeyUsageCritical(c *lintee) string {
	e := c.extension(oidKeyUsage)
	return complain(e == nil || !e.Critical, "the extension is absent or not critical")
}

// X509-26, X509-27; none on authorities, where stacks disagree (X509-28).
func lintExtKeyUsage(c *lintee) string {
	e := c.extension(oidExtKeyUsage)
	if c.p.ca {
		return complain(e != nil, "an authority has one")
	}
	want := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	return complain(e == nil || e.Critical || !slices.Equal(c.ExtKeyUsage, want) || len(c.UnknownExtKeyUsage) > 0,
		"it is not exactly server and client authentication, not critical")
}

// X509-10, X509-13.
func lintBasicConstraints(c *lintee) string {
	e := c.extension(oidBasicConstraints)
	return complain(e == nil || !e.Critical || c.IsCA != c.p.ca, "the extension is absent, not critical, or says the opposite")
}

// X509-14.
func lintPathLength(c *lintee) string {
	if c.p.name == "issuer" {
		return complain(!c.MaxPathLenZero || c.MaxPathLen != 0, "an issuer may have authorities below it")
	}
	return complain(c.BasicConstraintsValid && c.MaxPathLen >= 0, "there is a limit where none belongs")
}

func lintSubjectKeyID(c *lintee) string {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	e := c.extension(oidSubjectKeyID)
	return complain(e == nil || e.Critical || !bytes.Equal(c.SubjectKeyId, sum[:20]), "it is not the first 20 bytes of SHA-256 over the public key")
}

func lintAuthorityKeyID(c *lintee) string {
	e := c.extension(oidAuthorityKeyID)
	if c.p.name == "root" {
		return complain(e != nil && !bytes.Equal(c.AuthorityKeyId, c.SubjectKeyId), "a root names another key")
	}
	return complain(e == nil || e.Critical || len(c.AuthorityKeyId) != 20 || bytes.Equal(c.AuthorityKeyId, c.SubjectKeyId),
		"it is absent, critical, of a wrong length, or its own")
}

// X509-1.
func lintOneURI(c *lintee) string {
	return complain(len(c.uris()) != 1, "there is not exactly one URI name")
}

// ID-3 to ID-16, X509-4, X509-16, X509-17: judged on the encoded bytes.
func lintSPIFFEID(c *lintee) string {
	for _, uri := range c.uris() {
		id, err := spiffeid.FromString(uri)
		if err != nil || id.String() != uri {
			return "the URI is not a SPIFFE ID"
		}
		if err := c.p.checkID(id); err != nil {
			return "the SPIFFE ID does not belong in this profile: " + fault.SafeText(err)
		}
	}
	return ""
}

// X509-7.
func lintSANCritical(c *lintee) string {
	e := c.extension(oidSubjectAltName)
	return complain(e == nil || e.Critical != bytes.Equal(c.RawSubject, noSubject), "the extension is critical although there is a subject, or not although there is none")
}

func lintOtherNames(c *lintee) string {
	for _, name := range c.names {
		dns := name.Class == asn1.ClassContextSpecific && name.Tag == tagDNSName&0x1f
		uri := name.Class == asn1.ClassContextSpecific && name.Tag == tagURI&0x1f
		ip := name.Class == asn1.ClassContextSpecific && name.Tag == tagIPAddress&0x1f
		if !uri && (c.p.ca || !dns && (!ip || c.p.kind != Server)) {
			return "there is a name of a kind that does not belong here"
		}
	}
	return complain(name.CheckDNS(c.DNSNames) != nil, "a DNS name is no host name or is there twice")
}

// Nothing but what the profiles know: no policies, no pointers to the outside,
// no name constraints (ztunnel refuses them).
func lintExtensions(c *lintee) string {
	known := []asn1.ObjectIdentifier{oidKeyUsage, oidExtKeyUsage, oidBasicConstraints, oidSubjectKeyID, oidAuthorityKeyID, oidSubjectAltName}
	for _, e := range c.Extensions {
		if !slices.ContainsFunc(known, e.Id.Equal) {
			return "extension " + e.Id.String() + " is in no profile"
		}
	}
	return ""
}

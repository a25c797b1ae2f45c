package rpc

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
)

// maxChain bounds what a peer may make us verify.
const maxChain = 4

var (
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidExtKeyUsage    = asn1.ObjectIdentifier{2, 5, 29, 37}
)

// VerifyPeer validates chain (leaf first) as an X.509-SVID of trust domain td
// against roots at the moment now, and returns its SPIFFE ID (X509-SVID
// section 5). It is stricter than go-spiffe where that is lax: the ID is read
// from the raw bytes of the extension, and a leaf needs a path and
// digitalSignature. The error is Unauthenticated with reason svid_invalid or,
// when only time is wrong, svid_expired.
func VerifyPeer(chain []*x509.Certificate, roots *x509.CertPool, td spiffeid.TrustDomain, now time.Time) (spiffeid.ID, error) {
	id, _, err := verifyPeer(chain, roots, td, now)
	return id, err
}

// verifyPeer is VerifyPeer that also says at which root the chain ends.
func verifyPeer(chain []*x509.Certificate, roots *x509.CertPool, td spiffeid.TrustDomain, now time.Time) (spiffeid.ID, *x509.Certificate, error) {
	if len(chain) == 0 {
		return spiffeid.ID{}, nil, invalidSVID("no certificate", nil)
	}
	if len(chain) > maxChain {
		return spiffeid.ID{}, nil, invalidSVID("the chain is too long", nil)
	}
	leaf := chain[0]
	id, err := LeafID(leaf)
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	if id.TrustDomain() != td {
		return spiffeid.ID{}, nil, invalidSVID("the certificate is of another trust domain", nil)
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		if !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 {
			return spiffeid.ID{}, nil, invalidSVID("the chain holds a certificate that can't sign", nil)
		}
		intermediates.AddCert(c)
	}
	opts := x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	paths, err := leaf.Verify(opts)
	if err != nil {
		if opts.CurrentTime = lastMoment(chain); now.After(opts.CurrentTime) {
			if paths, again := leaf.Verify(opts); again == nil {
				return id, rootOf(paths), fault.Wrap(fault.Unauthenticated, err, "svid_expired", "the certificate has expired")
			}
		}
		return spiffeid.ID{}, nil, invalidSVID("the certificate does not chain to a root of its trust domain", err)
	}
	return id, rootOf(paths), nil
}

func rootOf(paths [][]*x509.Certificate) *x509.Certificate { return paths[0][len(paths[0])-1] }

// lastMoment is the last instant at which every certificate of chain is valid.
func lastMoment(chain []*x509.Certificate) time.Time {
	at := chain[0].NotAfter
	for _, c := range chain[1:] {
		if c.NotAfter.Before(at) {
			at = c.NotAfter
		}
	}
	return at
}

// LeafID returns the SPIFFE ID of an X.509-SVID leaf after checking all that
// the leaf alone shows (X509-SVID sections 2 to 5); it verifies no signature.
func LeafID(leaf *x509.Certificate) (spiffeid.ID, error) {
	switch {
	case leaf.IsCA:
		return spiffeid.ID{}, invalidSVID("a signing certificate can't be a leaf", nil)
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return spiffeid.ID{}, invalidSVID("a leaf may not have keyCertSign or cRLSign", nil)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return spiffeid.ID{}, invalidSVID("a leaf needs digitalSignature", nil)
	case hasExtKeyUsage(leaf) && !bothPurposes(leaf.ExtKeyUsage):
		return spiffeid.ID{}, invalidSVID("extended key usage must hold serverAuth and clientAuth", nil)
	}
	uri, err := onlyURI(leaf)
	if err != nil {
		return spiffeid.ID{}, err
	}
	id, err := name.ParseID(uri)
	if err != nil {
		return spiffeid.ID{}, invalidSVID("the URI is not a SPIFFE ID", err)
	}
	if id.Path() == "" {
		return spiffeid.ID{}, invalidSVID("a leaf's SPIFFE ID needs a path", nil)
	}
	return id, nil
}

// hasExtKeyUsage looks for the extension: crypto/x509 takes one without any
// usage for none.
func hasExtKeyUsage(leaf *x509.Certificate) bool {
	return len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0 ||
		slices.ContainsFunc(leaf.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidExtKeyUsage) })
}

func bothPurposes(usages []x509.ExtKeyUsage) bool {
	return slices.Contains(usages, x509.ExtKeyUsageAny) ||
		slices.Contains(usages, x509.ExtKeyUsageServerAuth) && slices.Contains(usages, x509.ExtKeyUsageClientAuth)
}

// onlyURI reads the one URI name from the raw extension: net/url would
// normalise an upper-case scheme or a bare fragment away.
func onlyURI(cert *x509.Certificate) (string, error) {
	const tagURI = 6
	uris := []string{}
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &names); err != nil || len(rest) > 0 {
			return "", invalidSVID("the subject alternative name is malformed", err)
		}
		for _, n := range names {
			if n.Class == asn1.ClassContextSpecific && n.Tag == tagURI {
				uris = append(uris, string(n.Bytes))
			}
		}
	}
	if len(uris) != 1 {
		return "", invalidSVID("an X.509-SVID has exactly one URI name", nil)
	}
	return uris[0], nil
}

func invalidSVID(rule string, cause error) error {
	return fault.Wrap(fault.Unauthenticated, cause, "svid_invalid", rule)
}

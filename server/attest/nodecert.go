package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Bounds of what a node may make us verify. With the order that parseChain
// demands, each certificate has one possible issuer in the payload, so there
// are at most maxChain signatures and one more per root of the same name; the
// slowest of them, RSA with 8192 bits, takes some milliseconds.
const (
	maxChain       = 5 // the node's own and four issuers
	maxCertificate = 8 << 10
	minRSABits     = 2048
	maxRSABits     = 8192
	// maxBundleRoots bounds the operator's own file: a bundle of every public
	// authority is no list of those that vouch for nodes.
	maxBundleRoots = 100
)

var oidExtKeyUsage = []int{2, 5, 29, 37}

// parseChain reads a node's certificates, leaf first, and holds them to all
// that can be seen without verifying a signature.
func parseChain(ders [][]byte) ([]*x509.Certificate, error) {
	if len(ders) == 0 || len(ders) > maxChain {
		return nil, because("chain_length", "%d certificates, and there may be 1 to %d", len(ders), maxChain)
	}
	for i, der := range ders {
		if len(der) > maxCertificate {
			return nil, because("certificate_too_large", "certificate %d has %d bytes, and may have %d", i, len(der), maxCertificate)
		}
	}
	chain := make([]*x509.Certificate, len(ders))
	for i, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, because("certificate_malformed", "certificate %d: %v", i, err)
		}
		if err := checkCertificate(c); err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i, err)
		}
		if i > 0 && !isCA(c) {
			return nil, because("chain_broken", "certificate %d can't sign certificates", i)
		}
		chain[i] = c
	}
	return chain, errors.Join(checkLeaf(chain[0]), checkOrder(chain))
}

// checkOrder demands that each certificate is followed by its issuer and that
// no name comes twice.
func checkOrder(chain []*x509.Certificate) error {
	for i, c := range chain[1:] {
		if !bytes.Equal(chain[i].RawIssuer, c.RawSubject) {
			return because("chain_broken", "certificate %d was not issued by certificate %d", i, i+1)
		}
		for _, before := range chain[1 : i+1] {
			if bytes.Equal(before.RawSubject, c.RawSubject) {
				return because("chain_broken", "two issuers have the same name")
			}
		}
	}
	return nil
}

// checkCertificate is what holds for every certificate.
func checkCertificate(c *x509.Certificate) error {
	for _, e := range c.Extensions {
		if e.Id.Equal(oidExtKeyUsage) && len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 {
			return because("certificate_malformed", "its extended key usage is empty")
		}
	}
	return checkKey(c)
}

func checkKey(c *x509.Certificate) error {
	switch key := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
			return because("key_not_allowed", "an RSA key of %d bits, and there may be %d to %d", bits, minRSABits, maxRSABits)
		}
		return nil
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P256() || key.Curve == elliptic.P384() || key.Curve == elliptic.P521() {
			return nil
		}
	case ed25519.PublicKey:
		return nil
	}
	return because("key_not_allowed", "a key of type %s that is not RSA, P-256, P-384, P-521 or Ed25519", c.PublicKeyAlgorithm)
}

// checkLeaf: what a node holds signs, and is no authority. No extended key
// usage is demanded, nor does SPIRE demand one: which certificates are nodes'
// is for the bundle to say.
func checkLeaf(c *x509.Certificate) error {
	const signs = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	switch {
	case c.IsCA || c.KeyUsage&signs != 0:
		return because("leaf_is_authority", "the node's certificate is an authority's")
	case c.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return because("leaf_usage", "the node's certificate is not for digitalSignature")
	}
	return nil
}

// checkNoSVID refuses X.509-SVIDs of our own trust domain. A bundle that holds
// its root by mistake would make a node of every workload.
func checkNoSVID(td spiffeid.TrustDomain, leaf *x509.Certificate) error {
	for _, u := range leaf.URIs {
		if strings.EqualFold(u.Scheme, "spiffe") && strings.EqualFold(u.Host, td.Name()) {
			return because("leaf_is_svid", "the certificate is an X.509-SVID of this trust domain, which every workload has: take its root out of attestation.x509pop.ca_bundle_file")
		}
	}
	return nil
}

func isCA(c *x509.Certificate) bool {
	return c.IsCA && c.BasicConstraintsValid && (c.KeyUsage == 0 || c.KeyUsage&x509.KeyUsageCertSign != 0)
}

// verifyChain returns the chains that lead from a parsed one to our roots.
func verifyChain(chain []*x509.Certificate, roots *x509.CertPool, now time.Time) ([][]*x509.Certificate, error) {
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	verified, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return nil, because("certificate_expired", "%v", err)
	}
	if err != nil {
		return nil, because("chain_untrusted", "%v", err)
	}
	return verified, nil
}

// fingerprint names a certificate by what its issuer signed. The signature is
// left out: of an ECDSA signature everybody can make a second valid one, and
// with it a certificate of another fingerprint, which a ban would miss.
func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.RawTBSCertificate)
	return hex.EncodeToString(sum[:])
}

// ParseNodeRoots reads the authorities whose certificates make a node, in PEM.
// Whatever else is in the file is refused: a certificate that is no
// authority's would let its holder in by being in the list.
func ParseNodeRoots(data []byte) ([]*x509.Certificate, error) {
	var roots []*x509.Certificate
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("what follows the last block is no PEM")
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("there is a block %q, and only CERTIFICATE belongs here", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(roots)+1, err)
		}
		if !isCA(c) {
			return nil, fmt.Errorf("certificate %d (%s) is not an authority's", len(roots)+1, c.Subject)
		}
		if err := checkCertificate(c); err != nil {
			return nil, fmt.Errorf("certificate %d (%s): %w", len(roots)+1, c.Subject, err)
		}
		if roots = append(roots, c); len(roots) > maxBundleRoots {
			return nil, fmt.Errorf("there are more than %d certificates", maxBundleRoots)
		}
	}
	if len(roots) == 0 {
		return nil, errors.New("there is no certificate")
	}
	return roots, nil
}

// maxWhy bounds what a stranger can have written into our log: errors of
// crypto/x509 quote names.
const maxWhy = 240

// because is why a node is refused. The reason goes into the audit log and the
// text into the log; the node sees neither.
func because(reason, format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	if len(text) > maxWhy {
		text = text[:maxWhy] + "..."
	}
	return fault.Wrap(fault.Denied, errors.New(text), reason, "the node's certificate is refused")
}

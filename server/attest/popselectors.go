package attest

import (
	"crypto/sha1" //nolint:gosec // G505: names authorities as SPIRE's selectors do; nothing is authenticated by it
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"net/url"
	"strings"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// maxPopNames bounds the selectors that a certificate can give itself.
const maxPopNames = 16

var oidCommonName = asn1.ObjectIdentifier{2, 5, 4, 3}

// popSelectors are the facts that SPIRE's attestor of the same name states:
//
//	subject:cn:<common name>
//	serialnumber:<hex>
//	ca:fingerprint:<hex>  of each authority in the verified chains: SHA-1 as
//	                      SPIRE has it, and SHA-256
//	san:<key>:<value>     of each URI x509pop://<trust domain>/<key>:<value>
//
// A certificate with a name that can't be stated, or can be read in two ways,
// is refused rather than stripped of it: an operator then sees why.
func popSelectors(td spiffeid.TrustDomain, leaf *x509.Certificate, chains [][]*x509.Certificate) (selector.Set, error) {
	values := []string{"serialnumber:" + hex.EncodeToString(leaf.SerialNumber.Bytes())}
	name, err := commonName(leaf)
	if err != nil {
		return nil, err
	}
	if name != "" {
		values = append(values, "subject:cn:"+name)
	}
	for _, chain := range chains {
		for _, c := range chain[1:] {
			old, sum := sha1.Sum(c.Raw), sha256.Sum256(c.Raw) //nolint:gosec // G401: see the import
			values = append(values, "ca:fingerprint:"+hex.EncodeToString(old[:]), "ca:fingerprint:"+hex.EncodeToString(sum[:]))
		}
	}
	names, err := popNames(td, leaf.URIs)
	if err != nil {
		return nil, err
	}
	list := make([]selector.Selector, 0, len(values)+len(names))
	for _, value := range append(values, names...) {
		s := selector.Selector{Type: agentv1.AttestorX509Pop, Value: value}
		if err := s.Check(); err != nil {
			return nil, because("name_not_allowed", "a name in the certificate makes no selector: %v", err)
		}
		if !utf8.ValidString(value) {
			return nil, because("name_not_allowed", "a name in the certificate is not UTF-8")
		}
		list = append(list, s)
	}
	return selector.NewSet(list...), nil
}

// commonName is the leaf's one common name, or none.
func commonName(leaf *x509.Certificate) (string, error) {
	count := 0
	for _, attribute := range leaf.Subject.Names {
		if attribute.Type.Equal(oidCommonName) {
			count++
		}
	}
	if count > 1 {
		return "", because("name_ambiguous", "the subject has %d common names", count)
	}
	return leaf.Subject.CommonName, nil
}

// popNames returns what the URIs of our trust domain's scheme say.
func popNames(td spiffeid.TrustDomain, uris []*url.URL) ([]string, error) {
	var names []string
	for _, u := range uris {
		if u.Scheme != agentv1.AttestorX509Pop || u.Host != td.Name() {
			continue
		}
		path, ok := strings.CutPrefix(u.Path, "/")
		key, value, both := strings.Cut(path, ":")
		if !ok || !both || key == "" || value == "" || u.String() != agentv1.AttestorX509Pop+"://"+td.Name()+"/"+path {
			return nil, because("name_not_allowed", "a URI of scheme x509pop is not x509pop://%s/<key>:<value>", td.Name())
		}
		if names = append(names, "san:"+path); len(names) > maxPopNames {
			return nil, because("name_not_allowed", "there are more than %d URIs of scheme x509pop", maxPopNames)
		}
	}
	return names, nil
}

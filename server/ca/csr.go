package ca

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"slices"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// maxCSR is the longest CSR that is looked at. Checking the signature of a
// 131 KB one costs eleven seconds of a core; below the limit, parsing costs
// microseconds, and the key is checked before its signature.
const maxCSR = 16 << 10

var (
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidExtensionRequest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}
)

// A CSR without names and attributes has one encoding around its key: version
// 0, an empty subject, the key, and an empty set of attributes.
var (
	bareHead  = []byte{0x02, 0x01, 0x00, 0x30, 0x00}
	bareTail  = []byte{0xa0, 0x00}
	noSubject = []byte{0x30, 0x00}
)

// SHA-1 is absent on purpose: package x509 still accepts it for requests.
var csrSignatures = []x509.SignatureAlgorithm{
	x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
	x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
	x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
}

// ParseCSR takes the public key out of a PKCS#10 request in DER, after proof
// that its sender holds the private key. A request says nothing else: one with
// a subject, a SAN, an extension or any attribute is refused, so that nobody
// believes such a thing was honoured. All faults are Invalid: csr_too_large,
// csr_malformed, key_not_allowed, csr_subject_forbidden, csr_san_forbidden,
// csr_extension_forbidden, csr_signature_invalid.
func ParseCSR(der []byte) (crypto.PublicKey, error) {
	if len(der) > maxCSR {
		return nil, tooLarge(der)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil || !isBare(csr) {
		return nil, explainCSR(der)
	}
	if err := checkProof(csr); err != nil {
		return nil, err
	}
	return csr.PublicKey, nil
}

// checkProof says whether the request's key may be certified, and only then
// whether the request is signed by it.
func checkProof(csr *x509.CertificateRequest) error {
	if err := checkKey(csr.PublicKey); err != nil {
		return err
	}
	if !slices.Contains(csrSignatures, csr.SignatureAlgorithm) {
		return fault.New(fault.Invalid, "csr_signature_invalid", "the CSR is signed with an algorithm that is not allowed: use SHA-256")
	}
	if err := csr.CheckSignature(); err != nil {
		return fault.Wrap(fault.Invalid, err, "csr_signature_invalid", "the CSR's signature is not by the key in it")
	}
	return nil
}

func tooLarge(der []byte) error {
	return fault.Newf(fault.Invalid, "csr_too_large", "the CSR has %d bytes: the limit is %d", len(der), maxCSR)
}

func malformed() error {
	return fault.New(fault.Invalid, "csr_malformed", "the CSR is not one PKCS#10 request in DER")
}

// isBare says whether the request is nothing but a key and its proof: exactly
// three elements, the first in the one encoding that has no names in it.
func isBare(csr *x509.CertificateRequest) bool {
	if !bytes.Equal(csr.RawTBSCertificateRequest, tlv(tagSequence, bareHead, csr.RawSubjectPublicKeyInfo, bareTail)) {
		return false
	}
	return hasThreeElements(csr)
}

func hasThreeElements(csr *x509.CertificateRequest) bool {
	var elements []asn1.RawValue
	rest, err := asn1.Unmarshal(csr.Raw, &elements)
	return err == nil && len(rest) == 0 && len(elements) == 3
}

// rawCSR is the outline of a request.
type rawCSR struct {
	Info struct {
		Version    int
		Subject    asn1.RawValue
		Key        asn1.RawValue
		Attributes []asn1.RawValue `asn1:"tag:0"`
	}
	Algorithm pkix.AlgorithmIdentifier
	Signature asn1.BitString
}

// explainCSR returns the fault for a request that ParseCSR refuses before its
// signature.
func explainCSR(der []byte) error {
	raw, err := outline(der)
	if err != nil {
		return err
	}
	switch {
	case !bytes.Equal(raw.Info.Subject.FullBytes, noSubject):
		return fault.New(fault.Invalid, "csr_subject_forbidden", "the CSR has a subject: leave it empty, the server decides the name")
	case asksForSAN(raw.Info.Attributes):
		return fault.New(fault.Invalid, "csr_san_forbidden", "the CSR asks for a subject alternative name: leave it out, the server decides the name")
	case len(raw.Info.Attributes) > 0:
		return fault.New(fault.Invalid, "csr_extension_forbidden", "the CSR asks for extensions or has attributes: leave them out, the server decides the content")
	default:
		return malformed()
	}
}

// outline takes a request apart as far as to its key, which it checks.
func outline(der []byte) (rawCSR, error) {
	var raw rawCSR
	if rest, err := asn1.Unmarshal(der, &raw); err != nil || len(rest) > 0 || raw.Info.Version != 0 {
		return rawCSR{}, malformed()
	}
	key, err := x509.ParsePKIXPublicKey(raw.Info.Key.FullBytes)
	if err != nil {
		return rawCSR{}, keyNotAllowed("it can't be read")
	}
	return raw, checkKey(key)
}

func asksForSAN(attributes []asn1.RawValue) bool {
	for _, raw := range attributes {
		var attribute struct {
			Type   asn1.ObjectIdentifier
			Values [][]pkix.Extension `asn1:"set"`
		}
		if _, err := asn1.Unmarshal(raw.FullBytes, &attribute); err != nil || !attribute.Type.Equal(oidExtensionRequest) {
			continue
		}
		for _, extensions := range attribute.Values {
			for _, e := range extensions {
				if e.Id.Equal(oidSubjectAltName) {
					return true
				}
			}
		}
	}
	return false
}

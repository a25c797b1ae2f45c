package ca

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	csrBlock = "CERTIFICATE REQUEST"
	// maxCSRText holds maxCSR bytes in base64, broken into lines.
	maxCSRText = maxCSR/48*65 + 128
)

// emptyOrganizations are the subjects that istio-agent writes although it means
// none: one organization, an empty text.
var emptyOrganizations = [][]byte{
	{0x30, 0x0b, 0x31, 0x09, 0x30, 0x07, 0x06, 0x03, 0x55, 0x04, 0x0a, 0x13, 0x00}, // PrintableString
	{0x30, 0x0b, 0x31, 0x09, 0x30, 0x07, 0x06, 0x03, 0x55, 0x04, 0x0a, 0x0c, 0x00}, // UTF8String
}

// ParseMeshCSR takes the public key out of a request as the proxies of a mesh
// send it: one PKCS#10 request in one PEM block. id is whose certificate it will
// be, by what the caller has proved. The request may name it, as its only URI
// name, or nobody; whatever else it asks for is refused as by ParseCSR, and
// another name is csr_identity_mismatch. All faults are Invalid.
func ParseMeshCSR(text []byte, id spiffeid.ID) (crypto.PublicKey, error) {
	der, err := onlyBlock(text)
	if err != nil {
		return nil, err
	}
	raw, err := outline(der)
	if err != nil {
		return nil, err
	}
	subject := raw.Info.Subject.FullBytes
	if !bytes.Equal(subject, noSubject) && !slices.ContainsFunc(emptyOrganizations, func(o []byte) bool { return bytes.Equal(subject, o) }) {
		return nil, fault.New(fault.Invalid, "csr_subject_forbidden", "the CSR has a subject: leave it empty, the server decides the name")
	}
	if len(raw.Info.Attributes) > 0 {
		san, err := onlySAN(raw.Info.Attributes)
		if err != nil {
			return nil, err
		}
		switch asked, err := readNames(san); {
		case err != nil:
			return nil, err
		case len(asked.DNSNames) > 0:
			return nil, fault.New(fault.Invalid, "csr_san_forbidden", "the CSR asks for DNS names: leave them out, a proxy's name is its SPIFFE ID")
		case asked.ID != id:
			return nil, fault.New(fault.Invalid, "csr_identity_mismatch", "the CSR names another SPIFFE ID than the caller's: ask for your own, or leave the name out")
		}
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil || !isOutlined(csr, raw) {
		return nil, malformed()
	}
	return csr.PublicKey, checkProof(csr)
}

// onlyBlock returns what is in the one PEM block that the text is.
func onlyBlock(text []byte) ([]byte, error) {
	if len(text) > maxCSRText {
		return nil, tooLarge(text)
	}
	text = bytes.TrimSpace(text)
	block, rest := pem.Decode(text)
	switch {
	case block == nil || !bytes.HasPrefix(text, []byte("-----BEGIN "+csrBlock+"-----")) || block.Type != csrBlock || len(block.Headers) > 0 || len(rest) > 0:
		return nil, fault.New(fault.Invalid, "csr_malformed", "the CSR is not one PEM block of type CERTIFICATE REQUEST with one PKCS#10 request in it")
	case len(block.Bytes) > maxCSR:
		return nil, tooLarge(block.Bytes)
	}
	return block.Bytes, nil
}

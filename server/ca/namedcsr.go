package ca

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
)

// NamedCSR is what a request of an operator says: the key, and for whom.
type NamedCSR struct {
	PublicKey crypto.PublicKey
	ID        spiffeid.ID
	DNSNames  []string
}

// ParseNamedCSR reads a PKCS#10 request in DER that says for whom the
// certificate is to be: one URI name, which is the SPIFFE ID, and maybe DNS
// names. It is for operators alone, who could register the same identity; a
// request of anybody else goes through ParseCSR. Whatever else a request can
// hold is refused as there, with the same reasons, and besides
// csr_spiffe_id_missing, spiffe_id_invalid and dns_name_invalid. An error that
// comes after the ID was read comes with it, for the audit log.
func ParseNamedCSR(der []byte) (NamedCSR, error) {
	if len(der) > maxCSR {
		return NamedCSR{}, tooLarge(der)
	}
	raw, err := outline(der)
	if err != nil {
		return NamedCSR{}, err
	}
	if !bytes.Equal(raw.Info.Subject.FullBytes, noSubject) {
		return NamedCSR{}, fault.New(fault.Invalid, "csr_subject_forbidden", "the CSR has a subject: leave it empty, the name of an SVID is its SPIFFE ID")
	}
	san, err := onlySAN(raw.Info.Attributes)
	if err != nil {
		return NamedCSR{}, err
	}
	found, err := readNames(san)
	if err != nil {
		return found, err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil || !isOutlined(csr, raw) {
		return found, malformed()
	}
	found.PublicKey = csr.PublicKey
	return found, checkProof(csr)
}

// onlySAN returns the value of the SAN extension if the request asks for that
// and for nothing else, in the one encoding that DER has for it.
func onlySAN(attributes []asn1.RawValue) ([]byte, error) {
	if len(attributes) == 0 {
		return nil, idMissing()
	}
	other := fault.New(fault.Invalid, "csr_extension_forbidden",
		"the CSR asks for more than a subject alternative name: leave other extensions and attributes out, the server decides the content")
	var asked struct {
		Type   asn1.ObjectIdentifier
		Values [][]pkix.Extension `asn1:"set"`
	}
	if _, err := asn1.Unmarshal(attributes[0].FullBytes, &asked); err != nil || len(attributes) > 1 || !asked.Type.Equal(oidExtensionRequest) ||
		len(asked.Values) != 1 || len(asked.Values[0]) != 1 || !asked.Values[0][0].Id.Equal(oidSubjectAltName) {
		return nil, other
	}
	if again, err := asn1.Marshal(asked); err != nil || !bytes.Equal(again, attributes[0].FullBytes) {
		return nil, malformed()
	}
	return asked.Values[0][0].Value, nil
}

// readNames reads the SAN extension: exactly one URI, the rest DNS names.
func readNames(san []byte) (NamedCSR, error) {
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(san, &names); err != nil || len(rest) > 0 {
		return NamedCSR{}, malformed()
	}
	var uris []string
	var found NamedCSR
	for _, n := range names {
		switch {
		case n.Class == asn1.ClassContextSpecific && n.Tag == tagURI&0x1f && !n.IsCompound:
			uris = append(uris, string(n.Bytes))
		case n.Class == asn1.ClassContextSpecific && n.Tag == tagDNSName&0x1f && !n.IsCompound:
			found.DNSNames = append(found.DNSNames, string(n.Bytes))
		default:
			return NamedCSR{}, fault.New(fault.Invalid, "csr_san_forbidden",
				"the CSR has a name that is neither URI nor DNS name: an SVID holds its SPIFFE ID, and DNS names")
		}
	}
	switch len(uris) {
	case 0:
		return NamedCSR{}, idMissing()
	case 1:
	default:
		return NamedCSR{}, fault.New(fault.Invalid, "csr_san_forbidden", "the CSR has more than one URI: an SVID has exactly one, its SPIFFE ID")
	}
	var err error
	if found.ID, err = name.ParseID(uris[0]); err != nil {
		return NamedCSR{}, err
	}
	return found, name.CheckDNS(found.DNSNames)
}

func idMissing() error {
	return fault.New(fault.Invalid, "csr_spiffe_id_missing", "the CSR has no URI name: put the SPIFFE ID there")
}

// isOutlined says whether the request is what was read of it and no more:
// exactly three elements, the first in the one encoding for its content.
func isOutlined(csr *x509.CertificateRequest, raw rawCSR) bool {
	var attributes []byte
	for _, a := range raw.Info.Attributes {
		attributes = append(attributes, a.FullBytes...)
	}
	info := tlv(tagSequence, []byte{0x02, 0x01, 0x00}, raw.Info.Subject.FullBytes, csr.RawSubjectPublicKeyInfo, tlv(0xa0, attributes))
	return bytes.Equal(csr.RawTBSCertificateRequest, info) && hasThreeElements(csr)
}

package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"time"
)

// End-entity certificates are encoded here and not by x509.CreateCertificate,
// which verifies each signature it has just made: a third of the cost of
// issuing. Roots and issuers, whose one bad signature would matter for long,
// go through package x509 and its check. The encoding is byte for byte that of
// package x509; a differential test and a fuzz test hold it there.

const (
	tagInteger         = 0x02
	tagBitString       = 0x03
	tagOctetString     = 0x04
	tagUTCTime         = 0x17
	tagGeneralizedTime = 0x18
	tagSequence        = 0x30
	tagExtensions      = 0xa3 // [3] in TBSCertificate
	tagDNSName         = 0x82 // [2] in GeneralName
	tagURI             = 0x86 // [6] in GeneralName
	tagIPAddress       = 0x87 // [7] in GeneralName
)

var (
	derVersion3 = []byte{0xa0, 0x03, 0x02, 0x01, 0x02}
	derTrue     = []byte{0x01, 0x01, 0xff}
	derZero     = []byte{0x00}

	// ecdsa-with-SHA256, RFC 5758 section 3.2: no parameters.
	derECDSAWithSHA256 = []byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02}
	derOIDSAN          = []byte{0x06, 0x03, 0x55, 0x1d, 0x11}
	derOIDSKI          = []byte{0x06, 0x03, 0x55, 0x1d, 0x0e}

	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidSubjectKeyID     = asn1.ObjectIdentifier{2, 5, 29, 14}
	oidAuthorityKeyID   = asn1.ObjectIdentifier{2, 5, 29, 35}

	oidServerAuth = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}
	oidClientAuth = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
)

// tlv encodes one DER element around the concatenation of parts.
func tlv(tag byte, parts ...[]byte) []byte {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	out := make([]byte, 0, n+6)
	out = append(out, tag)
	switch {
	case n < 0x80:
		out = append(out, byte(n))
	case n < 0x100:
		out = append(out, 0x81, byte(n))
	case n < 0x10000:
		out = append(out, 0x82, byte(n>>8), byte(n))
	default:
		out = append(out, 0x83, byte(n>>16), byte(n>>8), byte(n))
	}
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

// leafTemplate is what all certificates of one profile under one issuer share,
// already encoded.
type leafTemplate struct {
	issuer []byte // Name
	fixed  []byte // the extensions before the subject key identifier
	aki    []byte // the extension after it
}

func newLeafTemplate(p Profile, issuer *x509.Certificate) (leafTemplate, error) {
	usage, err := usageExtensions(p)
	if err != nil {
		return leafTemplate{}, err
	}
	keyID, err := asn1.Marshal(struct {
		ID []byte `asn1:"tag:0"`
	}{issuer.SubjectKeyId})
	if err != nil {
		return leafTemplate{}, fmt.Errorf("encode authority key identifier: %w", err)
	}
	aki, err := asn1.Marshal(pkix.Extension{Id: oidAuthorityKeyID, Value: keyID})
	if err != nil {
		return leafTemplate{}, fmt.Errorf("encode authority key identifier: %w", err)
	}
	return leafTemplate{issuer: issuer.RawSubject, fixed: usage, aki: aki}, nil
}

// usageExtensions encodes key usage, extended key usage and basic constraints.
func usageExtensions(p Profile) ([]byte, error) {
	var bits [2]byte
	length := 0
	for i := range 9 {
		if p.keyUsage&(1<<i) != 0 {
			bits[i/8] |= 0x80 >> (i % 8)
			length = i + 1
		}
	}
	usage, err := asn1.Marshal(asn1.BitString{Bytes: bits[:(length+7)/8], BitLength: length})
	if err != nil {
		return nil, fmt.Errorf("encode key usage: %w", err)
	}
	all := []pkix.Extension{{Id: oidKeyUsage, Critical: true, Value: usage}}
	if len(p.extKeyUsage) > 0 {
		var purposes []asn1.ObjectIdentifier
		for _, u := range p.extKeyUsage {
			switch u {
			case x509.ExtKeyUsageServerAuth:
				purposes = append(purposes, oidServerAuth)
			case x509.ExtKeyUsageClientAuth:
				purposes = append(purposes, oidClientAuth)
			default:
				return nil, fmt.Errorf("encode extended key usage: purpose %d is in no profile", u)
			}
		}
		value, err := asn1.Marshal(purposes)
		if err != nil {
			return nil, fmt.Errorf("encode extended key usage: %w", err)
		}
		all = append(all, pkix.Extension{Id: oidExtKeyUsage, Value: value})
	}
	// cA is false by default, so DER wants it left out: an empty sequence.
	all = append(all, pkix.Extension{Id: oidBasicConstraints, Critical: true, Value: noSubject})
	var out []byte
	for _, e := range all {
		der, err := asn1.Marshal(e)
		if err != nil {
			return nil, fmt.Errorf("encode extension: %w", err)
		}
		out = append(out, der...)
	}
	return out, nil
}

// tbs encodes a planned certificate up to its signature.
func (t leafTemplate) tbs(l *planned) ([]byte, error) {
	subject := noSubject
	if l.cluster != "" {
		var err error
		name := pkix.Name{OrganizationalUnit: []string{l.cluster}}
		if subject, err = asn1.Marshal(name.ToRDNSequence()); err != nil {
			return nil, fmt.Errorf("encode subject: %w", err)
		}
	}
	ski := tlv(tagSequence, derOIDSKI, tlv(tagOctetString, tlv(tagOctetString, l.spkiHash[:20])))
	return tlv(tagSequence,
		derVersion3,
		tlv(tagInteger, l.serial[:]),
		derECDSAWithSHA256,
		t.issuer,
		tlv(tagSequence, derTime(l.notBefore), derTime(l.notAfter)),
		subject,
		l.spki,
		tlv(tagExtensions, tlv(tagSequence, t.fixed, ski, t.aki, sanExtension(l))),
	), nil
}

// sanExtension is critical when there is no other name (RFC 5280 section
// 4.2.1.6, X509-7).
func sanExtension(l *planned) []byte {
	var names []byte
	for _, dns := range l.dnsNames {
		names = append(names, tlv(tagDNSName, []byte(dns))...)
	}
	for _, ip := range l.ipAddresses {
		names = append(names, tlv(tagIPAddress, ip.AsSlice())...)
	}
	names = append(names, tlv(tagURI, []byte(l.id.String()))...)
	var critical []byte
	if l.cluster == "" {
		critical = derTrue
	}
	return tlv(tagSequence, derOIDSAN, critical, tlv(tagOctetString, tlv(tagSequence, names)))
}

// derTime encodes a time as RFC 5280 section 4.1.2.5 wants it: two digits for
// the year until 2049, four from 2050 on.
func derTime(t time.Time) []byte {
	t = t.UTC()
	if year := t.Year(); year >= 1950 && year < 2050 {
		return tlv(tagUTCTime, []byte(t.Format("060102150405Z")))
	}
	return tlv(tagGeneralizedTime, []byte(t.Format("20060102150405Z")))
}

// signTBS signs an encoded certificate with an ECDSA key and SHA-256.
func signTBS(tbs []byte, key crypto.Signer) ([]byte, error) {
	digest := sha256.Sum256(tbs)
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return tlv(tagSequence, tbs, derECDSAWithSHA256, tlv(tagBitString, derZero, signature)), nil
}

package main

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"
)

// certificate and its body as encoded, for changes that no library would make.
type certificate struct {
	Body      body
	Algorithm pkix.AlgorithmIdentifier
	Signature asn1.BitString
}

type body struct {
	Version    int `asn1:"optional,explicit,default:0,tag:0"`
	Serial     *big.Int
	Algorithm  pkix.AlgorithmIdentifier
	Issuer     asn1.RawValue
	Validity   validity
	Subject    asn1.RawValue
	PublicKey  asn1.RawValue
	Extensions []pkix.Extension `asn1:"optional,explicit,tag:3"`
}

type validity struct {
	NotBefore, NotAfter asn1.RawValue
}

var (
	subjectKeyID     = asn1.ObjectIdentifier{2, 5, 29, 14}
	keyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	subjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	basicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	authorityKeyID   = asn1.ObjectIdentifier{2, 5, 29, 35}
	emptyName        = []byte{0x30, 0x00}
)

// mutant is a way to spoil a certificate, and the lint that must notice.
type mutant struct {
	what, lint string
	// spoil returns false where there is nothing to spoil.
	spoil func(b *body) bool
}

var mutants = []mutant{
	{"a serial of 21 bytes", "e_serial_number_longer_than_20_octets", func(b *body) bool {
		b.Serial = new(big.Int).Lsh(big.NewInt(1), 20*8)
		return true
	}},
	{"serial zero", "e_serial_number_not_positive", func(b *body) bool {
		b.Serial = new(big.Int)
		return true
	}},
	{"no issuer name", "e_issuer_field_empty", func(b *body) bool {
		b.Issuer = asn1.RawValue{FullBytes: emptyName}
		return true
	}},
	{"an authority without a name", "e_ca_subject_field_empty", func(b *body) bool {
		b.Subject = asn1.RawValue{FullBytes: emptyName}
		return isCA(b)
	}},
	{"a year before 2050 as GeneralizedTime", "e_wrong_time_format_pre2050", func(b *body) bool {
		century := append([]byte("20"), b.Validity.NotBefore.Bytes...)
		b.Validity.NotBefore = asn1.RawValue{Tag: asn1.TagGeneralizedTime, Bytes: century}
		return true
	}},
	{"extensions in version 1", "e_cert_extensions_version_not_3", func(b *body) bool {
		b.Version = 0
		return true
	}},
	{"another algorithm inside than outside", "e_cert_sig_alg_not_match_tbs_sig_alg", func(b *body) bool {
		b.Algorithm = pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}} // ECDSA with SHA-384
		return true
	}},
	{"the key usage twice", "e_ext_duplicate_extension", func(b *body) bool {
		e := find(b, keyUsage)
		if e != nil {
			b.Extensions = append(b.Extensions, *e)
		}
		return e != nil
	}},
	{"no subject key ID", "e_ext_subject_key_identifier_missing_ca", func(b *body) bool {
		return isCA(b) && remove(b, subjectKeyID)
	}},
	{"a critical authority key ID", "e_ext_authority_key_identifier_critical", func(b *body) bool {
		return setCritical(b, authorityKeyID, true)
	}},
	{"an authority key ID without key ID", "e_ext_authority_key_identifier_no_key_identifier", func(b *body) bool {
		e := find(b, authorityKeyID)
		if e != nil {
			e.Value = []byte{0x30, 0x03, 0x82, 0x01, 0x01} // nothing but a serial number
		}
		return e != nil
	}},
	{"basic constraints that are not critical", "e_basic_constraints_not_critical", func(b *body) bool {
		return isCA(b) && setCritical(b, basicConstraints, false)
	}},
	{"the right to sign certificates in an end entity", "e_ext_key_usage_cert_sign_without_ca", func(b *body) bool {
		e := find(b, keyUsage)
		if e == nil || isCA(b) {
			return false
		}
		e.Value = []byte{0x03, 0x02, 0x02, 0x84}
		return true
	}},
	{"key usage that is not critical", "w_ext_key_usage_not_critical", func(b *body) bool {
		return setCritical(b, keyUsage, false)
	}},
	{"names that are not critical beside an empty subject", "e_ext_san_not_critical_without_subject", func(b *body) bool {
		return string(b.Subject.FullBytes) == string(emptyName) && setCritical(b, subjectAltName, false)
	}},
	{"neither subject nor names", "e_subject_empty_without_san", func(b *body) bool {
		return string(b.Subject.FullBytes) == string(emptyName) && remove(b, subjectAltName)
	}},
	{"a relative URI", "e_ext_san_uri_relative", func(b *body) bool {
		return setNames(b, 6, "/web")
	}},
	{"a URI that is none", "e_ext_san_uri_format_invalid", func(b *body) bool {
		return setNames(b, 6, "spiffe:")
	}},
	{"an empty label in a DNS name", "e_rfc_dnsname_empty_label", func(b *body) bool {
		return !isCA(b) && setNames(b, 2, "a..example.org")
	}},
}

// apply returns the certificate spoilt, and whether there was something to spoil.
func (m mutant) apply(der []byte) ([]byte, bool, error) {
	var c certificate
	if rest, err := asn1.Unmarshal(der, &c); err != nil || len(rest) > 0 {
		return nil, false, fmt.Errorf("take apart: %w", err)
	}
	if !m.spoil(&c.Body) {
		return nil, false, nil
	}
	bad, err := asn1.Marshal(c)
	if err != nil {
		return nil, false, fmt.Errorf("put together: %w", err)
	}
	return bad, true, nil
}

func find(b *body, id asn1.ObjectIdentifier) *pkix.Extension {
	i := slices.IndexFunc(b.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(id) })
	if i < 0 {
		return nil
	}
	return &b.Extensions[i]
}

func remove(b *body, id asn1.ObjectIdentifier) bool {
	before := len(b.Extensions)
	b.Extensions = slices.DeleteFunc(b.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(id) })
	return len(b.Extensions) < before
}

func setCritical(b *body, id asn1.ObjectIdentifier, critical bool) bool {
	e := find(b, id)
	if e == nil || e.Critical == critical {
		return false
	}
	e.Critical = critical
	return true
}

// setNames makes name, of the kind that tag says, the only alternative name.
func setNames(b *body, tag int, name string) bool {
	e := find(b, subjectAltName)
	if e == nil {
		return false
	}
	value, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: []byte(name)}})
	if err != nil {
		return false
	}
	e.Value = value
	return true
}

func isCA(b *body) bool {
	e := find(b, basicConstraints)
	var value struct {
		CA bool `asn1:"optional"`
		// The path length, which is not looked at.
		MaxPathLen int `asn1:"optional,default:-1"`
	}
	if e == nil {
		return false
	}
	_, err := asn1.Unmarshal(e.Value, &value)
	return err == nil && value.CA
}

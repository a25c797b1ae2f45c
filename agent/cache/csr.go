package cache

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
)

// A CSR of this package names nobody and asks for nothing, so all of it is
// constant but the point and the signature (RFC 2986 section 4, RFC 5480). The
// standard library's encoder verifies each signature that it makes; doing
// without doubles the rate at which this node's SVIDs can be renewed. A test
// holds the result equal to the library's.
var (
	csrInfoHead = []byte{
		0x30, 98, // CertificationRequestInfo
		0x02, 1, 0, // version
		0x30, 0, // subject: empty
		0x30, 89, // SubjectPublicKeyInfo
		0x30, 19,
		0x06, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, // id-ecPublicKey
		0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, // P-256
		0x03, 66, 0,
	}
	csrInfoTail  = []byte{0xa0, 0} // attributes: none
	csrAlgorithm = []byte{0x30, 10, 0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02}
)

func newKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return key, nil
}

func csrFor(key *ecdsa.PrivateKey) ([]byte, error) {
	point, err := key.PublicKey.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	info := make([]byte, 0, 100)
	info = append(info, csrInfoHead...)
	info = append(info, point...)
	info = append(info, csrInfoTail...)
	digest := sha256.Sum256(info)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		return nil, fmt.Errorf("sign CSR: %w", err)
	}
	body := len(info) + len(csrAlgorithm) + 3 + len(signature)
	csr := make([]byte, 0, body+3)
	csr = append(csr, 0x30, 0x81, byte(body)) // 128 <= body < 256
	csr = append(csr, info...)
	csr = append(csr, csrAlgorithm...)
	csr = append(csr, 0x03, byte(len(signature)+1), 0)
	return append(csr, signature...), nil
}

func marshalKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return der, nil
}

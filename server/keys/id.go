package keys

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
)

// idBytes is the length of an authority id before it is written in hex. It is
// also the subject key identifier of the authority's certificate (RFC 7093
// section 2, method 1: the leftmost 160 bits of SHA-256).
const idBytes = 20

// ID returns the authority id of a public key: the hex of the first 20 bytes
// of SHA-256 over its SubjectPublicKeyInfo. Nothing else computes it.
func ID(pub crypto.PublicKey) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("encode public key: %w", err)
	}
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:idBytes]), nil
}

// Package attest proves nodes: each attestor turns the evidence that an agent
// sends into the agent's ID, or refuses it.
//
// It owns what evidence looks like and how it is checked. Of an agent's input
// it trusts nothing: an ID is what a record says, never what was sent. What it
// trusts is the caller for two facts: that PublicKey is the key of a CSR whose
// signature was verified, and that Export reads the TLS connection on which
// the evidence came.
//
// The order of steps is the same in all attestors: bound and read the payload,
// check its proof of possession, and only then ask the records, which decide.
// Refusals don't say which of the steps failed; their causes do, for the log.
//
// Tokens and records come through interfaces of one method; this package
// knows neither the registry nor the certificate authority.
package attest

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/selector"
)

// Evidence is what an agent brings.
type Evidence struct {
	// Payload is in the form that the attestor defines.
	Payload []byte
	// PublicKey is the key to certify; the agent proved that it holds it.
	PublicKey crypto.PublicKey
	// Export returns keying material of the TLS connection (RFC 8446
	// section 7.5).
	Export func(label string, context []byte, length int) ([]byte, error)
}

// Result is who the agent is.
type Result struct {
	AgentID   spiffeid.ID
	Selectors selector.Set
	// CanReattest says that the agent can come back in the same way, without
	// an operator.
	CanReattest bool
}

// KeyHash is the name of a public key in agents' records: the hex SHA-256 of
// its SubjectPublicKeyInfo.
func KeyHash(key crypto.PublicKey) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("encode public key: %w", err)
	}
	return spkiHash(spki), nil
}

func spkiHash(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

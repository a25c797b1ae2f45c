// Package agentv1 is the protocol between agents and servers. Most of it is
// generated from agent.proto; this file has what a .proto can't say and both
// ends must mean alike.
package agentv1

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	_ "crypto/sha512" // SHA-384 and SHA-512 of X509PopHash
	"strings"
)

// Names of attestors, in AttestRequest.Start and in agents' records.
const (
	AttestorJoinToken = "join_token" // the payload is the token
	AttestorRejoin    = "rejoin"     // the payload is a RejoinPayload
	AttestorX509Pop   = "x509pop"    // the payload is an X509PopPayload
	AttestorK8SPsat   = "k8s_psat"   // the payload is a K8SPsatPayload
)

// What both ends export from the TLS connection for a RejoinPayload (RFC 8446
// section 7.5). The context is the agent's ID.
const (
	// RejoinExporterLabel separates this use of the exporter from all others.
	RejoinExporterLabel = "EXPORTER-assay-rejoin"
	// RejoinExporterLength is in bytes.
	RejoinExporterLength = 32
)

// What both ends export from the TLS connection for an X509PopResponse. The
// context is the challenge's nonce.
const (
	X509PopExporterLabel  = "EXPORTER-assay-x509pop"
	X509PopExporterLength = 32
	// X509PopNonceLength is in bytes.
	X509PopNonceLength = 32
)

// X509PopMessage is what the key of a node's certificate signs: material
// exported from the TLS connection, the certificate in DER, and the
// SubjectPublicKeyInfo of the key that is to be certified.
//
// The key has other uses, so the message begins as a signature of TLS 1.3 does
// (RFC 8446 section 4.4.3), with a context that nothing else has. Each part is
// of a fixed length.
func X509PopMessage(exported, certificate, publicKey []byte) []byte {
	message := []byte(strings.Repeat(" ", 64) + "assay, node attestation x509pop v1\x00")
	message = append(message, exported...)
	for _, part := range [][]byte{certificate, publicKey} {
		sum := sha256.Sum256(part)
		message = append(message, sum[:]...)
	}
	return message
}

// X509PopHash is the hash under which a key of this kind signs, zero for
// Ed25519, which takes the message itself.
func X509PopHash(key crypto.PublicKey) crypto.Hash {
	switch key := key.(type) {
	case ed25519.PublicKey:
		return 0
	case *ecdsa.PublicKey:
		switch bits := key.Params().BitSize; {
		case bits > 384:
			return crypto.SHA512
		case bits > 256:
			return crypto.SHA384
		}
	}
	return crypto.SHA256
}

// Reasons of a server upon which agents act.
const (
	// ReasonAgentBanned makes an agent forget all that it has, for good.
	ReasonAgentBanned = "agent_banned"
	// ReasonAgentUnknown makes an agent attest anew.
	ReasonAgentUnknown = "agent_unknown"
	// ReasonAgentSVIDNotActive makes an agent attest anew, unless a renewed
	// certificate is what replaced the one that was refused.
	ReasonAgentSVIDNotActive = "agent_svid_not_active"
	// ReasonBindingMismatch is of a key that is another agent's.
	ReasonBindingMismatch = "binding_mismatch"
	// ReasonEntryNotAuthorized is of one item of SignX509: the entry is not, or
	// no longer, this agent's.
	ReasonEntryNotAuthorized = "entry_not_authorized"
)

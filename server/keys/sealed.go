package keys

import (
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// Type is a kind of key.
type Type string

// The kinds that can be made.
const (
	ECP256 Type = "ec-p256"
	ECP384 Type = "ec-p384"
)

const (
	// A reference is: version, authority id (20 bytes), nonce and ciphertext
	// as cipher.NewGCMWithRandomNonce writes them.
	refVersion = 1
	refHeader  = 1 + idBytes
	// aadLabel begins the additional data of every sealed key.
	aadLabel = "assay sealed authority key"
)

// Sealed keeps keys encrypted inside their references.
type Sealed struct {
	key SealKey
	td  spiffeid.TrustDomain
}

// NewSealed returns a keeper of keys for one trust domain.
func NewSealed(k SealKey, td spiffeid.TrustDomain) *Sealed {
	return &Sealed{key: k, td: td}
}

// Create makes a key and returns it with its reference. The key exists as long
// as the caller keeps the reference: store it in the commit that makes the
// authority.
func (s *Sealed) Create(_ context.Context, kt Type) (crypto.Signer, []byte, error) {
	var curve elliptic.Curve
	switch kt {
	case ECP256:
		curve = elliptic.P256()
	case ECP384:
		curve = elliptic.P384()
	default:
		return nil, nil, fault.Newf(fault.Invalid, "key_type_unknown", "key type %q is not known: use %s or %s", kt, ECP256, ECP384)
	}
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate key: %w", err)
	}
	failpoint.Hit("key_made")
	id, err := ID(key.Public())
	if err != nil {
		return nil, nil, err
	}
	rawID, err := hex.DecodeString(id)
	if err != nil {
		return nil, nil, fmt.Errorf("decode authority id: %w", err)
	}
	plain, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode key: %w", err)
	}
	defer clear(plain)
	aead, err := s.aead()
	if err != nil {
		return nil, nil, err
	}
	ref := append([]byte{refVersion}, rawID...)
	sealed := aead.Seal(ref, nil, plain, s.additional(ref)) //nolint:gosec // the cipher draws the nonce itself
	failpoint.Hit("key_sealed")
	return hide(key), sealed, nil
}

// Open returns the key behind a reference. A reference that does not open is
// damaged, belongs to another trust domain or was sealed under another key.
func (s *Sealed) Open(_ context.Context, ref []byte) (crypto.Signer, error) {
	if err := check(ref); err != nil {
		return nil, err
	}
	aead, err := s.aead()
	if err != nil {
		return nil, err
	}
	header := ref[:refHeader]
	plain, err := aead.Open(nil, nil, ref[refHeader:], s.additional(header))
	if err != nil {
		return nil, corrupt("a sealed key does not open: it was changed, or seal_key_file or trust_domain is not the one it was made with")
	}
	defer clear(plain)
	parsed, err := x509.ParsePKCS8PrivateKey(plain)
	if err != nil {
		return nil, corrupt("a sealed key opens to something that is no private key")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, corrupt("a sealed key opens to a key of a type that is never made")
	}
	id, err := ID(key.Public())
	if err != nil {
		return nil, err
	}
	if id != hex.EncodeToString(header[1:]) {
		return nil, corrupt("a sealed key is not the key of the authority it is filed under")
	}
	return hide(key), nil
}

// Destroy forgets a key. The reference is the key's only copy here, so the
// caller destroys it by dropping the reference from its record; this only
// refuses references that are not Sealed's own, whose keys would live on.
func (s *Sealed) Destroy(_ context.Context, ref []byte) error { return check(ref) }

func check(ref []byte) error {
	if len(ref) <= refHeader {
		return corrupt("a key reference is too short")
	}
	if ref[0] != refVersion {
		return fault.Newf(fault.Precondition, "store_newer",
			"a key reference has version %d, this program knows %d: use the newer program", ref[0], refVersion)
	}
	return nil
}

func (s *Sealed) aead() (cipher.AEAD, error) {
	if s.key.secret == nil {
		return nil, fault.New(fault.Precondition, "seal_key_missing", "no seal key is loaded: set seal_key_file")
	}
	block, err := aes.NewCipher(s.key.secret().wrap)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	// Random 96-bit nonces are safe for 2^32 keys; a CA makes a few a year.
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return aead, nil
}

// additional is what a ciphertext is bound to: label, version and authority id
// (the header) and trust domain, each with its length before it so that no two
// different lists of fields give the same bytes.
func (s *Sealed) additional(header []byte) []byte {
	var out []byte
	for _, field := range [][]byte{[]byte(aadLabel), header, []byte(s.td.Name())} {
		out = binary.BigEndian.AppendUint32(out, uint32(len(field)))
		out = append(out, field...)
	}
	return out
}

func corrupt(text string) error { return fault.New(fault.Precondition, "store_corrupt", text) }

// signer hides a private key from everything that prints; see SealKey.
type signer struct{ key func() *ecdsa.PrivateKey }

func hide(key *ecdsa.PrivateKey) signer {
	return signer{key: func() *ecdsa.PrivateKey { return key }}
}

func (s signer) Public() crypto.PublicKey { return s.key().Public() }

func (s signer) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return s.key().Sign(random, digest, opts)
}

// Format prints a constant text for every verb.
func (s signer) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// MarshalJSON returns a constant text.
func (s signer) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// LogValue returns a constant text.
func (s signer) LogValue() slog.Value { return slog.StringValue(redacted) }

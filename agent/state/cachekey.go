package state

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
)

const redacted = "[redacted]"

// CacheKey encrypts what this agent keeps outside of its data directory. The
// zero value holds no key and encrypts nothing.
type CacheKey struct {
	// A function: nothing that prints looks into one, also where a CacheKey in
	// another struct's unexported field is out of reach of its own formatters.
	secret func() []byte
}

// CacheKeys returns keys for sealing under the given label, derived from the
// agent's private key: the first one seals; the second, if any, belongs to the
// key before and only opens. It returns none before the agent attested.
func (s *State) CacheKeys(label string) ([]CacheKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var keys []CacheKey
	if s.identity == nil {
		return nil, nil
	}
	for _, from := range []*ecdsa.PrivateKey{s.identity.Key, s.previous} {
		if from == nil {
			continue
		}
		key, err := cacheKey(from, label)
		if err != nil {
			return nil, err
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// Resealed says that all that was sealed under label is now under key. If that
// is the newest one, the private key before is forgotten.
func (s *State) Resealed(label string, key CacheKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.identity == nil || s.previous == nil {
		return nil
	}
	newest, err := cacheKey(s.identity.Key, label)
	if err != nil || !newest.Equal(key) {
		return err
	}
	data, err := encodeIdentity(s.identity, nil)
	if err != nil {
		return err
	}
	if err := s.write(identityName, data); err != nil {
		return err
	}
	s.previous = nil
	return nil
}

func cacheKey(from *ecdsa.PrivateKey, label string) (CacheKey, error) {
	secret, err := from.Bytes() // not a copy: must not be cleared
	if err != nil {
		return CacheKey{}, fmt.Errorf("read private key: %w", err)
	}
	derived, err := hkdf.Key(sha256.New, secret, nil, "assay agent seal: "+label, 32)
	if err != nil {
		return CacheKey{}, fmt.Errorf("derive cache key: %w", err)
	}
	return CacheKey{secret: func() []byte { return derived }}, nil
}

// AEAD returns AES-256-GCM under the key, which draws its nonces itself.
func (k CacheKey) AEAD() (cipher.AEAD, error) {
	if k.secret == nil {
		return nil, errors.New("make cipher: no key")
	}
	block, err := aes.NewCipher(k.secret())
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// Equal says whether both hold the same key.
func (k CacheKey) Equal(other CacheKey) bool {
	if k.secret == nil || other.secret == nil {
		return k.secret == nil && other.secret == nil
	}
	return subtle.ConstantTimeCompare(k.secret(), other.secret()) == 1
}

// Format prints a constant text for every verb.
func (k CacheKey) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// String returns a constant text.
func (k CacheKey) String() string { return redacted }

// GoString returns a constant text.
func (k CacheKey) GoString() string { return redacted }

// MarshalJSON returns a constant text.
func (k CacheKey) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// LogValue returns a constant text.
func (k CacheKey) LogValue() slog.Value { return slog.StringValue(redacted) }

// The same for an Identity, whose text is the agent's ID.

// Format prints the ID for every verb.
func (i Identity) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(i.String())) }

// String returns the ID.
func (i Identity) String() string { return i.AgentID.String() }

// GoString returns the ID.
func (i Identity) GoString() string { return i.String() }

// MarshalJSON returns the ID; the file of an identity has a form of its own.
func (i Identity) MarshalJSON() ([]byte, error) { return json.Marshal(i.String()) }

// LogValue returns the ID.
func (i Identity) LogValue() slog.Value { return slog.StringValue(i.String()) }

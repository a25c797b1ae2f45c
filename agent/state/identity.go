package state

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// version of all files in the directory.
const version = 1

// Identity is the agent's own X.509-SVID with its key. Whoever prints, logs or
// encodes one gets the agent's ID alone.
type Identity struct {
	AgentID spiffeid.ID
	Key     *ecdsa.PrivateKey
	// Chain has the leaf first, without the root.
	Chain []*x509.Certificate
	// TokenHash is the hex of SHA-256 of the join token that was redeemed for
	// this identity or its forebears; empty for other ways in. It tells a used
	// token in the token file from a new one.
	TokenHash string
}

// NotAfter is when the identity ends.
func (i Identity) NotAfter() time.Time {
	at := i.Chain[0].NotAfter
	for _, c := range i.Chain[1:] {
		if c.NotAfter.Before(at) {
			at = c.NotAfter
		}
	}
	return at
}

// AuthorityID is the ID of the root that the chain leads to.
func (i Identity) AuthorityID() string {
	return hex.EncodeToString(i.Chain[len(i.Chain)-1].AuthorityKeyId)
}

type identityFile struct {
	Version     int      `json:"version"`
	Key         []byte   `json:"key"`
	Chain       [][]byte `json:"chain"`
	TokenHash   string   `json:"token_sha256,omitempty"`
	PreviousKey []byte   `json:"previous_key,omitempty"`
}

func encodeIdentity(id *Identity, previous *ecdsa.PrivateKey) ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(id.Key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	f := identityFile{Version: version, Key: key, TokenHash: id.TokenHash}
	for _, c := range id.Chain {
		f.Chain = append(f.Chain, c.Raw)
	}
	if previous != nil {
		if f.PreviousKey, err = x509.MarshalPKCS8PrivateKey(previous); err != nil {
			return nil, fmt.Errorf("encode previous key: %w", err)
		}
	}
	return json.Marshal(f)
}

func decodeIdentity(data []byte) (*Identity, *ecdsa.PrivateKey, error) {
	var f identityFile
	if err := decodeStrictly(data, &f); err != nil {
		return nil, nil, err
	}
	if f.Version != version {
		return nil, nil, fmt.Errorf("unknown version %d", f.Version)
	}
	id := &Identity{TokenHash: f.TokenHash}
	var err error
	if id.Key, err = parseKey(f.Key); err != nil {
		return nil, nil, err
	}
	for _, der := range f.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, fmt.Errorf("parse certificate: %w", err)
		}
		id.Chain = append(id.Chain, c)
	}
	if len(id.Chain) == 0 || !id.Key.PublicKey.Equal(id.Chain[0].PublicKey) {
		return nil, nil, errors.New("key and certificate don't belong together")
	}
	if uris := id.Chain[0].URIs; len(uris) != 1 {
		return nil, nil, errors.New("the certificate is no X.509-SVID")
	} else if id.AgentID, err = spiffeid.FromURI(uris[0]); err != nil {
		return nil, nil, err
	}
	var previous *ecdsa.PrivateKey
	if len(f.PreviousKey) > 0 {
		if previous, err = parseKey(f.PreviousKey); err != nil {
			return nil, nil, err
		}
	}
	return id, previous, nil
}

type keyFile struct {
	Version int    `json:"version"`
	Key     []byte `json:"key"`
}

func encodeKeyFile(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return json.Marshal(keyFile{Version: version, Key: der})
}

func decodeKeyFile(data []byte) (*ecdsa.PrivateKey, error) {
	var f keyFile
	if err := decodeStrictly(data, &f); err != nil {
		return nil, err
	}
	if f.Version != version {
		return nil, fmt.Errorf("unknown version %d", f.Version)
	}
	return parseKey(f.Key)
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("parse key: not PKCS#8") // the cause may show key bytes
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, errors.New("parse key: not an ECDSA P-256 key")
	}
	return ec, nil
}

// decodeStrictly refuses unknown fields and anything after the value.
func decodeStrictly(data []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return fmt.Errorf("decode: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("decode: data after the end")
	}
	return nil
}

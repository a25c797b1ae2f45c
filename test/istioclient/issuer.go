package istioclient

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Issuer makes tokens as a cluster's API server does, for tests without one: the
// server verifies them by its published keys.
type Issuer struct {
	Name string // iss
	Key  *ecdsa.PrivateKey
}

// KeyID names the issuer's key.
const KeyID = "k1"

// NewIssuer returns an issuer with a key of its own.
func NewIssuer() (*Issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return &Issuer{Name: "https://kubernetes.default.svc.cluster.local", Key: key}, err
}

// JWKS is the issuer's JSON Web Key Set.
func (i *Issuer) JWKS() ([]byte, error) {
	return json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: i.Key.Public(), KeyID: KeyID, Use: "sig"}}})
}

// Claims are those of the projected token of a pod of a ServiceAccount, for
// istio-ca.
func (i *Issuer) Claims(namespace, account string) map[string]any {
	now := time.Now()
	return map[string]any{
		"iss": i.Name, "aud": []string{"istio-ca"}, "sub": "system:serviceaccount:" + namespace + ":" + account,
		"exp": now.Add(12 * time.Hour).Unix(), "iat": now.Unix(), "nbf": now.Unix(), "jti": rand.Text(),
		"kubernetes.io": map[string]any{
			"namespace": namespace, "serviceaccount": map[string]any{"name": account, "uid": "sa-uid"},
			"pod": map[string]any{"name": account + "-1", "uid": "pod-uid"}, "node": map[string]any{"name": "node-1", "uid": "node-uid"},
		},
	}
}

// Token is one for Claims.
func (i *Issuer) Token(namespace, account string) (string, error) {
	return Sign(i.Key, KeyID, i.Claims(namespace, account))
}

// Sign makes a token of claims.
func Sign(key crypto.Signer, kid string, claims any) (string, error) {
	alg := jose.ES256
	if _, ok := key.(*rsa.PrivateKey); ok {
		alg = jose.RS256
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, nil)
	if err != nil {
		return "", err
	}
	return jwt.Signed(signer).Claims(claims).Serialize()
}

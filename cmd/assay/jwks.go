package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
)

// jwkSet is a SPIFFE bundle (SPIFFE_Trust_Domain_and_Bundle section 4). It is
// encoded here and not by go-spiffe, which writes "keys": null for an empty
// bundle and then can't read that itself.
type jwkSet struct {
	Keys        []jwk  `json:"keys"`
	Sequence    uint64 `json:"spiffe_sequence"`
	RefreshHint int64  `json:"spiffe_refresh_hint"`
}

// jwk is one X.509 authority: exactly one certificate, no kid (X509-SVID
// section 6.1).
type jwk struct {
	Use string   `json:"use"`
	Kty string   `json:"kty"`
	Crv string   `json:"crv,omitempty"`
	X   string   `json:"x,omitempty"`
	Y   string   `json:"y,omitempty"`
	N   string   `json:"n,omitempty"`
	E   string   `json:"e,omitempty"`
	X5c []string `json:"x5c"`
}

// defaultRefreshHint is five minutes, what the standard recommends to those
// who get no hint.
const defaultRefreshHint = 300

func newJWKSet(roots []*x509.Certificate, sequence uint64, refreshHint int64) (jwkSet, error) {
	if refreshHint <= 0 {
		refreshHint = defaultRefreshHint
	}
	set := jwkSet{Keys: []jwk{}, Sequence: sequence, RefreshHint: refreshHint}
	for _, root := range roots {
		key, err := newJWK(root)
		if err != nil {
			return jwkSet{}, err
		}
		set.Keys = append(set.Keys, key)
	}
	return set, nil
}

func newJWK(root *x509.Certificate) (jwk, error) {
	key := jwk{Use: "x509-svid", X5c: []string{base64.StdEncoding.EncodeToString(root.Raw)}}
	switch pub := root.PublicKey.(type) {
	case *ecdsa.PublicKey:
		point, err := pub.Bytes() // 4, then both coordinates in full width (RFC 7518 section 6.2)
		if err != nil {
			return jwk{}, fmt.Errorf("encode key: %w", err)
		}
		size := (len(point) - 1) / 2
		key.Kty, key.Crv = "EC", pub.Curve.Params().Name
		key.X = base64.RawURLEncoding.EncodeToString(point[1 : 1+size])
		key.Y = base64.RawURLEncoding.EncodeToString(point[1+size:])
	case *rsa.PublicKey:
		key.Kty = "RSA"
		key.N = base64.RawURLEncoding.EncodeToString(pub.N.Bytes())
		key.E = base64.RawURLEncoding.EncodeToString(big.NewInt(int64(pub.E)).Bytes())
	default:
		return jwk{}, fmt.Errorf("encode key: no JWK form for %T", pub)
	}
	return key, nil
}

var errNoRoots = errors.New("holds no X.509 root")

// parseBundle reads a file of roots: PEM certificates, or a SPIFFE bundle.
func parseBundle(data []byte) ([]*x509.Certificate, error) {
	if trimmed := bytes.TrimLeft(data, " \t\r\n"); len(trimmed) > 0 && trimmed[0] == '{' {
		return parseJWKSet(trimmed)
	}
	roots, err := parsePEM(data)
	if err != nil {
		return nil, err
	}
	if len(roots) == 0 {
		return nil, errNoRoots
	}
	return roots, nil
}

// parseJWKSet reads the X.509 roots of a SPIFFE bundle, element by element: one
// that is of no use is ignored and does not spoil the others (sections 4.1.3
// and 4.2; X509-SVID section 6.2).
func parseJWKSet(data []byte) ([]*x509.Certificate, error) {
	var set struct {
		Keys *[]json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, errors.New("is not JSON of a SPIFFE bundle")
	}
	if set.Keys == nil {
		return nil, errors.New("is JSON without an array of keys")
	}
	roots := []*x509.Certificate{}
	for _, raw := range *set.Keys {
		var key jwk
		if err := json.Unmarshal(raw, &key); err != nil || key.Use != "x509-svid" || len(key.X5c) == 0 {
			continue
		}
		if key.Kty != "EC" && key.Kty != "RSA" {
			continue
		}
		der, err := base64.StdEncoding.DecodeString(key.X5c[0])
		if err != nil {
			continue
		}
		if root, err := x509.ParseCertificate(der); err == nil {
			roots = append(roots, root)
		}
	}
	if len(roots) == 0 {
		return nil, errNoRoots
	}
	return roots, nil
}

// parsePEM returns the certificates of a PEM file in their order. Other blocks,
// such as the key in a combined file, are passed over.
func parsePEM(data []byte) ([]*x509.Certificate, error) {
	certs := []*x509.Certificate{}
	for len(data) > 0 {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		data = rest
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("holds a malformed certificate: %w", err)
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

func certificatesPEM(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

package ca

import (
	"crypto"
	"crypto/dsa" //nolint:staticcheck // a key type that must be refused
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"math/big"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

var p384 = func() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}()

// odd returns an odd number of exactly bits bits without small factors.
func odd(t testing.TB, bits int) *big.Int {
	t.Helper()
	for {
		n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(bits)))
		if err != nil {
			t.Fatal(err)
		}
		n.SetBit(n, bits-1, 1).SetBit(n, 0, 1)
		if !hasSmallFactor(n) && !looksLikeROCA(n) {
			return n
		}
	}
}

// roca builds a modulus with the mark of CVE-2017-15361: a power of 65537
// modulo the product of the small primes.
func roca(t testing.TB) *big.Int {
	t.Helper()
	product := big.NewInt(1)
	for _, p := range smallPrimes {
		product.Mul(product, new(big.Int).SetUint64(p))
	}
	residue := new(big.Int).Exp(big.NewInt(65537), big.NewInt(123456789), product)
	n := odd(t, 2048)
	n.Sub(n, new(big.Int).Mod(n, product)).Add(n, residue)
	if n.Bit(0) == 0 {
		n.Add(n, product) // the product is odd
	}
	return n
}

// NEG-5, NEG-6
func TestKeysThatAreNotAllowed(t *testing.T) {
	curve := func(c elliptic.Curve) crypto.PublicKey {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key.Public()
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := odd(t, 2048)
	for name, pub := range map[string]crypto.PublicKey{
		"nil":              nil,
		"a string":         "key",
		"P-224":            curve(elliptic.P224()),
		"P-521":            curve(elliptic.P521()),
		"Ed25519":          ed,
		"DSA":              &dsa.PublicKey{},
		"off the curve":    &ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}, //nolint:staticcheck // so it must be made by hand
		"infinity":         &ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int), Y: new(big.Int)},   //nolint:staticcheck // so it must be made by hand
		"RSA 1024":         &rsa.PublicKey{N: odd(t, 1024), E: 65537},
		"RSA 2047":         &rsa.PublicKey{N: odd(t, 2047), E: 65537},
		"RSA 4097":         &rsa.PublicKey{N: odd(t, 4097), E: 65537},
		"RSA 32768":        &rsa.PublicKey{N: odd(t, 32768), E: 65537},
		"RSA e=1":          &rsa.PublicKey{N: good, E: 1},
		"RSA e=3":          &rsa.PublicKey{N: good, E: 3},
		"RSA even e":       &rsa.PublicKey{N: good, E: 65538},
		"RSA negative e":   &rsa.PublicKey{N: good, E: -65537},
		"RSA no modulus":   &rsa.PublicKey{E: 65537},
		"RSA even modulus": &rsa.PublicKey{N: new(big.Int).Lsh(good, 1), E: 65537},
		"RSA factor 167":   &rsa.PublicKey{N: new(big.Int).Mul(good, big.NewInt(167)), E: 65537},
		"RSA ROCA":         &rsa.PublicKey{N: roca(t), E: 65537},
	} {
		if err := checkKey(pub); fault.ReasonOf(err) != "key_not_allowed" || fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: got %v, want key_not_allowed", name, err)
		}
	}
	for name, pub := range map[string]crypto.PublicKey{
		"P-256": curve(elliptic.P256()), "P-384": curve(elliptic.P384()),
		"RSA 2048": &rsa.PublicKey{N: good, E: 65537}, "RSA 4096": &rsa.PublicKey{N: odd(t, 4096), E: 65539},
	} {
		if err := checkKey(pub); err != nil {
			t.Errorf("%s: refused: %v", name, err)
		}
	}
}

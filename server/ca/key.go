package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"math/big"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	minRSABits = 2048
	maxRSABits = 4096
	// minRSAExponent is F4; smaller ones invite padding attacks.
	minRSAExponent = 65537
)

// checkKey says whether a public key may be certified: EC P-256 or P-384, or a
// sound RSA key of 2048 to 4096 bits. It costs microseconds whatever the key,
// so it comes before anything is computed with the key.
func checkKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return keyNotAllowed("the curve is not P-256 or P-384")
		}
		// The method refuses points that are not on the curve, and infinity.
		if _, err := k.ECDH(); err != nil {
			return keyNotAllowed("the point is not on its curve")
		}
		return nil
	case *rsa.PublicKey:
		return checkRSA(k)
	case nil:
		return keyNotAllowed("the algorithm is not known")
	default:
		return keyNotAllowed("the algorithm is neither ECDSA nor RSA")
	}
}

func checkRSA(k *rsa.PublicKey) error {
	if k.N == nil || k.N.Sign() <= 0 {
		return keyNotAllowed("the RSA modulus is not positive")
	}
	if bits := k.N.BitLen(); bits < minRSABits || bits > maxRSABits {
		return fault.Newf(fault.Invalid, "key_not_allowed", "an RSA key of %d bits is not allowed: use %d to %d bits, or EC P-256", bits, minRSABits, maxRSABits)
	}
	if k.E < minRSAExponent || k.E%2 == 0 {
		return keyNotAllowed("the RSA exponent is even or less than 65537")
	}
	if hasSmallFactor(k.N) {
		return keyNotAllowed("the RSA modulus has a small factor")
	}
	if looksLikeROCA(k.N) {
		return keyNotAllowed("the RSA modulus comes from a broken generator (CVE-2017-15361)")
	}
	return nil
}

func keyNotAllowed(why string) error {
	return fault.New(fault.Invalid, "key_not_allowed", "the public key is not allowed: "+why+"; use EC P-256")
}

// smallPrimes are the odd primes below 168: those by which the generator of
// CVE-2017-15361 gives itself away, which also serve as trial divisors.
var smallPrimes = [...]uint64{
	3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97,
	101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167,
}

func hasSmallFactor(n *big.Int) bool {
	if n.Bit(0) == 0 {
		return true
	}
	for _, p := range smallPrimes {
		if residue(n, p) == 0 {
			return true
		}
	}
	return false
}

// looksLikeROCA tells moduli of the broken generator: modulo every small prime
// they are a power of 65537. An honest modulus passes for one once in 2^27.
func looksLikeROCA(n *big.Int) bool {
	for _, p := range smallPrimes {
		if !isPowerOf(65537%p, residue(n, p), p) {
			return false
		}
	}
	return true
}

func residue(n *big.Int, p uint64) uint64 {
	return new(big.Int).Mod(n, new(big.Int).SetUint64(p)).Uint64()
}

// isPowerOf says whether r is a power of g modulo the prime p.
func isPowerOf(g, r, p uint64) bool {
	x := uint64(1)
	for range p {
		if x == r {
			return true
		}
		x = x * g % p
	}
	return false
}

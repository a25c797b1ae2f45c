package cache

import (
	"crypto/ecdsa"
	"time"
)

// Groups returns how many groups a cache keeps.
func Groups(c *Cache) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.groups)
}

// SampleSealed is the content of a sealed file.
func SampleSealed() []byte {
	return sealed{
		agentID: "spiffe://example.org/assay/agent/x", epoch: "e", revision: 7, lastSync: time.Unix(1, 2),
		records: []sealedRecord{
			{wire: []byte{1, 2}, committed: time.Unix(3, 4)},
			{wire: []byte{5}, svid: &SVID{CertificatesDER: []byte{6}, Key: NewPrivateKey([]byte{7}), NotAfter: time.Unix(8, 0), renewAt: time.Unix(9, 0), life: time.Hour, AuthorityID: "a"}},
		},
	}.encode()
}

// RoundTripSealed decodes and encodes.
func RoundTripSealed(data []byte) ([]byte, bool) {
	s, err := decodeSealed(data)
	if err != nil {
		return nil, false
	}
	return s.encode(), true
}

// CSRFor makes a CSR.
func CSRFor(key *ecdsa.PrivateKey) ([]byte, error) { return csrFor(key) }

// Tick is what the clock makes a cache do when it shows at: a bubble's clock
// can't be set back.
func Tick(c *Cache, at time.Time) { c.tick(at) }

package ca

import (
	"crypto/sha256"
	"encoding/binary"
)

// sequenceKey names the record of the bundle's sequence number.
const sequenceKey = "bundle/sequence"

// sequenceRecord numbers the states that the set of authorities has been in.
// It is written in the same commit as any change of a state and by nothing
// else; its digest makes every authority that was added, removed or put back
// into an older state show.
type sequenceRecord struct {
	Sequence uint64 `json:"sequence"`
	Digest   []byte `json:"digest"`
}

// nextSequence returns the record that follows last (zero before the first
// authority) for the given authorities, sorted by id.
func nextSequence(last uint64, authorities []*authority) sequenceRecord {
	return sequenceRecord{Sequence: last + 1, Digest: digestStates(authorities)}
}

// digestStates is SHA-256 over all (authority id, state), each field with its
// length before it.
func digestStates(authorities []*authority) []byte {
	h := sha256.New()
	field := func(s string) {
		var length [4]byte
		binary.BigEndian.PutUint32(length[:], uint32(len(s)))
		h.Write(length[:])
		h.Write([]byte(s))
	}
	field("assay authority states v1")
	for _, a := range authorities {
		field(a.record.ID)
		field(string(a.record.State))
	}
	return h.Sum(nil)
}

package ca

import (
	"io"
	"math/big"
	"sync"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// serialBytes is the length of every serial. 126 of its bits are random, so
// two equal ones never occur and no list of used ones is kept; RFC 5280
// section 4.1.2.2 allows up to 20 bytes and wants a positive number.
const serialBytes = 16

// maxDraws bounds the tries against a random source that misbehaves.
const maxDraws = 3

type serial [serialBytes]byte

func (s serial) bigInt() *big.Int { return new(big.Int).SetBytes(s[:]) }

// serials draws serial numbers. It can't tell a bad random source from a good
// one, but refuses the two faults that show: a failing read, and a draw that is
// all zero or equal to the one before.
type serials struct {
	random io.Reader

	mu   sync.Mutex
	last serial
}

func (s *serials) next() (serial, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for range maxDraws {
		var drawn serial
		if _, err := io.ReadFull(s.random, drawn[:]); err != nil || drawn == (serial{}) {
			continue
		}
		// The first byte is 0x40 to 0x7f: positive and of constant length.
		drawn[0] = drawn[0]&0x3f | 0x40
		if drawn == s.last {
			continue
		}
		s.last = drawn
		return drawn, nil
	}
	return serial{}, fault.New(fault.NotReady, "serial_unavailable", "the random source gives no usable serial number: restart the server, and check the machine if it happens again")
}

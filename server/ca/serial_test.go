package ca

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// draws gives prepared reads, then fails.
type draws [][]byte

func (d *draws) Read(p []byte) (int, error) {
	if len(*d) == 0 {
		return 0, errors.New("no more")
	}
	next := (*d)[0]
	*d = (*d)[1:]
	return copy(p, next), nil
}

func full(b byte) []byte { return bytes.Repeat([]byte{b}, serialBytes) }

// NEG-10: a source that repeats itself, gives zeros or fails is tried three
// times, then refused.
func TestSerialRefusesABadSource(t *testing.T) {
	s := &serials{random: &draws{full(1), full(1), full(0), full(2)}}
	first, err := s.next()
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.next()
	if err != nil {
		t.Fatalf("two bad draws were not survived: %v", err)
	}
	if first == second {
		t.Error("one serial was given twice")
	}
	_, err = s.next()
	wantReason(t, err, fault.NotReady, "serial_unavailable")

	s = &serials{random: &draws{full(1), full(1), full(1), full(1), full(2)}}
	if _, err := s.next(); err != nil {
		t.Fatal(err)
	}
	_, err = s.next()
	wantReason(t, err, fault.NotReady, "serial_unavailable")
}

// NEG-10, X509-32: positive, of constant length, 126 bits free, no duplicates.
func TestMillionSerials(t *testing.T) {
	s := &serials{random: rand.Reader}
	seen := make(map[serial]struct{}, 1_000_000)
	var ones, zeros serial
	for range 1_000_000 {
		n, err := s.next()
		if err != nil {
			t.Fatal(err)
		}
		if n[0] < 0x40 || n[0] > 0x7f {
			t.Fatalf("serial %x begins with %02x", n, n[0])
		}
		for i, b := range n {
			ones[i] |= b
			zeros[i] |= ^b
		}
		seen[n] = struct{}{}
	}
	if len(seen) != 1_000_000 {
		t.Errorf("%d duplicates", 1_000_000-len(seen))
	}
	free := 0
	for i := range ones {
		for bit := range 8 {
			if ones[i]>>bit&1 == 1 && zeros[i]>>bit&1 == 1 {
				free++
			}
		}
	}
	if free != 126 {
		t.Errorf("%d bits vary, want 126", free)
	}
	if n := (serial{0x7f}).bigInt(); n.Sign() <= 0 || len(n.Bytes()) != serialBytes {
		t.Errorf("serial became %v", n)
	}
}

func TestFailingSerialSignsNothing(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	a.serials = &serials{random: io.LimitReader(rand.Reader, 0)}
	signer := count(a)
	before := len(w.audit.taken("x509_svid.issue"))
	_, err := a.IssueX509(t.Context(), w.origin(), []X509Request{workload("/w")})
	wantReason(t, err, fault.NotReady, "serial_unavailable")
	if signer.n.Load() != 0 || len(w.audit.taken("x509_svid.issue")) != before {
		t.Error("something was signed or audited")
	}
}

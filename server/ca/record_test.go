package ca

import (
	"bytes"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/keys"
)

func testStamp(t testing.TB) stamp {
	t.Helper()
	k, err := keys.NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	return stamp{mac: k.MAC}
}

func TestRecordRoundTrip(t *testing.T) {
	s := testStamp(t)
	want := authorityRecord{
		ID: "<&>", State: Active, Certificate: []byte{1}, KeyRef: []byte{2}, CreatedAt: time.Unix(1, 2).UTC(),
		Marks: marks{Stream: time.Unix(3, 0).UTC()},
	}
	value, err := s.seal("key", want)
	if err != nil {
		t.Fatal(err)
	}
	var got authorityRecord
	if err := s.open("key", value, &got); err != nil {
		t.Fatal(err)
	}
	if got.ID != want.ID || !bytes.Equal(got.KeyRef, want.KeyRef) || !got.CreatedAt.Equal(want.CreatedAt) || !got.Marks.Stream.Equal(want.Marks.Stream) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if err := s.open("another key", value, &got); fault.ReasonOf(err) != "store_corrupt" {
		t.Errorf("under another name: got %v", err)
	}
	if err := testStamp(t).open("key", value, &got); fault.ReasonOf(err) != "store_corrupt" {
		t.Errorf("under another MAC key: got %v", err)
	}
}

// Only the very bytes that were written open.
func FuzzOnlyWhatWasSealedOpens(f *testing.F) {
	s := testStamp(f)
	value, err := s.seal(sequenceKey, sequenceRecord{Sequence: 7, Digest: []byte("digest")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(value[:len(value)-1])
	f.Add(append(bytes.Clone(value), '\n'))
	f.Add([]byte("\x01{}"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, changed []byte) {
		if bytes.Equal(changed, value) {
			return
		}
		var body sequenceRecord
		err := s.open(sequenceKey, changed, &body)
		if reason := fault.ReasonOf(err); reason != "store_corrupt" && reason != "store_newer" {
			t.Fatalf("got %v", err)
		}
		if body.Sequence != 0 || body.Digest != nil {
			t.Fatal("something was decoded from a record that fails its check")
		}
	})
}

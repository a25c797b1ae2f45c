package backup

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash"
	"io"
	"iter"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// Reader reads a backup.
type Reader struct {
	header Header
	in     *summing
	mac    MAC
}

// NewReader reads the header of a backup. Like the records, it is not to be
// trusted before Records has come to its end.
func NewReader(r io.Reader, mac MAC) (*Reader, error) {
	in := &summing{r: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
	b := &Reader{in: in, mac: mac}
	start, err := in.bytes(len(magic))
	if err != nil || string(start) != magic {
		return nil, damaged("it is not one that this program can read")
	}
	text, err := in.line(maxHeader)
	if err != nil {
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&b.header); err != nil || b.header.Revision < 1 {
		return nil, damaged("its header can't be read")
	}
	return b, nil
}

// Header is what the file says of itself.
func (b *Reader) Header() Header { return b.header }

// Records yields every record, once. If the file is not whole, or was not
// written by a server with this seal key, the last pair has the error: before
// it is known that there is none, nothing that came before it counts.
func (b *Reader) Records() iter.Seq2[store.Record, error] {
	return func(yield func(store.Record, error) bool) {
		for n := uint64(0); ; n++ {
			rec, last, err := b.next()
			if err == nil && last {
				err = b.end(n)
			}
			if err != nil {
				yield(store.Record{}, err)
				return
			}
			if last || !yield(rec, nil) {
				return
			}
		}
	}
}

// next reads a record, or the empty key behind the last.
func (b *Reader) next() (rec store.Record, last bool, err error) {
	key, err := b.in.sized(store.MaxKeyBytes)
	if err != nil || len(key) == 0 {
		return rec, true, err
	}
	rec.Key = string(key)
	revision, err := b.in.number()
	if err != nil {
		return rec, false, err
	}
	if revision == 0 || revision > uint64(b.header.Revision) {
		return rec, false, damaged("a record has a revision that it can't have")
	}
	rec.Revision = int64(revision)
	rec.Value, err = b.in.sized(maxValue)
	return rec, false, err
}

// end checks what stands behind the last record.
func (b *Reader) end(records uint64) error {
	count, err := b.in.number()
	if err != nil {
		return err
	}
	if count != records {
		return damaged("records are missing")
	}
	want := b.in.sum.Sum(nil)
	digest, err := b.in.bytes(len(want))
	if err != nil {
		return err
	}
	if !bytes.Equal(digest, want) {
		return damaged("its checksum does not match")
	}
	wantMAC := b.mac(macName, want)
	got, err := b.in.bytes(len(wantMAC))
	if err != nil {
		return err
	}
	if !hmac.Equal(got, wantMAC) {
		return fault.New(fault.Precondition, "backup_seal_key",
			"seal_key_file is not the key of the server that wrote this backup, or somebody else wrote it: nothing was changed; put that server's seal key in place")
	}
	if _, err := b.in.r.ReadByte(); !errors.Is(err, io.EOF) {
		return damaged("it goes on behind its end")
	}
	return nil
}

// summing reads numbers and texts and sums up all that it read.
type summing struct {
	r   *bufio.Reader
	sum hash.Hash
}

// ReadByte is there for binary.ReadUvarint.
func (s *summing) ReadByte() (byte, error) {
	c, err := s.r.ReadByte()
	if err == nil {
		s.sum.Write([]byte{c})
	}
	return c, err
}

func (s *summing) number() (uint64, error) {
	n, err := binary.ReadUvarint(s)
	if err != nil {
		return 0, cut(err)
	}
	return n, nil
}

func (s *summing) bytes(n int) ([]byte, error) {
	b := make([]byte, n)
	if _, err := io.ReadFull(s.r, b); err != nil {
		return nil, cut(err)
	}
	s.sum.Write(b)
	return b, nil
}

func (s *summing) sized(limit uint64) ([]byte, error) {
	n, err := s.number()
	if err != nil {
		return nil, err
	}
	if n > limit {
		return nil, damaged("a part of it is longer than any can be")
	}
	return s.bytes(int(n))
}

// line reads up to a newline, which is not returned.
func (s *summing) line(limit int) ([]byte, error) {
	var line []byte
	for len(line) <= limit {
		c, err := s.ReadByte()
		if err != nil {
			return nil, cut(err)
		}
		if c == '\n' {
			return line, nil
		}
		line = append(line, c)
	}
	return nil, damaged("its header can't be read")
}

// cut words an error of reading: a file that ends too early, or a disk.
func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("it ends too early")
	}
	return fault.Wrap(fault.NotReady, err, "backup_unreadable", "the backup can't be read: look at its disk")
}

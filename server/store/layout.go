package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"
)

// What the bolt file looks like: bucket "meta" has one item, the head; bucket
// "records" has the records by their keys. Every item ends in a checksum over
// its key and all before it, because bbolt has checksums for its two meta
// pages only. The head also has the number of records and the sum of their
// checksums: it gives away a page that a disk lost, or gave back as it was.
//
//	head    format(1) revision(8) time of the last commit(8)
//	        records(8) sum of their checksums(8) checksum(4)
//	record  revision(8) value checksum(4)
//
// Numbers are big-endian, the time is in nanoseconds since 1970.
const (
	format = 1

	metaBucket    = "meta"
	recordsBucket = "records"
	headKey       = "head"

	headBytes     = 1 + 4*8
	revisionBytes = 8
	checksumBytes = 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A damage says what is wrong with a file or an item of it.
type damage struct {
	text  string
	cause error
}

func (d *damage) Error() string { return d.text }

func (d *damage) Unwrap() error { return d.cause }

func damaged(text string, args ...any) error { return &damage{text: fmt.Sprintf(text, args...)} }

// errNewer says that the file was written by a newer program.
var errNewer = errors.New("the format of the file is newer than this program")

type head struct {
	revision int64
	time     time.Time
	tally    tally
}

// tally is a digest of all records that can be kept up to date record by
// record.
type tally struct{ records, sum uint64 }

func (t *tally) add(item []byte) {
	t.records++
	t.sum += itemChecksum(item)
}

func (t *tally) remove(item []byte) {
	t.records--
	t.sum -= itemChecksum(item)
}

// itemChecksum is the one that unseal has found to be right.
func itemChecksum(item []byte) uint64 {
	return uint64(binary.BigEndian.Uint32(item[len(item)-checksumBytes:]))
}

func (h head) encode() []byte {
	b := make([]byte, 0, headBytes+checksumBytes)
	b = append(b, format)
	b = binary.BigEndian.AppendUint64(b, uint64(h.revision))
	b = binary.BigEndian.AppendUint64(b, uint64(h.time.UnixNano()))
	b = binary.BigEndian.AppendUint64(b, h.tally.records)
	b = binary.BigEndian.AppendUint64(b, h.tally.sum)
	return seal(headKey, b)
}

func decodeHead(item []byte) (head, error) {
	b, err := unseal([]byte(headKey), item)
	if err != nil {
		return head{}, err
	}
	if len(b) > 0 && b[0] > format {
		return head{}, errNewer
	}
	if len(b) != headBytes || b[0] != format {
		return head{}, damaged("the head is malformed")
	}
	h := head{
		revision: int64(binary.BigEndian.Uint64(b[1:])),
		time:     time.Unix(0, int64(binary.BigEndian.Uint64(b[9:]))),
		tally:    tally{binary.BigEndian.Uint64(b[17:]), binary.BigEndian.Uint64(b[25:])},
	}
	if h.revision < 1 {
		return head{}, damaged("the head has revision %d", h.revision)
	}
	return h, nil
}

func encodeRecord(key string, revision int64, value []byte) []byte {
	b := make([]byte, 0, revisionBytes+len(value)+checksumBytes)
	b = binary.BigEndian.AppendUint64(b, uint64(revision))
	return seal(key, append(b, value...))
}

// decodeRecord returns a record's revision and its value, which shares memory
// with the item.
func decodeRecord(key, item []byte) (revision int64, value []byte, err error) {
	b, err := unseal(key, item)
	if err != nil {
		return 0, nil, err
	}
	if len(b) < revisionBytes {
		return 0, nil, damaged("a record is too short")
	}
	revision = int64(binary.BigEndian.Uint64(b))
	if revision < 1 {
		return 0, nil, damaged("a record has revision %d", revision)
	}
	return revision, b[revisionBytes:], nil
}

// seal appends the checksum of key and body to body.
func seal(key string, body []byte) []byte {
	return binary.BigEndian.AppendUint32(body, checksum([]byte(key), body))
}

func unseal(key, item []byte) ([]byte, error) {
	n := len(item) - checksumBytes
	if n < 0 || checksum(key, item[:n]) != binary.BigEndian.Uint32(item[n:]) {
		return nil, damaged("the checksum of an item does not match")
	}
	return item[:n], nil
}

func checksum(key, body []byte) uint32 {
	return crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, body)
}

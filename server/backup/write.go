package backup

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/seed-caa81108/assay/server/store"
)

// source is a store that shows its content as of one moment.
type source interface {
	Snapshot(ctx context.Context, begin func(store.Moment) error, visit func(store.Record) error) error
}

// Write writes a backup of src to w, which should be a disk or memory: a commit
// of the store may have to wait for it. Revision and TakenAt of h are filled
// in; the whole header is returned with the number of records.
func Write(ctx context.Context, w io.Writer, src source, h Header, mac MAC) (Header, uint64, error) {
	sum := sha256.New()
	buf := bufio.NewWriterSize(w, 64<<10)
	e := &encoder{w: io.MultiWriter(buf, sum)}
	var records uint64
	err := src.Snapshot(ctx, func(at store.Moment) error {
		h.Revision, h.TakenAt = at.Revision, time.Now().UTC().Truncate(time.Second)
		return e.header(h)
	}, func(r store.Record) error {
		records++
		return e.record(r)
	})
	if err == nil {
		err = e.end(records)
	}
	if err == nil {
		err = finish(buf, sum, mac)
	}
	if err != nil {
		return Header{}, 0, fmt.Errorf("write backup: %w", err)
	}
	return h, records, nil
}

func finish(w *bufio.Writer, sum hash.Hash, mac MAC) error {
	digest := sum.Sum(nil)
	if _, err := w.Write(append(digest, mac(macName, digest)...)); err != nil {
		return err
	}
	return w.Flush()
}

type encoder struct {
	w   io.Writer
	buf []byte
}

func (e *encoder) header(h Header) error {
	text, err := json.Marshal(h)
	if err != nil {
		return err
	}
	e.buf = append(append(append(e.buf[:0], magic...), text...), '\n')
	return e.flush()
}

func (e *encoder) record(r store.Record) error {
	e.buf = binary.AppendUvarint(e.buf[:0], uint64(len(r.Key)))
	e.buf = append(e.buf, r.Key...)
	e.buf = binary.AppendUvarint(e.buf, uint64(r.Revision))
	e.buf = binary.AppendUvarint(e.buf, uint64(len(r.Value)))
	e.buf = append(e.buf, r.Value...)
	return e.flush()
}

func (e *encoder) end(records uint64) error {
	e.buf = binary.AppendUvarint(binary.AppendUvarint(e.buf[:0], 0), records)
	return e.flush()
}

func (e *encoder) flush() error {
	_, err := e.w.Write(e.buf)
	return err
}

package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// digest is the SHA-256 of a line's bytes, its newline not included. The first
// line of a log has the zero digest before it.
type digest [sha256.Size]byte

// link is what a line says about its place in the chain.
type link struct {
	seq      uint64
	prev     digest
	revision int64 // of the store when it was written, at least; zero if it does not say
}

var (
	errNotALine = errors.New("not a line of an audit log")
	errTooLong  = errors.New("longer than any line of an audit log")
)

// parseLink reads a line's place in the chain. It asks for nothing else, so
// that a line of a newer version is still a line.
func parseLink(line []byte) (link, error) {
	var raw struct {
		Seq           uint64 `json:"seq"`
		PrevHash      string `json:"prev_hash"`
		StoreRevision int64  `json:"store_revision"`
		Audit         bool   `json:"audit"`
	}
	if err := json.Unmarshal(line, &raw); err != nil {
		return link{}, fmt.Errorf("%w: %w", errNotALine, err)
	}
	l := link{seq: raw.Seq, revision: raw.StoreRevision}
	prev, err := hex.DecodeString(raw.PrevHash)
	if err != nil || len(prev) != len(l.prev) || raw.Seq == 0 || raw.StoreRevision < 0 || raw.Seq == math.MaxUint64 || !raw.Audit {
		return link{}, errNotALine
	}
	copy(l.prev[:], prev)
	return l, nil
}

// lastLine returns the last whole line among the first size bytes of r, without
// its newline, and the offset behind that newline. With no newline at all both
// are zero.
func lastLine(r io.ReaderAt, size int64) (line []byte, end int64, err error) {
	last, err := newlineBefore(r, size, size)
	if err != nil || last < 0 {
		return nil, 0, err
	}
	first, err := newlineBefore(r, last, maxLine+1)
	if err != nil {
		return nil, 0, err
	}
	line = make([]byte, last-first-1)
	if n, err := r.ReadAt(line, first+1); n < len(line) {
		return nil, 0, fmt.Errorf("read last line: %w", err)
	}
	return line, last + 1, nil
}

// newlineBefore returns the offset of the last newline below end, -1 if there
// is none. It looks at no more than limit bytes: more without a newline is
// errTooLong.
func newlineBefore(r io.ReaderAt, end, limit int64) (int64, error) {
	buf := make([]byte, min(end, limit, 64<<10))
	low := max(0, end-limit)
	for end > low {
		chunk := buf[:min(int64(len(buf)), end-low)]
		if n, err := r.ReadAt(chunk, end-int64(len(chunk))); n < len(chunk) {
			return 0, fmt.Errorf("read lines: %w", err)
		}
		end -= int64(len(chunk))
		if i := bytes.LastIndexByte(chunk, '\n'); i >= 0 {
			return end + int64(i), nil
		}
	}
	if low > 0 {
		return 0, errTooLong
	}
	return -1, nil
}

// Report is what Verify found.
type Report struct {
	Files       int    // files read, oldest first
	Lines       int64  // whole lines in them
	First, Last uint64 // numbers of the first and the last line
	Torn        int64  // bytes behind the last newline: an unfinished write
	Hash        string // of the last line, hex: keep it elsewhere to prove the log's end later
}

// Verify checks the chain from the oldest file that is kept beside path to the
// end of path. What came before the oldest kept line can't be checked from
// here, and neither can lines cut off at the end: for that, compare with a
// number and hash noted elsewhere. A rotation during the check can look like a
// gap; check again.
func Verify(path string) (Report, error) {
	var v verifier
	files, err := v.files(path)
	if err != nil {
		return Report{}, err
	}
	rep := Report{Files: files, Lines: v.lines, First: v.first, Last: v.seq, Torn: v.torn}
	if v.lines > 0 {
		rep.Hash = hex.EncodeToString(v.prev[:])
	}
	return rep, nil
}

type verifier struct {
	visit       func(line []byte) error // called for each line; nil: for none
	lines, torn int64
	first, seq  uint64
	prev        digest
}

// files goes through the older files and then the one at path, and returns how
// many they are. A crash in a rotation can leave none at path.
func (v *verifier) files(path string) (int, error) {
	numbers, err := rotated(path)
	if err != nil {
		return 0, err
	}
	for _, n := range slices.Backward(numbers) {
		if err := v.file(numbered(path, n), false); err != nil {
			return 0, err
		}
	}
	if err := v.file(path, true); errors.Is(err, fs.ErrNotExist) && len(numbers) > 0 {
		return len(numbers), nil
	} else if err != nil {
		return 0, err
	}
	return len(numbers) + 1, nil
}

func (v *verifier) file(path string, newest bool) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open audit log: %w", err)
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, maxLine+1)
	for n := 1; ; n++ {
		line, err := r.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF) && len(line) == 0:
			return nil
		case errors.Is(err, io.EOF) && newest:
			v.torn = int64(len(line))
			return nil
		case errors.Is(err, io.EOF):
			return broken(path, n, "is not finished")
		case errors.Is(err, bufio.ErrBufferFull):
			return broken(path, n, errTooLong.Error())
		case err != nil:
			return fmt.Errorf("read audit log: %w", err)
		}
		if err := v.line(line[:len(line)-1], path, n); err != nil {
			return err
		}
	}
}

func (v *verifier) line(line []byte, path string, n int) error {
	l, err := parseLink(line)
	if err != nil {
		return broken(path, n, errNotALine.Error())
	}
	switch {
	case v.lines == 0 && l.seq == 1 && l.prev != digest{}:
		return broken(path, n, "is the first and holds the hash of a line before it")
	case v.lines == 0:
		v.first = l.seq
	case l.seq != v.seq+1:
		return broken(path, n, fmt.Sprintf("has number %d after %d", l.seq, v.seq))
	case l.prev != v.prev:
		return broken(path, n, "does not hold the hash of the line before it")
	}
	v.lines++
	v.seq = l.seq
	v.prev = sha256.Sum256(line)
	if v.visit != nil {
		return v.visit(line)
	}
	return nil
}

func broken(path string, n int, what string) error {
	return fault.Newf(fault.Precondition, "audit_chain_broken", "%s: line %d %s", path, n, what)
}

// numbered is the name of the n-th older file, 1 being the newest of them.
func numbered(path string, n int) string { return path + "." + strconv.Itoa(n) }

// rotated returns the numbers of the older files beside path, ascending.
func rotated(path string) ([]int, error) {
	names, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("list audit logs: %w", err)
	}
	var numbers []int
	for _, name := range names {
		suffix, ok := strings.CutPrefix(name.Name(), filepath.Base(path)+".")
		if n, err := strconv.Atoi(suffix); ok && err == nil && n > 0 && strconv.Itoa(n) == suffix {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

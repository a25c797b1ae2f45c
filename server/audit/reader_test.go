package audit

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func TestVerifyFindsEveryChangedByte(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path})
	record(t, l, "a", "b")
	record(t, l, "c")
	good := read(t, path)
	last := bytes.LastIndexByte(good[:len(good)-1], '\n')
	for i := range last { // of the last line itself only a hash kept elsewhere tells
		bad := slices.Clone(good)
		bad[i] ^= 1
		write(t, path, bad)
		if _, err := Verify(path); !errors.Is(err, fault.Precondition) || fault.ReasonOf(err) != "audit_chain_broken" {
			t.Fatalf("byte %d of %q: %v", i, good, err)
		}
	}
}

func TestVerifyNamesWhatIsWrong(t *testing.T) {
	path := logPath(t)
	l := open(t, Config{Path: path})
	record(t, l, "a", "b", "c")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(read(t, path), []byte("\n"))
	write(t, path, slices.Concat(lines[0], lines[2]))
	if _, err := Verify(path); err == nil || !strings.Contains(err.Error(), "line 2 has number 3 after 1") {
		t.Errorf("a removed line: %v", err)
	}
	write(t, path, slices.Concat(lines[0], lines[1], lines[2][:9]))
	if rep, err := Verify(path); err != nil || rep.Torn != 9 || rep.Last != 2 {
		t.Errorf("a torn line: %+v, %v", rep, err)
	}
	write(t, path, append(slices.Concat(lines...), bytes.Repeat([]byte{'x'}, maxLine+2)...))
	if _, err := Verify(path); err == nil || !strings.Contains(err.Error(), "longer than any line") {
		t.Errorf("an endless line: %v", err)
	}
	write(t, path, nil)
	if rep, err := Verify(path); err != nil || rep.Hash != "" || rep.Lines != 0 {
		t.Errorf("an empty log: %+v, %v", rep, err)
	}
	write(t, numbered(path, 1), lines[0][:9])
	if _, err := Verify(path); err == nil || !strings.Contains(err.Error(), "audit.log.1: line 1 is not finished") {
		t.Errorf("an unfinished older file: %v", err)
	}
	if _, err := Verify(path + ".missing"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing log: %v", err)
	}
}

func TestOnlyNumbersAreOlderFiles(t *testing.T) {
	path := logPath(t)
	for _, suffix := range []string{".1", ".10", ".2", ".01", ".0", ".-1", ".new", ".1.gz", ".+3"} {
		write(t, path+suffix, nil)
	}
	if got := files(t, path); !slices.Equal(got, []int{1, 2, 10}) {
		t.Fatalf("got %v", got)
	}
}

// The oracle is the same search done plainly over the whole content.
func FuzzLastLine(f *testing.F) {
	f.Add([]byte("a\nb\nc"), uint32(0))
	f.Add([]byte("\n"), uint32(70_000))
	f.Add([]byte(""), uint32(maxLine))
	f.Fuzz(func(t *testing.T, data []byte, pad uint32) {
		data = append(data, bytes.Repeat([]byte{'p'}, int(pad%(2*maxLine)))...)
		line, end, err := lastLine(bytes.NewReader(data), int64(len(data)))
		last := bytes.LastIndexByte(data, '\n')
		if last < 0 {
			if err != nil || end != 0 || line != nil {
				t.Fatalf("no newline: %d bytes, end %d, %v", len(line), end, err)
			}
			return
		}
		want := data[bytes.LastIndexByte(data[:last], '\n')+1 : last]
		if len(want) > maxLine+1 {
			if !errors.Is(err, errTooLong) {
				t.Fatalf("line of %d bytes: %v", len(want), err)
			}
			return
		}
		if err == nil && (!bytes.Equal(line, want) || end != int64(last)+1) {
			t.Fatalf("got %q to %d, want %q to %d", line, end, want, last+1)
		}
		if err != nil && len(want) <= maxLine {
			t.Fatal(err)
		}
	})
}

// Whatever a file holds: either it is refused and left as it was, or its whole
// lines stay and the next line follows the last of them.
func FuzzOpen(f *testing.F) {
	var two []byte
	{
		path := logPath(f)
		l := open(f, Config{Path: path})
		record(f, l, "a", "b")
		two = read(f, path)
	}
	f.Add(two)
	f.Add(two[:len(two)-3])
	f.Add([]byte("{}\n"))
	f.Add([]byte{0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		path := logPath(t)
		write(t, path, data)
		l, err := Open(Config{Path: path}, quiet())
		if err != nil {
			if fault.ReasonOf(err) != "audit_corrupt" || !bytes.Equal(read(t, path), data) {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		record(t, l, "next")
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		got := read(t, path)
		whole := data[:bytes.LastIndexByte(data, '\n')+1]
		if !bytes.HasPrefix(got, whole) {
			t.Fatal("whole lines were changed")
		}
		added := got[len(whole):]
		if len(whole) > 0 { // the link to the line before is part of what must hold
			last, _, err := lastLine(bytes.NewReader(whole), int64(len(whole)))
			if err != nil {
				t.Fatal(err)
			}
			added = slices.Concat(last, []byte("\n"), added)
		}
		write(t, path, added)
		if rep, err := Verify(path); err != nil || rep.Torn != 0 {
			t.Fatalf("%+v, %v\n%q", rep, err, added)
		}
	})
}

package backup

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

func macWith(key string) MAC {
	return func(name string, value []byte) []byte {
		h := hmac.New(sha256.New, []byte(key))
		fmt.Fprintf(h, "%d %s", len(name), name)
		h.Write(value)
		return h.Sum(nil)
	}
}

func bolt(t testing.TB) *store.Bolt {
	t.Helper()
	b, err := store.OpenBolt(store.BoltConfig{Dir: t.TempDir(), NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func put(t testing.TB, b *store.Bolt, key, value string) {
	t.Helper()
	if _, err := b.Commit(context.Background(), nil, []store.Write{{Key: key, Value: []byte(value)}}); err != nil {
		t.Fatal(err)
	}
}

func write(t testing.TB, b *store.Bolt, mac MAC) (Header, []byte) {
	t.Helper()
	var out bytes.Buffer
	h, _, err := Write(context.Background(), &out, b, Header{TrustDomain: "example.org", Version: "v1"}, mac)
	if err != nil {
		t.Fatal(err)
	}
	return h, out.Bytes()
}

// readAll returns what a reader that trusts nothing before the end would keep.
func readAll(data []byte, mac MAC) (Header, []store.Record, error) {
	r, err := NewReader(bytes.NewReader(data), mac)
	if err != nil {
		return Header{}, nil, err
	}
	var all []store.Record
	for rec, err := range r.Records() {
		if err != nil {
			return Header{}, nil, err
		}
		all = append(all, rec)
	}
	return r.Header(), all, nil
}

func content(t testing.TB, b *store.Bolt) []store.Record {
	t.Helper()
	page, err := b.List(context.Background(), "", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	return page.Records
}

func same(a, b store.Record) bool {
	return a.Key == b.Key && a.Revision == b.Revision && bytes.Equal(a.Value, b.Value)
}

func TestABackupIsTheStore(t *testing.T) {
	b := bolt(t)
	put(t, b, "b", "2")
	put(t, b, "a", strings.Repeat("x", 100_000))
	put(t, b, "c", "")
	h, data := write(t, b, macWith("k"))
	put(t, b, "a", "later")
	if h.Revision != b.Revision()-1 || h.TrustDomain != "example.org" || time.Since(h.TakenAt) > time.Minute {
		t.Errorf("header %+v", h)
	}
	got, records, err := readAll(data, macWith("k"))
	if err != nil || got != h {
		t.Fatalf("%+v, %v", got, err)
	}
	dir := t.TempDir()
	r, err := NewReader(bytes.NewReader(data), macWith("k"))
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Load(store.BoltConfig{Dir: dir, NoSync: true}, store.Moment{Revision: h.Revision + 5, Time: h.TakenAt}, r.Records()); err != nil {
		t.Fatal(err)
	}
	loaded, err := store.OpenBolt(store.BoltConfig{Dir: dir, NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer loaded.Close()
	if loaded.Revision() != h.Revision+5 || !slices.EqualFunc(content(t, loaded), records, same) || len(records) != 3 || records[0].Value[0] != 'x' {
		t.Errorf("loaded %d: %v", loaded.Revision(), content(t, loaded))
	}
	if put(t, loaded, "d", "goes on"); loaded.Revision() != h.Revision+6 {
		t.Errorf("revision %d", loaded.Revision())
	}
}

// Every change of every bit, every cut and every addition is noticed.
func TestADamagedBackupIsRefused(t *testing.T) {
	b := bolt(t)
	put(t, b, "a", "1")
	put(t, b, "b", "2")
	_, data := write(t, b, macWith("k"))
	check := func(what string, bad []byte) {
		t.Helper()
		_, _, err := readAll(bad, macWith("k"))
		if reason := fault.ReasonOf(err); err == nil || reason != "backup_damaged" && reason != "backup_seal_key" {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range data {
		check(fmt.Sprintf("cut at %d", i), data[:i])
		for bit := range 8 {
			bad := bytes.Clone(data)
			bad[i] ^= 1 << bit
			check(fmt.Sprintf("bit %d of byte %d", bit, i), bad)
		}
	}
	check("longer", append(bytes.Clone(data), 0))
}

func TestABackupOfAnotherSealKeyIsRefused(t *testing.T) {
	b := bolt(t)
	put(t, b, "a", "1")
	_, data := write(t, b, macWith("k"))
	if _, _, err := readAll(data, macWith("other")); fault.ReasonOf(err) != "backup_seal_key" {
		t.Error(err)
	}
}

func TestASpooledBackupLeavesNoFile(t *testing.T) {
	b, dir := bolt(t), t.TempDir()
	put(t, b, "a", "1")
	s, err := Spool(t.Context(), dir, b, Header{TrustDomain: "example.org"}, macWith("k"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var out bytes.Buffer
	if n, err := out.ReadFrom(s); err != nil || n != s.Bytes || s.Records != 1 {
		t.Errorf("%d bytes of %d, %d records, %v", n, s.Bytes, s.Records, err)
	}
	if _, _, err := readAll(out.Bytes(), macWith("k")); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func FuzzReader(f *testing.F) {
	b, err := store.OpenBolt(store.BoltConfig{Dir: f.TempDir(), NoSync: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = b.Close() })
	put(f, b, "a", "1")
	_, data := write(f, b, macWith("k"))
	f.Add(data)
	f.Add(data[:len(data)/2])
	f.Add([]byte(magic + "{}\n\x00\x00"))
	f.Fuzz(func(t *testing.T, in []byte) {
		_, records, err := readAll(in, macWith("k"))
		if err == nil && !bytes.Equal(in, data) {
			t.Fatalf("took a file that nobody wrote, with %d records", len(records))
		}
		if err != nil {
			if _, ok := errors.AsType[*fault.Fault](err); !ok {
				t.Fatalf("an error without a reason: %v", err)
			}
		}
	})
}

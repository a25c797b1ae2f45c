package store

import (
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// specimen is a store with everything that bbolt's format has: a tree of
// several levels, values over several pages, free pages.
type specimen struct {
	file    []byte
	content string
	meta    meta
}

func makeSpecimen(t testing.TB, records int) specimen {
	t.Helper()
	dir := t.TempDir()
	b := openStore(t, dir)
	random := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < records; i += 50 {
		var writes []Write
		for j := range 50 {
			key := fmt.Sprintf("entry/%06d/%s", random.IntN(1_000_000), strings.Repeat("k", random.IntN(100)))
			writes = append(writes, Write{Key: fmt.Sprint(key, i, j), Value: bytes.Repeat([]byte{byte(i)}, 100+random.IntN(300))})
		}
		if _, err := b.Commit(t.Context(), nil, writes); err != nil {
			t.Fatal(err)
		}
	}
	for i := range records / 50 { // values over several pages
		long := make([]byte, 5000+3000*i)
		for j := range long {
			long[j] = byte(random.Uint32())
		}
		set(t, b, fmt.Sprint("long/", i), string(long))
	}
	set(t, b, "last", "record")
	page, err := b.List(t.Context(), "entry/", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range page.Records { // removals all over the tree
		if i%10 == 0 {
			if _, err := b.Commit(t.Context(), nil, []Write{{Key: r.Key, Delete: true}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	s := specimen{content: content(t, b)}
	closeStore(t, b)
	if s.file, err = os.ReadFile(filepath.Join(dir, boltFile)); err != nil {
		t.Fatal(err)
	}
	in := &inspector{file: bytes.NewReader(s.file)}
	if s.meta, err = in.newestMeta(); err != nil {
		t.Fatal(err)
	}
	return s
}

// laidDown puts bytes where a store is expected.
func laidDown(t testing.TB, file []byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, boltFile), file, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// wantCorrupt wants the store refused and its file untouched.
func wantCorrupt(t testing.TB, dir string, file []byte, what string) {
	t.Helper()
	b, err := OpenBolt(BoltConfig{Dir: dir, NoSync: true})
	if err == nil {
		_ = b.Close()
		t.Fatalf("%s: opened", what)
	}
	if fault.KindOf(err) != fault.Precondition || fault.ReasonOf(err) != "store_corrupt" {
		t.Fatalf("%s: got %v", what, err)
	}
	if !strings.Contains(fault.SafeText(err), "restore a backup") {
		t.Fatalf("%s: %v does not say what to do", what, err)
	}
	wantUntouched(t, dir, file, what)
}

func wantUntouched(t testing.TB, dir string, file []byte, what string) {
	t.Helper()
	got, err := os.ReadFile(filepath.Join(dir, boltFile))
	if err != nil || !bytes.Equal(got, file) {
		t.Fatalf("%s: the file was changed (%v)", what, err)
	}
}

// NEG-55: every byte of both meta pages. Those with a meaning go through the
// front door, the padding behind them through the door behind that.
func TestAFlippedByteInAMetaPageIsRefused(t *testing.T) {
	s := makeSpecimen(t, 0)
	dir := laidDown(t, s.file)
	f, err := os.OpenFile(filepath.Join(dir, boltFile), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	file := bytes.Clone(s.file)
	put := func(at int, b byte) {
		file[at] = b
		if _, err := f.WriteAt(file[at:at+1], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	for at := range 2 * pageSize {
		put(at, s.file[at]^(1<<(at%8)))
		if what := fmt.Sprintf("byte %d", at); at%pageSize < pageHeader+metaBytes+16 {
			wantCorrupt(t, dir, file, what)
		} else if _, err := openLocked(BoltConfig{Dir: dir}); fault.ReasonOf(err) != "store_corrupt" {
			t.Fatalf("%s: got %v", what, err)
		}
		put(at, s.file[at])
	}
	wantUntouched(t, dir, s.file, "after all")
	if got := content(t, openStore(t, dir)); got != s.content {
		t.Errorf("content changed: %s", got)
	}
}

// NEG-55: every single bit of both meta pages that means something.
func TestEveryBitOfTheMetaPagesCounts(t *testing.T) {
	s := makeSpecimen(t, 0)
	file := bytes.Clone(s.file)
	for bit := range 2 * pageSize * 8 {
		if bit/8%pageSize > pageHeader+metaBytes {
			continue
		}
		file[bit/8] ^= 1 << (bit % 8)
		if _, err := inspect(bytes.NewReader(file), int64(len(file))); !isDamage(err) {
			t.Fatalf("bit %d of byte %d: %v", bit%8, bit/8, err)
		}
		file[bit/8] = s.file[bit/8]
	}
	copy(file[pageSize:2*pageSize], file[:pageSize]) // two times the same page
	if _, err := inspect(bytes.NewReader(file), int64(len(file))); !isDamage(err) {
		t.Fatalf("one meta page twice: %v", err)
	}
}

func isDamage(err error) bool {
	_, ok := errors.AsType[*damage](err)
	return ok
}

// NEG-55: truncated at each page, and a byte to either side.
func TestATruncatedFileIsRefused(t *testing.T) {
	s := makeSpecimen(t, 300)
	used := int(s.meta.pages) * pageSize
	if used >= len(s.file) {
		t.Fatalf("the specimen has %d bytes and uses %d: it should have some to spare", len(s.file), used)
	}
	dir := laidDown(t, s.file)
	path := filepath.Join(dir, boltFile)
	for size := used + pageSize; size >= 0; size -= pageSize {
		for _, cut := range []int{size + 1, size, max(size-1, 0)} {
			if err := os.WriteFile(path, s.file[:cut], 0o600); err != nil {
				t.Fatal(err)
			}
			what := fmt.Sprintf("%d of %d used bytes", cut, used)
			if cut < used {
				wantCorrupt(t, dir, s.file[:cut], what)
				continue
			}
			// Nothing was ever written there: nothing is lost.
			b := openStore(t, dir)
			if got := content(t, b); got != s.content {
				t.Fatalf("%s: content changed", what)
			}
			closeStore(t, b)
		}
	}
}

// NEG-55: a file that exists is never replaced by a new store.
func TestWhatIsNoStoreIsRefusedAndKept(t *testing.T) {
	s := makeSpecimen(t, 0)
	foreign := filepath.Join(t.TempDir(), "foreign.db")
	db, err := bbolt.Open(foreign, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Update(func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("theirs")); return err }); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	theirs, err := os.ReadFile(foreign)
	if err != nil {
		t.Fatal(err)
	}
	swapped := bytes.Clone(s.file) // both meta pages whole, in each other's place
	copy(swapped, s.file[pageSize:2*pageSize])
	copy(swapped[pageSize:], s.file[:pageSize])
	for name, file := range map[string][]byte{
		"empty file":          {},
		"one byte":            {0},
		"zeros":               make([]byte, 64<<10),
		"text":                []byte(strings.Repeat("trust me\n", 4000)),
		"another bbolt file":  theirs,
		"meta pages swapped":  swapped,
		"first page lost":     s.file[pageSize:],
		"a page of something": append([]byte(strings.Repeat("x", pageSize)), s.file...),
	} {
		wantCorrupt(t, laidDown(t, file), file, name)
	}
}

// altered lets a change be made with bbolt itself, below the driver.
func altered(t *testing.T, change func(tx *bbolt.Tx) error) (file []byte) {
	t.Helper()
	dir := laidDown(t, makeSpecimen(t, 0).file)
	path := filepath.Join(dir, boltFile)
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(change), db.Close()); err != nil {
		t.Fatal(err)
	}
	file, err = os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// NEG-55: newer schema, and a well-formed file with impossible content.
func TestWellFormedNonsenseIsRefused(t *testing.T) {
	h := head{revision: 3, time: time.Unix(0, 0)}
	// One record, as in the file, and what the head must say about it.
	h.tally.add(encodeRecord("last", 2, []byte("record")))
	last := h.tally
	newer := h.encode()
	newer[0] = format + 1
	newer = seal(headKey, newer[:headBytes])
	putHead := func(item []byte) func(tx *bbolt.Tx) error {
		return func(tx *bbolt.Tx) error { return tx.Bucket([]byte(metaBucket)).Put([]byte(headKey), item) }
	}
	putRecord := func(key string, item []byte) func(tx *bbolt.Tx) error {
		return func(tx *bbolt.Tx) error { return tx.Bucket([]byte(recordsBucket)).Put([]byte(key), item) }
	}
	file := altered(t, putHead(newer))
	dir := laidDown(t, file)
	_, err := OpenBolt(BoltConfig{Dir: dir})
	wantReason(t, err, fault.Precondition, "store_newer")
	wantUntouched(t, dir, file, "newer")

	for name, change := range map[string]func(tx *bbolt.Tx) error{
		"head without checksum":   putHead(h.encode()[:headBytes]),
		"head too long":           putHead(seal(headKey, append(h.encode()[:headBytes], 0))),
		"head of format 0":        putHead(seal(headKey, make([]byte, headBytes))),
		"revision 0":              putHead(head{tally: last}.encode()),
		"revision below records":  putHead(head{revision: 1, tally: last}.encode()),
		"records missing":         putHead(head{revision: 3, tally: tally{2, last.sum}}.encode()),
		"records as before":       putHead(head{revision: 3, tally: tally{1, last.sum + 1}}.encode()),
		"record removed":          func(tx *bbolt.Tx) error { return tx.Bucket([]byte(recordsBucket)).Delete([]byte("last")) },
		"record put back":         putRecord("last", encodeRecord("last", 2, []byte("older"))),
		"record from the future":  putRecord("x", encodeRecord("x", 99, nil)),
		"record of revision 0":    putRecord("x", encodeRecord("x", 0, nil)),
		"record of another key":   putRecord("x", encodeRecord("y", 2, nil)),
		"record without anything": putRecord("x", nil),
		"record too short":        putRecord("x", seal("x", make([]byte, 7))),
		"key too long":            putRecord(strings.Repeat("x", MaxKeyBytes+1), encodeRecord(strings.Repeat("x", MaxKeyBytes+1), 2, nil)),
		"no head":                 func(tx *bbolt.Tx) error { return tx.Bucket([]byte(metaBucket)).Delete([]byte(headKey)) },
		"no meta":                 func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte(metaBucket)) },
		"no records":              func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte(recordsBucket)) },
		"another bucket":          func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("x")); return err },
		"a bucket as record": func(tx *bbolt.Tx) error {
			_, err := tx.Bucket([]byte(recordsBucket)).CreateBucket([]byte("x"))
			return err
		},
		"another item in meta": func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte(metaBucket)).Put([]byte("x"), seal("x", nil))
		},
	} {
		file := altered(t, change)
		wantCorrupt(t, laidDown(t, file), file, name)
	}
}

// wantCorruptOrWhole is what must hold for a damaged file, wherever the damage
// is: it is refused and kept as it is, or nothing of the content is touched and
// the store works on.
func wantCorruptOrWhole(t testing.TB, s specimen, dir string, file []byte, what string) (opened bool) {
	t.Helper()
	if _, err := inspect(bytes.NewReader(file), int64(len(file))); err != nil {
		if !isDamage(err) && !errors.Is(err, errNewer) {
			t.Fatalf("%s: %v", what, err)
		}
		return false
	}
	if err := os.WriteFile(filepath.Join(dir, boltFile), file, 0o600); err != nil {
		t.Fatal(err)
	}
	b := openStore(t, dir)
	if got := content(t, b); got != s.content {
		t.Fatalf("%s: content changed in silence", what)
	}
	for i := range 5 {
		set(t, b, fmt.Sprintf("new/%d", i), strings.Repeat("n", 900))
	}
	want := content(t, b)
	closeStore(t, b)
	b = openStore(t, dir)
	if got := content(t, b); got != want {
		t.Fatalf("%s: content changed after more commits", what)
	}
	closeStore(t, b)
	return true
}

func TestAFlippedBitAnywhereIsRefusedOrHarmless(t *testing.T) {
	s := makeSpecimen(t, 50)
	random := rand.New(rand.NewPCG(3, 4))
	file, dir := bytes.Clone(s.file), t.TempDir()
	refused, harmless := 0, 0
	flip := func(at int) {
		file[at] ^= 1 << random.IntN(8)
		if wantCorruptOrWhole(t, s, dir, file, fmt.Sprintf("byte %d", at)) {
			harmless++
		} else {
			refused++
		}
		file[at] = s.file[at]
	}
	for page := 2; page < int(s.meta.pages); page++ {
		if id := page * pageSize; order.Uint64(file[id:]) == uint64(page) { // not within a long value
			for at := range pageHeader + elementSize {
				flip(id + at)
			}
		}
	}
	for range 200 {
		flip(random.IntN(int(s.meta.pages) * pageSize))
	}
	if refused < 300 || harmless < 50 {
		t.Errorf("%d refused, %d harmless: the test does not reach what it should", refused, harmless)
	}
}

// Whole pages lost, zeroed or exchanged, as broken disks do.
func TestADamagedPageIsRefusedUnlessItIsFree(t *testing.T) {
	s := makeSpecimen(t, 300)
	pages := int(s.meta.pages)
	file := bytes.Clone(s.file)
	page := func(b []byte, i int) []byte { return b[i*pageSize : (i+1)*pageSize] }
	free := map[int]bool{}
	list := s.file[s.meta.freelist*pageSize:]
	for i := range int(order.Uint16(list[10:])) {
		free[int(order.Uint64(list[pageHeader+8*i:]))] = true
	}
	if len(free) < 5 || len(free) > pages/2 {
		t.Fatalf("%d of %d pages are free", len(free), pages)
	}
	for i := range pages {
		for what, content := range map[string][]byte{"zeroed": make([]byte, pageSize), "replaced": page(s.file, (i+1)%pages)} {
			copy(page(file, i), content)
			_, err := inspect(bytes.NewReader(file), int64(len(file)))
			if free[i] && err != nil || !free[i] && !isDamage(err) {
				t.Errorf("page %d %s, free %v: %v", i, what, free[i], err)
			}
			copy(page(file, i), page(s.file, i))
		}
	}
	for i := range free { // all of them garbage at once
		copy(page(file, i), bytes.Repeat([]byte{0xa5}, pageSize))
	}
	if !wantCorruptOrWhole(t, s, t.TempDir(), file, "garbage in free pages") {
		t.Error("refused for what nobody reads")
	}
}

// mend makes the meta pages of a damaged file valid again, so that what they
// say is looked at.
func mend(file []byte) {
	for i := range 2 {
		body := file[i*pageSize+pageHeader:]
		sum := fnv.New64a()
		_, _ = sum.Write(body[:metaBytes-8])
		order.PutUint64(body[metaBytes-8:], sum.Sum64())
	}
}

// FuzzInspect looks for files that pass and that bbolt stumbles over. Each four
// bytes of input put one byte somewhere.
func FuzzInspect(f *testing.F) {
	whole, want := handmade()
	f.Add([]byte{})
	f.Add([]byte{0, 0, 16, 1})
	f.Add([]byte{0, 0, 44, 9, 0, 16, 44, 9})
	f.Add([]byte{0, 32, 10, 255, 0, 32, 11, 255})
	f.Fuzz(func(t *testing.T, patches []byte) {
		file := bytes.Clone(whole)
		for ; len(patches) >= 4; patches = patches[4:] {
			at := int(patches[0])<<16 | int(patches[1])<<8 | int(patches[2])
			file[at%len(file)] = patches[3]
		}
		mend(file)
		if _, err := inspect(bytes.NewReader(file), int64(len(file))); err != nil {
			return
		}
		dir := laidDown(t, file)
		b := openStore(t, dir)
		if got := content(t, b); got != want {
			t.Fatalf("content changed in silence: %s", got)
		}
		for i := range 10 {
			set(t, b, fmt.Sprintf("k%02d", i*3), strings.Repeat("n", 900))
		}
		want := content(t, b)
		closeStore(t, b)
		if got := content(t, openStore(t, dir)); got != want {
			t.Fatal("content changed over reopening")
		}
	})
}

// handmade is a file in bbolt's format that no bbolt wrote: the same in every
// run, and a second opinion about the format.
//
//	0, 1 meta   2 root   3 branch   4, 5, 6 leaves, 6 over three pages
//	9 free pages: 10, 11, 12
func handmade() (file []byte, shown string) {
	file = make([]byte, 13*pageSize)
	page := func(id, flags, overflow int) []byte {
		b := file[id*pageSize : (id+1+overflow)*pageSize]
		order.PutUint64(b, uint64(id))
		order.PutUint16(b[8:], uint16(flags))
		order.PutUint32(b[12:], uint32(overflow))
		return b
	}
	type item struct{ key, value []byte }
	leafPage := func(b []byte, flags uint32, items ...item) (size int) {
		order.PutUint16(b[8:], flagLeaf)
		order.PutUint16(b[10:], uint16(len(items)))
		end := pageHeader + elementSize*len(items)
		for i, it := range items {
			at := pageHeader + elementSize*i
			for j, n := range []uint32{flags, uint32(end - at), uint32(len(it.key)), uint32(len(it.value))} {
				order.PutUint32(b[at+4*j:], n)
			}
			end += copy(b[end:], it.key)
			end += copy(b[end:], it.value)
		}
		return end
	}

	h := head{revision: 9, time: time.Unix(0, 0)}
	records := make([]item, 0, 30)
	shown = "9 false\n"
	for i := range 30 {
		key, value := fmt.Sprintf("k%02d", i), bytes.Repeat([]byte{byte(i)}, 150)
		if i == 29 {
			value = bytes.Repeat(value, 60)
		}
		it := item{[]byte(key), encodeRecord(key, int64(1+i%9), value)}
		h.tally.add(it.value)
		records = append(records, it)
		shown += fmt.Sprintf("%q %x %d\n", key, value, 1+i%9)
	}
	leafPage(page(4, flagLeaf, 0), 0, records[:14]...)
	leafPage(page(5, flagLeaf, 0), 0, records[14:28]...)
	leafPage(page(6, flagLeaf, 2), 0, records[28:]...)

	branch := page(3, flagBranch, 0)
	order.PutUint16(branch[10:], 3)
	for i, first := range []int{0, 14, 28} {
		at, key := pageHeader+elementSize*i, pageHeader+elementSize*3+3*i
		order.PutUint32(branch[at:], uint32(key-at))
		order.PutUint32(branch[at+4:], 3)
		order.PutUint64(branch[at+8:], uint64(4+i))
		copy(branch[key:], records[first].key)
	}

	inline := make([]byte, 512)
	inline = inline[:bucketBytes+leafPage(inline[bucketBytes:], 0, item{[]byte(headKey), h.encode()})]
	outside := make([]byte, bucketBytes)
	order.PutUint64(outside, 3)
	leafPage(page(2, flagLeaf, 0), flagBucket, item{[]byte(metaBucket), inline}, item{[]byte(recordsBucket), outside})

	free := page(9, flagFreelist, 0)
	order.PutUint16(free[10:], 3)
	for i := range 3 {
		order.PutUint64(free[pageHeader+8*i:], uint64(10+i))
	}
	for i := range 2 {
		b := page(i, flagMeta, 0)[pageHeader:]
		order.PutUint32(b, metaMagic)
		order.PutUint32(b[4:], metaVersion)
		order.PutUint32(b[8:], pageSize)
		for j, n := range []uint64{2, 0, 9, 13, uint64(40 + i)} { // root, its sequence, freelist, pages, transaction
			order.PutUint64(b[16+8*j:], n)
		}
	}
	mend(file)
	return file, shown
}

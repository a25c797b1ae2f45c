package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"io"

	"go.etcd.io/bbolt"
)

// bbolt's file format, as far as it has to be known to trust a file before
// bbolt maps it. Numbers are in the machine's byte order.
//
//	page      id(8) flags(2) count(2) overflow(4), then the body
//	meta      magic(4) version(4) page size(4) flags(4) root(8) sequence(8)
//	          freelist(8) pages(8) transaction(8) checksum(8)
//	leaf      count * [flags(4) position(4) key size(4) value size(4)], data
//	branch    count * [position(4) key size(4) page(8)], data
//	freelist  count ids(8), or 0xffff as count and the count as the first id
//	bucket    root page(8) sequence(8); root 0: a leaf page follows inline
const (
	pageSize    = 4096 // ours on every machine, so that files can move
	pageHeader  = 16
	metaBytes   = 64
	elementSize = 16
	bucketBytes = 16

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10
	flagBucket   = 0x01 // of a leaf element

	metaMagic   = 0xED0CDAED
	metaVersion = 2

	// maxDepth is far above what 2^48 bytes of file need at two keys a page.
	maxDepth = 64
)

var order = binary.NativeEndian

// inspect reads a whole bolt file and returns its head, or a *damage. It never
// panics, whatever the bytes are: bbolt itself follows page numbers into a
// memory map, where a wrong one ends the process, and falls back in silence to
// the state before the last commit when the newer meta page is damaged.
//
// Both meta pages must be whole: their content lies in one disk sector, so a
// power cut leaves the old or the new one. Every page that is in use must be
// referenced once and not be free, keys must be in order, items must match
// their checksums, and all records together the head. Pages that are neither in
// use nor free are lost space, not damage; so is what follows the last page.
func inspect(file io.ReaderAt, size int64) (head, error) {
	in := &inspector{file: file}
	m, err := in.newestMeta()
	if err != nil {
		return head{}, err
	}
	if m.pages > uint64(size)/pageSize {
		return head{}, damaged("the file has %d bytes, its %d pages need more", size, m.pages)
	}
	in.pages = m.pages
	in.used = make([]uint64, m.pages/64+1)
	in.claim(0)
	in.claim(1)
	if err := in.freelist(m.freelist); err != nil {
		return head{}, err
	}
	if err := in.tree(m.root, 0, in.topLevel); err != nil {
		return head{}, err
	}
	if !in.haveHead || !in.haveRecords {
		return head{}, damaged("the file has no head or no records")
	}
	if in.found != in.head.tally {
		return head{}, damaged("it has %d records of %d, or some as they were before", in.found.records, in.head.tally.records)
	}
	return in.head, nil
}

type inspector struct {
	file  io.ReaderAt
	pages uint64
	used  []uint64 // one bit per page that is free or referenced
	bufs  [][]byte // one per depth
	head  head
	found tally

	haveHead, haveRecords bool
}

// visitor is called for each item of a leaf.
type visitor func(depth int, flags uint32, key, value []byte) error

type meta struct{ root, freelist, pages, transaction uint64 }

func (in *inspector) newestMeta() (meta, error) {
	var metas [2]meta
	for i := range metas {
		b := make([]byte, pageSize)
		if err := in.read(b, int64(i)*pageSize); err != nil {
			return meta{}, err
		}
		m, err := parseMeta(b, uint64(i))
		if err != nil {
			return meta{}, err
		}
		metas[i] = m
	}
	switch a, b := metas[0], metas[1]; {
	case a.transaction > b.transaction:
		return a, nil
	case b.transaction > a.transaction:
		return b, nil
	}
	return meta{}, damaged("both meta pages have the same transaction")
}

// parseMeta is strict to the last bit of the page.
func parseMeta(b []byte, id uint64) (meta, error) {
	body := b[pageHeader : pageHeader+metaBytes]
	sum := fnv.New64a()
	_, _ = sum.Write(body[:metaBytes-8])
	rest := len(bytes.TrimLeft(b[pageHeader+metaBytes:], "\x00"))
	switch {
	case order.Uint32(body) != metaMagic || order.Uint32(body[4:]) != metaVersion:
		return meta{}, damaged("meta page %d is none: is this a store of this program?", id)
	case order.Uint64(body[56:]) != sum.Sum64():
		return meta{}, damaged("the checksum of meta page %d does not match", id)
	case order.Uint64(b) != id, order.Uint16(b[8:]) != flagMeta, order.Uint16(b[10:]) != 0, order.Uint32(b[12:]) != 0, rest != 0:
		return meta{}, damaged("meta page %d is malformed", id)
	case order.Uint32(body[8:]) != pageSize, order.Uint32(body[12:]) != 0:
		return meta{}, damaged("meta page %d has page size %d", id, order.Uint32(body[8:]))
	}
	return meta{
		root:     order.Uint64(body[16:]),
		freelist: order.Uint64(body[32:]), pages: order.Uint64(body[40:]), transaction: order.Uint64(body[48:]),
	}, nil
}

// claim marks a page as accounted for. It reports false if there is no such
// page or if it is accounted for already.
func (in *inspector) claim(id uint64) bool {
	if id >= in.pages || in.used[id/64]>>(id%64)&1 == 1 {
		return false
	}
	in.used[id/64] |= 1 << (id % 64)
	return true
}

// load claims a page with those that it flows over into, and reads them into
// the buffer of this depth.
func (in *inspector) load(id uint64, depth int) ([]byte, error) {
	if !in.claim(id) {
		return nil, damaged("page %d is referenced wrongly", id)
	}
	for len(in.bufs) <= depth {
		in.bufs = append(in.bufs, make([]byte, pageSize))
	}
	b := in.bufs[depth][:pageSize]
	if err := in.read(b, int64(id)*pageSize); err != nil {
		return nil, err
	}
	if order.Uint64(b) != id {
		return nil, damaged("page %d has the number of page %d", id, order.Uint64(b))
	}
	overflow := uint64(order.Uint32(b[12:]))
	if overflow == 0 {
		return b, nil
	}
	for i := range overflow {
		if !in.claim(id + 1 + i) {
			return nil, damaged("page %d flows over into page %d", id, id+1+i)
		}
	}
	b = append(b, make([]byte, overflow*pageSize)...)
	in.bufs[depth] = b
	return b, in.read(b[pageSize:], int64(id+1)*pageSize)
}

func (in *inspector) read(b []byte, at int64) error {
	_, err := in.file.ReadAt(b, at)
	if errors.Is(err, io.EOF) {
		return damaged("the file ends before byte %d", at+int64(len(b)))
	}
	return err
}

func (in *inspector) freelist(id uint64) error {
	b, err := in.load(id, 0)
	if err != nil {
		return err
	}
	if order.Uint16(b[8:]) != flagFreelist {
		return damaged("page %d is not the list of free pages", id)
	}
	count, ids := uint64(order.Uint16(b[10:])), b[pageHeader:]
	if count == 0xffff {
		count, ids = order.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids))/8 {
		return damaged("the list of free pages is longer than its pages")
	}
	for i := range count {
		if free := order.Uint64(ids[i*8:]); !in.claim(free) {
			return damaged("page %d is free and in use, or free twice", free)
		}
	}
	return nil
}

// tree visits the leaves of a bucket. Only its root may be an empty page.
func (in *inspector) tree(root uint64, depth int, visit visitor) error {
	b, err := in.load(root, depth)
	if err != nil {
		return err
	}
	if order.Uint16(b[8:]) == flagLeaf {
		return leaf(b, depth, &keyOrder{}, visit)
	}
	return in.branch(b, depth, &keyOrder{}, visit)
}

// page visits the leaves below a page that a branch refers to.
func (in *inspector) page(id uint64, depth int, keys *keyOrder, visit visitor) error {
	if depth > maxDepth {
		return damaged("the tree is too deep")
	}
	b, err := in.load(id, depth)
	if err != nil {
		return err
	}
	if order.Uint16(b[10:]) == 0 {
		return damaged("page %d is empty", id)
	}
	if order.Uint16(b[8:]) == flagLeaf {
		return leaf(b, depth, keys, visit)
	}
	return in.branch(b, depth, keys, visit)
}

func (in *inspector) branch(b []byte, depth int, keys *keyOrder, visit visitor) error {
	id, count := order.Uint64(b), uint64(order.Uint16(b[10:]))
	if order.Uint16(b[8:]) != flagBranch || count == 0 || pageHeader+count*elementSize > uint64(len(b)) {
		return damaged("page %d is neither branch nor leaf", id)
	}
	for i := range count {
		at := pageHeader + i*elementSize
		key, ok := cut(b, at+uint64(order.Uint32(b[at:])), uint64(order.Uint32(b[at+4:])))
		if !ok || !keys.separator(key) {
			return damaged("key %d of branch page %d is out of order", i, id)
		}
		if err := in.page(order.Uint64(b[at+8:]), depth+1, keys, visit); err != nil {
			return err
		}
	}
	return nil
}

// leaf visits the items of a leaf page, which may be an inline one.
func leaf(b []byte, depth int, keys *keyOrder, visit visitor) error {
	count := uint64(order.Uint16(b[10:]))
	if pageHeader+count*elementSize > uint64(len(b)) {
		return damaged("a leaf page is malformed")
	}
	for i := range count {
		at := pageHeader + i*elementSize
		flags, pos := order.Uint32(b[at:]), at+uint64(order.Uint32(b[at+4:]))
		keySize, valueSize := uint64(order.Uint32(b[at+8:])), uint64(order.Uint32(b[at+12:]))
		key, ok := cut(b, pos, keySize)
		value, ok2 := cut(b, pos+keySize, valueSize)
		if !ok || !ok2 || !keys.item(key) {
			return damaged("item %d of a leaf page is out of bounds or out of order", i)
		}
		if err := visit(depth, flags, key, value); err != nil {
			return err
		}
	}
	return nil
}

// topLevel visits the root bucket, whose items are the buckets.
func (in *inspector) topLevel(depth int, flags uint32, name, value []byte) error {
	if flags != flagBucket || len(value) < bucketBytes {
		return damaged("an item of the root is no bucket")
	}
	var visit visitor
	switch string(name) {
	case metaBucket:
		visit = in.metaItem
	case recordsBucket:
		visit = in.record
		in.haveRecords = true
	default:
		return damaged("there is an unknown bucket")
	}
	if root := order.Uint64(value); root != 0 {
		return in.tree(root, depth+1, visit)
	}
	inline := value[bucketBytes:]
	if len(inline) < pageHeader || order.Uint16(inline[8:]) != flagLeaf {
		return damaged("an inline bucket is malformed")
	}
	return leaf(inline, depth, &keyOrder{}, visit)
}

func (in *inspector) metaItem(_ int, flags uint32, key, item []byte) (err error) {
	if flags != 0 || string(key) != headKey {
		return damaged("bucket %s has an unknown item", metaBucket)
	}
	in.head, err = decodeHead(item)
	in.haveHead = true
	return err
}

// record relies on bucket "meta" being visited before bucket "records".
func (in *inspector) record(_ int, flags uint32, key, item []byte) error {
	if flags != 0 || len(key) > MaxKeyBytes {
		return damaged("bucket %s has an item that is no record", recordsBucket)
	}
	revision, _, err := decodeRecord(key, item)
	if err != nil {
		return err
	}
	if revision > in.head.revision {
		return damaged("a record has revision %d, the store has %d", revision, in.head.revision)
	}
	in.found.add(item)
	return nil
}

func cut(b []byte, at, n uint64) ([]byte, bool) {
	if at+n > uint64(len(b)) {
		return nil, false
	}
	return b[at : at+n], true
}

// keyOrder holds the keys of one bucket to their order: each is above the one
// before, and what a branch says about a page is exactly the page's first key.
// bbolt finds a changed page's place in its parent by that key.
type keyOrder struct {
	last  []byte // the item before
	first []byte // what the next page has to begin with
	begin bool   // that is still to come
}

func (o *keyOrder) follows(key []byte) bool {
	if o.begin {
		return bytes.Equal(key, o.first)
	}
	return bytes.Compare(key, o.last) > 0
}

// separator takes the key of a branch's element.
func (o *keyOrder) separator(key []byte) bool {
	ok := o.follows(key)
	o.first, o.begin = append(o.first[:0], key...), true
	return ok
}

// item takes the key of a leaf's element.
func (o *keyOrder) item(key []byte) bool {
	ok := o.follows(key) && len(key) > 0
	o.last, o.begin = append(o.last[:0], key...), false
	return ok
}

// Compile-time check of the number that Commit's limit on keys relies on.
var _ [bbolt.MaxKeySize - MaxKeyBytes]struct{}

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// readJSONEntries reads a file of entries in JSON. encoding/json would take
// keys in any case and the last of two equal ones, and names neither line nor
// entry of an error.
func readJSONEntries(called string, data []byte) ([]fileEntry, error) {
	r := jsonReader{called: called, data: data, entry: -1}
	var list []fileEntry
	r.object([]string{"entries"}, func(string) {
		list = []fileEntry{}
		r.list(func(i int) {
			r.entry = i
			list = append(list, r.readEntry())
			r.entry = -1
		})
	})
	if r.space(); r.err == nil && r.at < len(r.data) {
		r.fail("something follows the document")
	}
	if r.err == nil && list == nil {
		return nil, noEntries(called)
	}
	return list, r.err
}

// entryKeys are the keys of an entry in a file.
func entryKeys() []string {
	return []string{
		"id", "spiffe_id", "parent_id", "selectors", "x509_svid_ttl", "x509_svid_ttl_seconds",
		"dns_names", "hint", "store_svid", "expires_at", "created_at", "revision", "store_revision",
	}
}

func (r *jsonReader) readEntry() (e fileEntry) {
	r.object(entryKeys(), func(key string) {
		switch key {
		case "id":
			e.ID = r.text()
		case "spiffe_id":
			e.SPIFFEID = r.text()
		case "parent_id":
			e.ParentID = r.text()
		case "selectors":
			e.Selectors = r.texts()
		case "x509_svid_ttl":
			e.X509SVIDTTL = r.duration()
		case "x509_svid_ttl_seconds":
			seconds := int32(r.whole(32))
			e.X509SVIDTTLSeconds = &seconds
		case "dns_names":
			e.DNSNames = r.texts()
		case "hint":
			e.Hint = r.text()
		case "store_svid":
			e.StoreSVID = r.truth()
		case "expires_at":
			e.ExpiresAt = r.text()
		case "created_at":
			e.CreatedAt = r.text()
		case "revision":
			e.Revision = r.whole(64)
		case "store_revision":
			e.StoreRevision = r.whole(64)
		}
	})
	return e
}

// jsonReader reads the JSON of one file from front to back. After the first
// error, which stays, nothing more is read.
type jsonReader struct {
	called string
	data   []byte
	at     int
	err    error
	entry  int    // which one is being read, -1 outside of them
	key    string // the last one read
}

// fail notes an error with its line and, inside an entry, with entry and key.
func (r *jsonReader) fail(text string) {
	if r.err != nil {
		return
	}
	at := min(r.at, len(r.data))
	where := fmt.Sprintf("%s: line %d: ", r.called, bytes.Count(r.data[:at], []byte("\n"))+1)
	if r.entry >= 0 {
		where += entryAt(r.entry)
		if r.key != "" {
			where += "." + r.key
		}
		where += ": "
	}
	r.err = malformed(where + text)
}

func (r *jsonReader) space() {
	for r.at < len(r.data) {
		switch r.data[r.at] {
		case ' ', '\t', '\r', '\n':
			r.at++
		default:
			return
		}
	}
}

// take reads c if it comes next.
func (r *jsonReader) take(c byte) bool {
	r.space()
	if r.err != nil || r.at == len(r.data) || r.data[r.at] != c {
		return false
	}
	r.at++
	return true
}

// word reads w if it comes next.
func (r *jsonReader) word(w string) bool {
	r.space()
	if r.err != nil || !bytes.HasPrefix(r.data[r.at:], []byte(w)) {
		return false
	}
	r.at += len(w)
	return true
}

// object calls value for each key; it has to read what the key stands for. A
// key whose value is null is as if it were not there.
func (r *jsonReader) object(known []string, value func(key string)) {
	r.key = ""
	if !r.take('{') {
		r.fail("must be an object")
		return
	}
	seen := 0 // a bit for each known key
	for more := !r.take('}'); more && r.err == nil; more = r.more('}') {
		r.key = ""
		key := r.text()
		i := slices.Index(known, key)
		switch {
		case r.err != nil:
		case i < 0:
			r.fail(fmt.Sprintf("unknown key %s; known are %s", quote(key), strings.Join(known, ", ")))
		case seen&(1<<i) != 0:
			r.fail("key " + quote(key) + " is given twice")
		case !r.take(':'):
			r.fail("a colon and a value must follow the key " + quote(key))
		}
		if r.err != nil {
			return
		}
		seen |= 1 << i
		r.key = key
		if !r.word("null") {
			value(key)
		}
	}
	r.key = ""
}

// list calls item for each element; it has to read it.
func (r *jsonReader) list(item func(i int)) {
	if !r.take('[') {
		r.fail("must be a list")
		return
	}
	i := 0
	for more := !r.take(']'); more && r.err == nil; more = r.more(']') {
		item(i)
		i++
	}
}

// more says whether another element follows, and reads what stands between.
func (r *jsonReader) more(end byte) bool {
	if r.err != nil || r.take(end) {
		return false
	}
	if r.take(',') {
		return true
	}
	r.fail("a comma or " + strconv.QuoteRune(rune(end)) + " is missing")
	return false
}

func (r *jsonReader) text() string {
	if !r.take('"') {
		r.fail("must be text in double quotes")
		return ""
	}
	begin, escaped := r.at, false
	for ; r.at < len(r.data); r.at++ {
		switch c := r.data[r.at]; {
		case c == '"':
			text := r.data[begin:r.at]
			r.at++
			return r.unescape(text, escaped)
		case c == '\\':
			escaped = true
			r.at++
		case c < ' ':
			r.fail("has a control character in a text")
			return ""
		}
	}
	r.fail("a text does not end")
	return ""
}

func (r *jsonReader) unescape(text []byte, escaped bool) string {
	if !utf8.Valid(text) {
		r.fail("is not UTF-8")
		return ""
	}
	if !escaped {
		return string(text)
	}
	var plain string
	if err := json.Unmarshal(slices.Concat([]byte{'"'}, text, []byte{'"'}), &plain); err != nil {
		r.fail("has a wrong escape in a text")
	}
	return plain
}

func (r *jsonReader) texts() []string {
	list := []string{}
	r.list(func(int) { list = append(list, r.text()) })
	return list
}

func (r *jsonReader) truth() bool {
	if r.word("true") {
		return true
	}
	if !r.word("false") {
		r.fail("must be true or false")
	}
	return false
}

// whole reads a whole number without an exponent.
func (r *jsonReader) whole(bits int) int64 {
	r.space()
	begin := r.at
	for r.err == nil && r.at < len(r.data) && bytes.IndexByte([]byte("+-.0123456789eE"), r.data[r.at]) >= 0 {
		r.at++
	}
	text := string(r.data[begin:r.at])
	n, err := strconv.ParseInt(text, 10, bits)
	// ParseInt takes what JSON does not: a plus, and zeros in front.
	if err != nil || strconv.FormatInt(n, 10) != text {
		r.fail("must be a whole number in range, in decimal digits")
		return 0
	}
	return n
}

func (r *jsonReader) duration() *time.Duration {
	text := r.text()
	d, err := time.ParseDuration(text)
	if err != nil {
		r.fail(`must be a duration, such as "90s" or "12h"`)
		return nil
	}
	return &d
}

package main

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// maxEntryFile is far more than any store of entries needs; it bounds what is
// held in memory of something that is no file of entries.
const maxEntryFile = 512 << 20

// entryFile is what `entry apply` reads: what `entry list -o json` prints, in
// JSON or YAML, and what people rather write.
type entryFile struct {
	Entries []fileEntry `yaml:"entries"`
}

// fileEntry is one entry as it stands in a file. What is left out is not there
// in the entry either: the server's default, no names, no end.
type fileEntry struct {
	ID                 string         `yaml:"id"`
	SPIFFEID           string         `yaml:"spiffe_id"`
	ParentID           string         `yaml:"parent_id"`
	Selectors          []string       `yaml:"selectors"`
	X509SVIDTTL        *time.Duration `yaml:"x509_svid_ttl"`
	X509SVIDTTLSeconds *int32         `yaml:"x509_svid_ttl_seconds"`
	DNSNames           []string       `yaml:"dns_names"`
	Hint               string         `yaml:"hint"`
	StoreSVID          bool           `yaml:"store_svid"`
	ExpiresAt          string         `yaml:"expires_at"`
	// The server's own: taken so that a list can be applied, and not used.
	CreatedAt     string `yaml:"created_at"`
	Revision      int64  `yaml:"revision"`
	StoreRevision int64  `yaml:"store_revision"`
}

// readFile returns the content of path, or standard input for "-", and the
// name by which messages call it.
func (t *tool) readFile(path string) (data []byte, called string, err error) {
	in, called := t.stdin, "standard input"
	if path != "-" {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, "", fault.New(fault.NotFound, "file_missing", "-f "+path+" does not exist")
		}
		if err != nil {
			return nil, "", diskFault("read", path, err)
		}
		defer func() { _ = f.Close() }()
		in, called = f, path
	}
	if data, err = io.ReadAll(io.LimitReader(in, maxEntryFile+1)); err != nil {
		return nil, "", diskFault("read", called, err)
	}
	if len(data) > maxEntryFile {
		return nil, "", fault.New(fault.Invalid, "file_too_large", called+" is larger than any file of entries")
	}
	return data, called, nil
}

// parseEntryFile reads a file of entries, strictly and whole: an error means
// that nothing of it may be used.
func parseEntryFile(called string, data []byte) ([]planned, error) {
	read := readYAMLEntries
	if isJSON(called, data) {
		read = readJSONEntries
	}
	list, err := read(called, data)
	if err != nil {
		return nil, err
	}
	plan := make([]planned, len(list))
	for i := range list {
		e, err := list[i].proto()
		if err != nil {
			return nil, malformed(called + ": " + entryAt(i) + ": " + fault.SafeText(err))
		}
		plan[i] = planned{want: e, key: entryKey(e)}
	}
	return plan, refuseRepeats(called, plan)
}

// isJSON goes by the file's name, else by how it begins.
func isJSON(called string, data []byte) bool {
	switch strings.ToLower(filepath.Ext(called)) {
	case ".json":
		return true
	case ".yaml", ".yml":
		return false
	}
	return bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{"))
}

func readYAMLEntries(called string, data []byte) ([]fileEntry, error) {
	// An empty document would decode to no entries. It rather is the output of
	// something that failed.
	file := entryFile{}
	if !utf8.Valid(data) {
		return nil, malformed(called + " is not UTF-8")
	}
	if err := daemon.Decode(called, data, &file); err != nil {
		return nil, malformed(fault.SafeText(err))
	}
	if file.Entries == nil {
		return nil, noEntries(called)
	}
	return file.Entries, nil
}

func noEntries(called string) error {
	return malformed(called + `: has no list "entries": see assay entry apply --help for the form`)
}

func malformed(text string) error { return fault.New(fault.Invalid, "file_malformed", text) }

func entryAt(i int) string { return "entries[" + strconv.Itoa(i) + "]" }

// proto checks what can be checked without the server and returns the entry as
// the API has it. The errors name the key.
func (f *fileEntry) proto() (*types.Entry, error) {
	e := &types.Entry{Id: f.ID, DnsNames: f.DNSNames, Hint: f.Hint, StoreSvid: f.StoreSVID}
	for _, need := range []struct {
		key, text string
		to        **types.SPIFFEID
	}{{"spiffe_id", f.SPIFFEID, &e.SpiffeId}, {"parent_id", f.ParentID, &e.ParentId}} {
		id, err := name.ParseID(need.text)
		switch {
		case need.text == "":
			return nil, malformed(need.key + " is missing")
		case err != nil:
			return nil, malformed(need.key + ": " + fault.SafeText(err))
		case id.Path() == "":
			return nil, malformed(need.key + ": has no path")
		}
		*need.to = idToProto(id)
	}
	var err error
	if e.Selectors, err = f.selectors(); err != nil {
		return nil, err
	}
	if e.X509SvidTtl, err = f.ttl(); err != nil {
		return nil, err
	}
	if f.ExpiresAt != "" && f.ExpiresAt != "never" {
		at, err := time.Parse(time.RFC3339, f.ExpiresAt)
		switch {
		case err != nil:
			return nil, malformed("expires_at must be a time as 2026-12-31T00:00:00Z, or never: a file has to mean the same each time it is applied")
		case at.Nanosecond() != 0 || at.Unix() <= 0:
			return nil, malformed("expires_at must be a whole second after 1970")
		}
		e.ExpiresAt = at.Unix()
	}
	return e, nil
}

// selectors are in canonical order without repetition, as the server keeps
// them.
func (f *fileEntry) selectors() ([]*types.Selector, error) {
	if len(f.Selectors) == 0 {
		return nil, malformed("selectors are missing: at least one, as in unix:uid:1000")
	}
	list := make([]selector.Selector, len(f.Selectors))
	for i, text := range f.Selectors {
		var err error
		if list[i], err = selector.Parse(text); err != nil {
			return nil, malformed("selectors[" + strconv.Itoa(i) + "]: " + fault.SafeText(err))
		}
	}
	set := selector.NewSet(list...)
	out := make([]*types.Selector, len(set))
	for i, s := range set {
		out[i] = &types.Selector{Type: s.Type, Value: s.Value}
	}
	return out, nil
}

func (f *fileEntry) ttl() (int32, error) {
	switch {
	case f.X509SVIDTTL != nil && f.X509SVIDTTLSeconds != nil:
		return 0, malformed("has both x509_svid_ttl and x509_svid_ttl_seconds: keep one")
	case f.X509SVIDTTL != nil:
		s, err := seconds("x509_svid_ttl", *f.X509SVIDTTL)
		if err != nil {
			return 0, malformed(fault.SafeText(err))
		}
		return s, nil
	case f.X509SVIDTTLSeconds == nil:
		return 0, nil
	case *f.X509SVIDTTLSeconds < 0:
		return 0, malformed("x509_svid_ttl_seconds can't be negative")
	}
	return *f.X509SVIDTTLSeconds, nil
}

// refuseRepeats refuses a file that says two things of one entry: which of them
// holds would depend on the order.
func refuseRepeats(called string, plan []planned) error {
	ids, keys := map[string]int{}, make(map[string]int, len(plan))
	for i := range plan {
		p := &plan[i]
		if first, twice := keys[p.key]; twice {
			return usageError(called + ": " + entryAt(i) + " has the SPIFFE ID, parent and selectors of " + entryAt(first) + ": keep one")
		}
		keys[p.key] = i
		id := p.want.GetId()
		if id == "" {
			continue
		}
		if first, twice := ids[id]; twice {
			return usageError(called + ": " + entryAt(i) + " has the id of " + entryAt(first) + ": keep one")
		}
		ids[id] = i
	}
	return nil
}

// entryKey is equal for entries with the same SPIFFE ID, parent and selectors
// in canonical order, and for no others: no part holds a zero byte.
func entryKey(e *types.Entry) string {
	size := 0
	for _, s := range e.GetSelectors() {
		size += len(s.GetType()) + len(s.GetValue()) + 2
	}
	spiffeID, parentID := e.GetSpiffeId(), e.GetParentId()
	b := make([]byte, 0, size+len(spiffeID.GetTrustDomain())+len(spiffeID.GetPath())+len(parentID.GetTrustDomain())+len(parentID.GetPath())+2)
	b = append(append(append(b, spiffeID.GetTrustDomain()...), spiffeID.GetPath()...), 0)
	b = append(append(append(b, parentID.GetTrustDomain()...), parentID.GetPath()...), 0)
	for _, s := range e.GetSelectors() {
		b = append(append(append(b, s.GetType()...), ':'), s.GetValue()...)
		b = append(b, 0)
	}
	return string(b)
}

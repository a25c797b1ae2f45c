package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/schedule"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

const (
	sealedName = "svids.sealed"
	// sealLabel is the purpose of the key that the state derives.
	sealLabel = "svids"
	sealMagic = "assay-svids-1\n"
	// sealPause is the shortest time between two writes. Writing may take a
	// tenth of the time, not more.
	sealPause    = time.Second
	maxSealPause = 5 * time.Second
	maxSealed    = 1 << 30
)

// sealed is what a restart needs.
type sealed struct {
	agentID  string
	epoch    string
	revision int64
	lastSync time.Time
	records  []sealedRecord
	pods     [][]byte // agentv1.Pod
}

// sealedRecord is an entry, with its SVID if it has one.
type sealedRecord struct {
	wire      []byte
	committed time.Time
	svid      *SVID
}

// sealLoop writes the sealed file after changes and once more at the end.
func (c *Cache) sealLoop(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			c.writeSealed(context.WithoutCancel(ctx))
			return
		case <-c.unsealed:
		}
		began := time.Now()
		if !c.writeSealed(ctx) {
			continue
		}
		took := time.Since(began)
		_ = schedule.Sleep(ctx, min(max(sealPause, 10*took), maxSealPause))
	}
}

// writeSealed seals the cache under the agent's current key and says whether
// it tried. Without a key, or after a ban, there is nothing to keep.
func (c *Cache) writeSealed(ctx context.Context) bool {
	content, ok := c.collect()
	if !ok {
		return false
	}
	keys, err := c.state.CacheKeys(sealLabel)
	if err == nil && len(keys) == 0 {
		return false
	}
	if err == nil {
		err = c.writeUnder(keys[0], content)
	}
	if err != nil {
		c.log.WarnContext(ctx, "could not seal the certificates: a restart of this agent during an outage of the server would lose them",
			slog.String("error", err.Error()))
	}
	return true
}

func (c *Cache) writeUnder(key state.CacheKey, content sealed) error {
	data, err := seal(key, c.td.Name(), content.encode())
	if err != nil {
		return err
	}
	if err := durable.WriteFile(c.file, data, 0o600); err != nil {
		return err
	}
	// A ban may have come in the meantime.
	c.mu.Lock()
	purged := c.purged
	c.noteOnDisk(content.records)
	c.mu.Unlock()
	if purged {
		return c.removeSealed()
	}
	return c.state.Resealed(sealLabel, key)
}

// noteOnDisk keeps what the sealed file would bring back. It is part of what
// the agent reports: until the file is written anew, an SVID that was replaced
// may come into use again.
func (c *Cache) noteOnDisk(records []sealedRecord) {
	c.onDisk = map[string]time.Time{}
	for _, r := range records {
		if r.svid != nil && r.svid.NotAfter.After(c.onDisk[r.svid.AuthorityID]) {
			c.onDisk[r.svid.AuthorityID] = r.svid.NotAfter
		}
	}
	signal(c.accountCh)
}

// collect copies references; encoding needs no lock.
func (c *Cache) collect() (sealed, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.synced || c.purged {
		return sealed{}, false
	}
	s := sealed{agentID: c.agentID, epoch: c.epoch, revision: c.revision, lastSync: c.lastSync, records: make([]sealedRecord, 0, len(c.entries))}
	if c.connected {
		s.lastSync = c.now()
	}
	for _, e := range c.entries {
		s.records = append(s.records, sealedRecord{wire: e.wire, committed: e.committed, svid: e.svid})
	}
	for _, p := range c.pods {
		s.pods = append(s.pods, p.wire)
	}
	return s, true
}

func (c *Cache) removeSealed() error {
	if err := os.Remove(c.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove sealed certificates: %w", err)
	}
	return durable.SyncDir(filepath.Dir(c.file))
}

// load takes over what the last run sealed. What can't be opened is of no use
// to anybody and is not worth stopping for: the server has it all.
func (c *Cache) load() {
	if c.bundle == nil {
		return
	}
	content, err := c.readSealed()
	if err != nil {
		c.log.WarnContext(context.Background(), "the sealed certificates of the last run can't be used; they come anew from the server",
			slog.String("file", c.file), slog.String("error", err.Error()))
		return
	}
	if content == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	at := c.now()
	c.agentID, c.epoch, c.revision, c.lastSync, c.synced = content.agentID, content.epoch, content.revision, content.lastSync, true
	c.restorePods(content.pods) // first: what is signed goes by them
	for _, r := range content.records {
		c.restore(r, at)
	}
	c.noteOnDisk(content.records)
}

// restore puts one record into the cache.
func (c *Cache) restore(r sealedRecord, at time.Time) {
	var from agentv1.Entry
	if proto.Unmarshal(r.wire, &from) != nil {
		return
	}
	f, err := parseEntry(&from, r.committed, c.td, c.reserved)
	if err != nil {
		return
	}
	e := &entry{facts: f, groups: map[*group]struct{}{}, wait: signBackoff}
	// An entry without SVID had its chance in the last run. If the server is
	// away now, the others of its group must not wait for it.
	e.attempted = true
	c.entries[f.id] = e
	c.link(e)
	if e.svid = r.svid; e.svid == nil {
		c.enqueue(e)
		return
	}
	e.svid.EntryID, e.svid.ID, e.svid.Hint = f.id, f.spiffeID, f.hint
	// One that has ended is kept too: it is why there is none to serve.
	if c.trusted(e.svid) && e.servable(at) {
		c.planRenewal(e)
	} else {
		c.enqueue(e)
	}
}

// readSealed opens the file with the current or the former key.
func (c *Cache) readSealed() (*sealed, error) {
	if _, err := os.Lstat(c.file); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	keys, err := c.state.CacheKeys(sealLabel)
	if err != nil {
		return nil, err
	}
	data, err := durable.ReadSecret(c.file, maxSealed)
	if err != nil {
		return nil, err
	}
	for _, key := range keys {
		plain, err := unseal(key, c.td.Name(), data)
		if err != nil {
			continue
		}
		return decodeSealed(plain)
	}
	return nil, errors.New("open: not sealed under this agent's key, or damaged")
}

// seal encrypts plain. Nonces are random: at one write per second and a new
// key every few hours their number stays far below 2^32.
func seal(key state.CacheKey, td string, plain []byte) ([]byte, error) {
	aead, err := key.AEAD()
	if err != nil {
		return nil, err
	}
	return aead.Seal([]byte(sealMagic), nil, plain, []byte(sealMagic+td)), nil //nolint:gosec // G407: the nonce is random, this AEAD makes it
}

func unseal(key state.CacheKey, td string, data []byte) ([]byte, error) {
	if len(data) < len(sealMagic) || string(data[:len(sealMagic)]) != sealMagic {
		return nil, errors.New("open: not a sealed file of this version")
	}
	aead, err := key.AEAD()
	if err != nil {
		return nil, err
	}
	return aead.Open(nil, nil, data[len(sealMagic):], []byte(sealMagic+td))
}

// The numbers of the fields in the sealed file, in protobuf's wire format.
const (
	fieldAgentID protowire.Number = iota + 1
	fieldEpoch
	fieldRevision
	fieldLastSync
	fieldRecord
	fieldPod
)

const (
	recordEntry protowire.Number = iota + 1
	recordCommitted
	recordChain
	recordKey
	recordNotAfter
	recordRenewAt
	recordLife
	recordAuthority
)

func (s sealed) encode() []byte {
	size := 256
	for _, pod := range s.pods {
		size += len(pod) + 8
	}
	for _, r := range s.records {
		size += len(r.wire) + 96
		if r.svid != nil {
			size += len(r.svid.CertificatesDER) + len(r.svid.Key.DER())
		}
	}
	b := make([]byte, 0, size)
	b = appendString(b, fieldAgentID, s.agentID)
	b = appendString(b, fieldEpoch, s.epoch)
	b = appendInt(b, fieldRevision, s.revision)
	b = appendTime(b, fieldLastSync, s.lastSync)
	var record []byte
	for _, r := range s.records {
		record = r.encode(record[:0])
		b = appendBytes(b, fieldRecord, record)
	}
	clear(record[:cap(record)]) // it held the last key
	for _, pod := range s.pods {
		b = appendBytes(b, fieldPod, pod)
	}
	return b
}

func (r sealedRecord) encode(b []byte) []byte {
	b = appendBytes(b, recordEntry, r.wire)
	b = appendTime(b, recordCommitted, r.committed)
	if r.svid == nil {
		return b
	}
	b = appendBytes(b, recordChain, r.svid.CertificatesDER)
	b = appendBytes(b, recordKey, r.svid.Key.DER())
	b = appendTime(b, recordNotAfter, r.svid.NotAfter)
	b = appendTime(b, recordRenewAt, r.svid.renewAt)
	b = appendInt(b, recordLife, int64(r.svid.life))
	return appendString(b, recordAuthority, r.svid.AuthorityID)
}

func appendString(b []byte, n protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

func appendBytes(b []byte, n protowire.Number, v []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
}

func appendInt(b []byte, n protowire.Number, v int64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), uint64(v))
}

// appendTime leaves a zero time out.
func appendTime(b []byte, n protowire.Number, t time.Time) []byte {
	if t.IsZero() {
		return b
	}
	return appendInt(b, n, t.UnixNano())
}

// eachField calls do with every field of a message.
func eachField(b []byte, do func(n protowire.Number, number int64, value []byte) error) error {
	for len(b) > 0 {
		n, typ, size := protowire.ConsumeTag(b)
		if size < 0 {
			return protowire.ParseError(size)
		}
		b = b[size:]
		var number uint64
		var value []byte
		switch typ {
		case protowire.VarintType:
			number, size = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			value, size = protowire.ConsumeBytes(b)
		default:
			return errors.New("decode: unknown type of field")
		}
		if size < 0 {
			return protowire.ParseError(size)
		}
		b = b[size:]
		if err := do(n, int64(number), value); err != nil {
			return err
		}
	}
	return nil
}

func decodeSealed(b []byte) (*sealed, error) {
	s := &sealed{}
	err := eachField(b, func(n protowire.Number, number int64, value []byte) error {
		switch n {
		case fieldAgentID:
			s.agentID = string(value)
		case fieldEpoch:
			s.epoch = string(value)
		case fieldRevision:
			s.revision = number
		case fieldLastSync:
			s.lastSync = time.Unix(0, number)
		case fieldRecord:
			r, err := decodeRecord(value)
			if err != nil {
				return err
			}
			s.records = append(s.records, r)
		case fieldPod:
			s.pods = append(s.pods, bytes.Clone(value))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("decode sealed certificates: %w", err)
	}
	return s, nil
}

func decodeRecord(b []byte) (sealedRecord, error) {
	var r sealedRecord
	svid := &SVID{}
	// Copies, so that no record keeps all the others in memory.
	err := eachField(b, func(n protowire.Number, number int64, value []byte) error {
		switch n {
		case recordEntry:
			r.wire = bytes.Clone(value)
		case recordCommitted:
			r.committed = time.Unix(0, number)
		case recordChain:
			svid.CertificatesDER = bytes.Clone(value)
		case recordKey:
			svid.Key = NewPrivateKey(bytes.Clone(value))
		case recordNotAfter:
			svid.NotAfter = time.Unix(0, number)
		case recordRenewAt:
			svid.renewAt = time.Unix(0, number)
		case recordLife:
			svid.life = time.Duration(number)
		case recordAuthority:
			svid.AuthorityID = string(value)
		}
		return nil
	})
	if len(svid.CertificatesDER) > 0 && len(svid.Key.DER()) > 0 {
		r.svid = svid
	}
	return r, err
}

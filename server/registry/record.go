package registry

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/store"
)

// schema is the version of the records of this package, but for agents: theirs
// have had the evidence since version 2.
const (
	schema      = 1
	agentSchema = 2
)

const (
	epochKey      = "registry/epoch"
	restoredKey   = "registry/restored"
	entryPrefix   = "entry/"
	entryIxPrefix = "entryix/"
	agentPrefix   = "agent/"
	tokenPrefix   = "token/"
)

func entryKey(id string) string { return entryPrefix + id }

// agentKey is unique per agent: the trust domain of a store is fixed, and the
// path of a SPIFFE ID has only bytes that are safe in any key.
func agentKey(id spiffeid.ID) string {
	return agentPrefix + strings.TrimPrefix(id.Path(), "/")
}

// similarity is equal for entries with the same SPIFFE ID, parent and
// selectors, and for no others.
type similarity [sha256.Size]byte

func similarityOf(e *Entry) similarity {
	text := make([]byte, 0, 512)
	for _, part := range []string{e.SPIFFEID.String(), e.ParentID.String()} {
		text = append(append(text, part...), 0)
	}
	for _, s := range e.Selectors {
		text = append(append(text, s.Type...), 0)
		text = append(append(text, s.Value...), 0)
	}
	return sha256.Sum256(text) // no part holds a zero byte
}

func (s similarity) key() string { return entryIxPrefix + hex.EncodeToString(s[:]) }

// short is the part that the mirror indexes by; it checks what it finds.
func (s similarity) short() uint64 { return binary.BigEndian.Uint64(s[:8]) }

// epochRecord names the history of a store and what its records presuppose.
type epochRecord struct {
	Epoch          string `json:"epoch"`
	TrustDomain    string `json:"trust_domain"`
	ReservedPrefix string `json:"reserved_prefix"`
}

// indexRecord says which entry a similarity belongs to.
type indexRecord struct {
	EntryID string `json:"entry_id"`
}

// entryRecord is an entry without its id, which is in the key.
type entryRecord struct {
	SPIFFEID    string   `json:"spiffe_id"`
	ParentID    string   `json:"parent_id"`
	Selectors   []string `json:"selectors"`
	X509SVIDTTL int64    `json:"x509_svid_ttl_ms,omitempty"`
	DNSNames    []string `json:"dns_names,omitempty"`
	Hint        string   `json:"hint,omitempty"`
	StoreSVID   bool     `json:"store_svid,omitempty"`
	ExpiresAt   int64    `json:"expires_at_ms,omitempty"`
	CreatedAt   int64    `json:"created_at_ms"`
	Revision    int64    `json:"revision,omitempty"`
}

func encodeEntry(e *Entry) ([]byte, error) {
	data, err := store.Encode(schema, entryRecord{
		SPIFFEID: e.SPIFFEID.String(), ParentID: e.ParentID.String(), Selectors: selectorTexts(e.Selectors),
		X509SVIDTTL: e.X509SVIDTTL.Milliseconds(), DNSNames: e.DNSNames, Hint: e.Hint, StoreSVID: e.StoreSVID,
		ExpiresAt: millis(e.ExpiresAt), CreatedAt: millis(e.CreatedAt), Revision: e.Revision,
	})
	if err != nil {
		return nil, fmt.Errorf("encode entry: %w", err)
	}
	if len(data) > maxEntryBytes {
		return nil, fault.Newf(fault.Invalid, "entry_too_large",
			"the entry takes %d bytes and the most is %d: fewer selectors or names", len(data), maxEntryBytes)
	}
	return data, nil
}

// decodeEntry reads the entry of a record and holds it to the rules again. A
// lifetime over today's cap is cut to it: the cap may have been lowered since.
func (r rules) decodeEntry(rec store.Record) (Entry, error) {
	var in entryRecord
	if err := store.Decode(rec.Value, schema, &in); err != nil {
		return Entry{}, fmt.Errorf("decode %s: %w", rec.Key, err)
	}
	e := Entry{
		ID:          strings.TrimPrefix(rec.Key, entryPrefix),
		X509SVIDTTL: min(time.Duration(in.X509SVIDTTL)*time.Millisecond, r.maxTTL),
		DNSNames:    in.DNSNames, Hint: in.Hint, StoreSVID: in.StoreSVID,
		ExpiresAt: fromMillis(in.ExpiresAt), CreatedAt: fromMillis(in.CreatedAt), Revision: in.Revision,
	}
	var err error // of the form only; check is strict about the rest
	if e.SPIFFEID, err = spiffeid.FromString(in.SPIFFEID); err != nil {
		return Entry{}, corrupt(rec.Key, err)
	}
	if e.ParentID, err = spiffeid.FromString(in.ParentID); err != nil {
		return Entry{}, corrupt(rec.Key, err)
	}
	if e.Selectors, err = parseSelectors(in.Selectors); err != nil {
		return Entry{}, corrupt(rec.Key, err)
	}
	if err := r.check(&e); err != nil {
		return Entry{}, corrupt(rec.Key, err)
	}
	return e, nil
}

// agentRecord is an Agent as the store keeps it.
type agentRecord struct {
	ID               string   `json:"id"`
	Attestor         string   `json:"attestor"`
	Selectors        []string `json:"selectors,omitempty"`
	ActiveSerial     string   `json:"active_serial,omitempty"`
	ActiveKey        string   `json:"active_key,omitempty"`
	NotAfter         int64    `json:"not_after_ms,omitempty"`
	PendingSerial    string   `json:"pending_serial,omitempty"`
	PendingKey       string   `json:"pending_key,omitempty"`
	PendingNotAfter  int64    `json:"pending_not_after_ms,omitempty"`
	Authority        string   `json:"authority,omitempty"`
	PendingAuthority string   `json:"pending_authority,omitempty"`
	Evidence         string   `json:"evidence,omitempty"`
	EvidenceKey      string   `json:"evidence_key,omitempty"`
	Banned           bool     `json:"banned,omitempty"`
	CanReattest      bool     `json:"can_reattest,omitempty"`
	AttestedAt       int64    `json:"attested_at_ms"`
}

func encodeAgent(a *Agent) ([]byte, error) {
	data, err := store.Encode(agentSchema, agentRecord{
		ID: a.ID.String(), Attestor: a.Attestor, Selectors: selectorTexts(a.Selectors),
		ActiveSerial: a.ActiveSerial, ActiveKey: a.ActiveKey, NotAfter: millis(a.NotAfter),
		PendingSerial: a.PendingSerial, PendingKey: a.PendingKey, PendingNotAfter: millis(a.PendingNotAfter),
		Authority: a.Authority, PendingAuthority: a.PendingAuthority, Evidence: a.Evidence, EvidenceKey: a.EvidenceKey,
		Banned: a.Banned, CanReattest: a.CanReattest, AttestedAt: millis(a.AttestedAt),
	})
	if err != nil {
		return nil, fmt.Errorf("encode agent: %w", err)
	}
	return data, nil
}

func (r rules) decodeAgent(rec store.Record) (Agent, error) {
	var in agentRecord
	if err := store.Decode(rec.Value, agentSchema, &in); err != nil {
		return Agent{}, fmt.Errorf("decode %s: %w", rec.Key, err)
	}
	id, err := name.ParseID(in.ID)
	if err != nil {
		return Agent{}, corrupt(rec.Key, err)
	}
	if agentKey(id) != rec.Key || !id.MemberOf(r.trustDomain) {
		return Agent{}, corrupt(rec.Key, errors.New("the record is of another agent"))
	}
	selectors, err := parseSelectors(in.Selectors)
	if err == nil && len(selectors) > 0 {
		err = checkSelectors(selectors)
	}
	if err != nil {
		return Agent{}, corrupt(rec.Key, err)
	}
	return Agent{
		ID: id, Attestor: in.Attestor, Selectors: selectors,
		ActiveSerial: in.ActiveSerial, ActiveKey: in.ActiveKey, NotAfter: fromMillis(in.NotAfter),
		PendingSerial: in.PendingSerial, PendingKey: in.PendingKey, PendingNotAfter: fromMillis(in.PendingNotAfter),
		Authority: in.Authority, PendingAuthority: in.PendingAuthority, Evidence: in.Evidence, EvidenceKey: in.EvidenceKey,
		Banned: in.Banned, CanReattest: in.CanReattest, AttestedAt: fromMillis(in.AttestedAt),
	}, nil
}

// tokenRecord is a join token; its hash is in the key. RedeemedAt and
// RedeemedBy are set once and never again.
type tokenRecord struct {
	ExpiresAt  int64  `json:"expires_at_ms"`
	RedeemedAt int64  `json:"redeemed_at_ms,omitempty"`
	RedeemedBy string `json:"redeemed_by,omitempty"`
}

func decodeToken(rec store.Record) (tokenRecord, error) {
	var in tokenRecord
	if err := store.Decode(rec.Value, schema, &in); err != nil {
		return tokenRecord{}, fmt.Errorf("decode a join token: %w", err)
	}
	return in, nil
}

func selectorTexts(set selector.Set) []string {
	texts := make([]string, len(set))
	for i, s := range set {
		texts[i] = s.String()
	}
	return texts
}

// parseSelectors reads what selectorTexts made; checkSelectors is still to come.
func parseSelectors(texts []string) (selector.Set, error) {
	list := make([]selector.Selector, len(texts))
	for i, text := range texts {
		typ, value, ok := strings.Cut(text, ":")
		if !ok {
			return nil, errors.New("a selector has no colon")
		}
		list[i] = selector.Selector{Type: typ, Value: value}
	}
	return selector.NewSet(list...), nil
}

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

func corrupt(key string, cause error) error {
	return fault.Wrap(fault.Precondition, cause, "store_corrupt",
		"record "+key+" breaks the rules of its kind; restore the store from a backup")
}

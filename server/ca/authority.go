package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/keys"
	"github.com/seed-caa81108/assay/server/store"
)

// State is where in its life an authority is.
type State string

// The states. Exactly one root is active.
const (
	Prepared State = "prepared" // in the bundle, signs nothing yet
	Active   State = "active"   // in the bundle, signs
	Retired  State = "retired"  // in the bundle, signs nothing any more
	Tainted  State = "tainted"  // retired, and what it signed is replaced at once
	Revoked  State = "revoked"  // out of the bundle, the key is gone
)

var states = []State{Prepared, Active, Retired, Tainted, Revoked}

func (s State) published() bool { return s != Revoked }

const (
	authorityPrefix = "authority/"
	rootPrefix      = authorityPrefix + "x509/"
	// loadTries bounds the reads of a set of records that keeps changing.
	loadTries = 10
)

// authorityRecord is what the store holds of a root.
type authorityRecord struct {
	ID          string    `json:"id"`
	State       State     `json:"state"`
	Certificate []byte    `json:"certificate"` // DER
	KeyRef      []byte    `json:"key_ref"`     // nil once the key is destroyed
	CreatedAt   time.Time `json:"created_at"`
	Marks       marks     `json:"marks"`
	// Published is the sequence of the first bundle with the root, Operation
	// the rotation that made it.
	Published uint64 `json:"published"`
	Operation string `json:"operation"`
	// HandedBefore is when the last certificate ends that was handed out
	// without a stream before this root was published.
	HandedBefore time.Time `json:"handed_before"`
	Moves        []Move    `json:"moves"` // oldest first
}

// authority is a record that has been verified.
type authority struct {
	record   authorityRecord
	cert     *x509.Certificate
	raw      []byte // the stored value
	revision int64
}

// view is the verified content of the store at one sequence. It is not changed
// after it was made.
type view struct {
	sequence    uint64
	authorities []*authority // sorted by id
	active      *authority

	sequenceRaw      []byte
	sequenceRevision int64
	listed           int64 // revision of the store when the authorities were read
}

// load reads and verifies all records. Without any it returns nil.
func (a *Authority) load(ctx context.Context) (*view, error) {
	for range loadTries {
		before, err := a.readSequence(ctx)
		if err != nil {
			return nil, err
		}
		page, err := a.store.List(ctx, authorityPrefix, "", 0)
		if err != nil {
			return nil, err
		}
		after, err := a.readSequence(ctx)
		if err != nil {
			return nil, err
		}
		// States change only together with the sequence, so an unchanged
		// sequence means that the list is of one moment.
		if before.Revision == after.Revision {
			return a.verify(before, page)
		}
	}
	return nil, fault.New(fault.NotReady, "store_busy", "the authority records change faster than they can be read: try again")
}

func (a *Authority) readSequence(ctx context.Context) (store.Record, error) {
	record, err := a.store.Get(ctx, sequenceKey)
	if errors.Is(err, fault.NotFound) {
		return store.Record{Key: sequenceKey}, nil
	}
	return record, err
}

// verify turns stored records into a view, or says what is wrong with them.
func (a *Authority) verify(sequence store.Record, page store.Page) (*view, error) {
	if len(page.Records) == 0 && sequence.Revision == 0 {
		return nil, nil
	}
	if len(page.Records) == 0 || sequence.Revision == 0 {
		return nil, corrupt("the store has %d authorities and a sequence record of revision %d: one of the two is lost", len(page.Records), sequence.Revision)
	}
	v := &view{
		authorities: make([]*authority, 0, len(page.Records)),
		sequenceRaw: sequence.Value, sequenceRevision: sequence.Revision, listed: page.Revision,
	}
	for _, record := range page.Records {
		one, err := a.openAuthority(record)
		if err != nil {
			return nil, err
		}
		v.authorities = append(v.authorities, one)
		if one.record.State != Active {
			continue
		}
		if v.active != nil {
			return nil, corrupt("the store has two active roots")
		}
		v.active = one
	}
	if v.active == nil {
		return nil, corrupt("the store has no active root")
	}
	sortAuthorities(v.authorities)
	var seq sequenceRecord
	if err := a.stamp.open(sequenceKey, sequence.Value, &seq); err != nil {
		return nil, err
	}
	if !bytes.Equal(seq.Digest, digestStates(v.authorities)) {
		return nil, corrupt("the authorities are not those of sequence %d: a record was added, removed or put back", seq.Sequence)
	}
	v.sequence = seq.Sequence
	return v, nil
}

// openAuthority verifies one record, or recognises the one it verified before.
func (a *Authority) openAuthority(record store.Record) (*authority, error) {
	if cur := a.current.Load(); cur != nil {
		for _, known := range cur.view.authorities {
			if rootPrefix+known.record.ID == record.Key && known.revision == record.Revision && bytes.Equal(known.raw, record.Value) {
				return known, nil
			}
		}
	}
	id, ok := strings.CutPrefix(record.Key, rootPrefix)
	if !ok {
		return nil, corrupt("record %q is no authority that this program knows", record.Key)
	}
	one := &authority{raw: record.Value, revision: record.Revision}
	if err := a.stamp.open(record.Key, record.Value, &one.record); err != nil {
		return nil, err
	}
	if one.record.ID != id || !slices.Contains(states, one.record.State) {
		return nil, corrupt("record %s does not describe the authority it is named after", record.Key)
	}
	cert, err := x509.ParseCertificate(one.record.Certificate)
	if err != nil {
		return nil, corrupt("record %s holds no certificate", record.Key)
	}
	one.cert = cert
	return one, a.checkRoot(id, cert)
}

// checkRoot says whether cert can be the root of our trust domain filed under
// id. Its lifetime is not judged: the configuration may have changed since.
func (a *Authority) checkRoot(id string, cert *x509.Certificate) error {
	got, err := keys.ID(cert.PublicKey)
	if err != nil || got != id || hex.EncodeToString(cert.SubjectKeyId) != id {
		return corrupt("the certificate of authority %s has another key", id)
	}
	if err := cert.CheckSignatureFrom(cert); err != nil {
		return corrupt("the certificate of authority %s is not a self-signed root", id)
	}
	if len(cert.URIs) != 1 {
		return corrupt("the certificate of authority %s names no trust domain", id)
	}
	named, err := spiffeid.FromURI(cert.URIs[0])
	if err != nil {
		return corrupt("the certificate of authority %s names no trust domain", id)
	}
	// X509-16, X509-17, ID-21
	if named != a.td.ID() {
		return fault.Newf(fault.Precondition, "trust_domain_mismatch",
			"the store belongs to %s and trust_domain is %s: set the former, or use another store", named, a.td.Name())
	}
	return nil
}

// checkForward refuses a view that is older than the one it would replace: the
// store went back in time, or somebody put old records back.
func checkForward(from, to *view) error {
	if to == nil {
		return corrupt("all authority records have vanished from the store")
	}
	if to.sequence < from.sequence {
		return corrupt("the bundle's sequence went back from %d to %d", from.sequence, to.sequence)
	}
	if to.sequence == from.sequence && !bytes.Equal(digestStates(from.authorities), digestStates(to.authorities)) {
		return corrupt("the authorities changed and the bundle's sequence %d did not", to.sequence)
	}
	for _, now := range to.authorities {
		before := from.find(now.record.ID)
		if before != nil && !now.record.Marks.covers(before.record.Marks) {
			return corrupt("the record of authority %s went back in time", now.record.ID)
		}
	}
	return nil
}

func sortAuthorities(all []*authority) {
	slices.SortFunc(all, func(x, y *authority) int { return strings.Compare(x.record.ID, y.record.ID) })
}

func (v *view) find(id string) *authority {
	for _, one := range v.authorities {
		if one.record.ID == id {
			return one
		}
	}
	return nil
}

// replace returns a copy of the view with one authority in another version.
func (v *view) replace(one *authority) *view {
	changed := *v
	changed.authorities = slices.Clone(v.authorities)
	for i, old := range changed.authorities {
		if old.record.ID == one.record.ID {
			changed.authorities[i] = one
		}
	}
	if changed.active.record.ID == one.record.ID {
		changed.active = one
	}
	return &changed
}

package api

import (
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/registry"
)

// entryFromProto reads an entry to be created. Its rules are the registry's;
// here only what an Entry can't express is refused.
func entryFromProto(td spiffeid.TrustDomain, p *types.Entry) (registry.Entry, error) {
	e := registry.Entry{ID: p.GetId()}
	change, err := entryChange(td, p, everyField)
	if err != nil {
		return registry.Entry{}, err
	}
	change(&e)
	return e, nil
}

// everyField is the input mask that names all fields.
var everyField = &types.EntryMask{
	SpiffeId: true, ParentId: true, Selectors: true, X509SvidTtl: true, FederatesWith: true, Admin: true, Downstream: true,
	ExpiresAt: true, DnsNames: true, StoreSvid: true, JwtSvidTtl: true, Hint: true, AdditionalAttributes: true,
}

// entryChange returns what the fields of p that mask names do to an entry.
//
// Fields that are not honoured yet (federates_with, jwt_svid_ttl,
// additional_attributes) are not kept, so they come back empty. Those whose
// loss would widen a right are refused: an entry that is not admin or
// downstream is not what was asked for.
func entryChange(td spiffeid.TrustDomain, p *types.Entry, mask *types.EntryMask) (func(*registry.Entry), error) {
	if err := refuseUnsupported(p, mask); err != nil {
		return nil, err
	}
	var spiffeID, parentID spiffeid.ID
	var selectors selector.Set
	var err error
	if mask.GetSpiffeId() {
		if spiffeID, err = idFromProto(td, "spiffe_id", p.GetSpiffeId()); err != nil {
			return nil, err
		}
	}
	if mask.GetParentId() {
		if parentID, err = idFromProto(td, "parent_id", p.GetParentId()); err != nil {
			return nil, err
		}
	}
	if mask.GetSelectors() {
		if selectors, err = selectorsFromProto(p.GetSelectors()); err != nil {
			return nil, err
		}
	}
	expiresAt, err := expiryFromProto(p.GetExpiresAt())
	if err != nil && mask.GetExpiresAt() {
		return nil, err
	}
	return func(e *registry.Entry) {
		if mask.GetSpiffeId() {
			e.SPIFFEID = spiffeID
		}
		if mask.GetParentId() {
			e.ParentID = parentID
		}
		if mask.GetSelectors() {
			e.Selectors = selectors
		}
		if mask.GetX509SvidTtl() {
			e.X509SVIDTTL = time.Duration(p.GetX509SvidTtl()) * time.Second
		}
		if mask.GetExpiresAt() {
			e.ExpiresAt = expiresAt
		}
		if mask.GetDnsNames() {
			e.DNSNames = slices.Clone(p.GetDnsNames())
		}
		if mask.GetHint() {
			e.Hint = p.GetHint()
		}
		if mask.GetStoreSvid() {
			e.StoreSVID = p.GetStoreSvid()
		}
	}, nil
}

func refuseUnsupported(p *types.Entry, mask *types.EntryMask) error {
	switch {
	case mask.GetAdmin() && p.GetAdmin():
		return fault.New(fault.Invalid, "entry_admin_unsupported", "this server does not support admin entries: leave it out")
	case mask.GetDownstream() && p.GetDownstream():
		return fault.New(fault.Invalid, "entry_downstream_unsupported", "this server does not support downstream entries: leave it out")
	}
	return nil
}

func expiryFromProto(seconds int64) (time.Time, error) {
	const year9999 = 253402300799
	switch {
	case seconds == 0:
		return time.Time{}, nil
	case seconds < 0 || seconds > year9999:
		return time.Time{}, fault.New(fault.Invalid, "expires_at_invalid", "expires_at is in seconds since 1970; 0 is an entry that stays")
	}
	return time.Unix(seconds, 0), nil
}

func entryToProto(e *registry.Entry) *types.Entry {
	return &types.Entry{
		Id: e.ID, SpiffeId: idToProto(e.SPIFFEID), ParentId: idToProto(e.ParentID), Selectors: selectorsToProto(e.Selectors),
		X509SvidTtl: int32(e.X509SVIDTTL / time.Second), DnsNames: e.DNSNames, Hint: e.Hint, StoreSvid: e.StoreSVID,
		ExpiresAt: unixSeconds(e.ExpiresAt), CreatedAt: unixSeconds(e.CreatedAt), RevisionNumber: e.Revision,
	}
}

// unixSeconds is t as SPIRE's API writes it; zero for none.
func unixSeconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

package api

import (
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// idFromProto reads a SPIFFE ID of trust domain td that has a path. Nothing is
// normalised: what is not already in its only form is refused (SPIFFE-ID
// section 2). The text of the fault says which rule was broken and never
// repeats the ID.
func idFromProto(td spiffeid.TrustDomain, what string, p *types.SPIFFEID) (spiffeid.ID, error) {
	switch {
	case p == nil || (p.GetTrustDomain() == "" && p.GetPath() == ""):
		return spiffeid.ID{}, invalidID(what, "is missing")
	case p.GetTrustDomain() != td.Name():
		return spiffeid.ID{}, invalidID(what, "is not in trust domain "+td.Name())
	case p.GetPath() == "":
		return spiffeid.ID{}, invalidID(what, "has no path")
	case p.GetPath()[0] != '/':
		return spiffeid.ID{}, invalidID(what, "has a path without a leading slash")
	}
	id, err := name.ParseID("spiffe://" + p.GetTrustDomain() + p.GetPath())
	if err != nil {
		return spiffeid.ID{}, fault.New(fault.KindOf(err), fault.ReasonOf(err), what+": "+fault.SafeText(err))
	}
	return id, nil
}

func invalidID(what, rule string) error {
	return fault.New(fault.Invalid, "spiffe_id_invalid", what+" "+rule)
}

func idToProto(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

func selectorsFromProto(list []*types.Selector) (selector.Set, error) {
	out := make([]selector.Selector, 0, len(list))
	for _, p := range list {
		s := selector.Selector{Type: p.GetType(), Value: p.GetValue()}
		if err := s.Check(); err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return selector.NewSet(out...), nil
}

func selectorsToProto(set selector.Set) []*types.Selector {
	out := make([]*types.Selector, len(set))
	for i, s := range set {
		out[i] = &types.Selector{Type: s.Type, Value: s.Value}
	}
	return out
}

// itemStatus is the status of one item of a batch: a google.rpc code with
// reason and safe text.
func itemStatus(err error) *types.Status {
	if err == nil {
		return &types.Status{Message: "OK"}
	}
	return &types.Status{
		Code:    int32(fault.Code(fault.KindOf(err))),
		Message: fault.ReasonOf(err) + ": " + fault.SafeText(err),
	}
}

// isUnder says whether id's path lies below prefix, which ends in a slash.
func isUnder(id spiffeid.ID, prefix string) bool {
	return strings.HasPrefix(id.Path(), prefix) && len(id.Path()) > len(prefix)
}

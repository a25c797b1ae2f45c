package api

import (
	"context"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/server/ca"
)

// BundleService is what SPIRE's bundle API says about our own bundle. It is a
// projection of the authority records (I3), so nothing is written to it here.
type BundleService struct {
	bundlev1.UnimplementedBundleServer
	authority *ca.Authority
}

// NewBundleService returns the service.
func NewBundleService(authority *ca.Authority) *BundleService {
	return &BundleService{authority: authority}
}

// GetBundle implements bundlev1.BundleServer.
func (s *BundleService) GetBundle(_ context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	b := s.authority.Bundle()
	out := &types.Bundle{TrustDomain: b.TrustDomain.Name(), SequenceNumber: b.Sequence}
	for _, root := range b.Roots {
		out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{
			Asn1: root.Certificate.Raw, Tainted: root.State == ca.Tainted,
		})
	}
	return maskBundle(out, req.GetOutputMask()), nil
}

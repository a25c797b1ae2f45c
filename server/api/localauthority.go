package api

import (
	"context"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"

	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/rotation"
)

// LocalAuthorityService is the X.509 part of SPIRE's local authority API. Its
// steps pass the same gates as a rotation, which SPIRE does not have: a step
// that would cut somebody off is FailedPrecondition.
type LocalAuthorityService struct {
	localauthorityv1.UnimplementedLocalAuthorityServer
	authority *ca.Authority
	rotator   *rotation.Rotator
}

// NewLocalAuthorityService returns the service.
func NewLocalAuthorityService(authority *ca.Authority, rotator *rotation.Rotator) *LocalAuthorityService {
	return &LocalAuthorityService{authority: authority, rotator: rotator}
}

// GetX509AuthorityState implements localauthorityv1.LocalAuthorityServer. Old
// is the root that was replaced last.
func (s *LocalAuthorityService) GetX509AuthorityState(context.Context, *localauthorityv1.GetX509AuthorityStateRequest) (*localauthorityv1.GetX509AuthorityStateResponse, error) {
	resp := &localauthorityv1.GetX509AuthorityStateResponse{}
	for _, root := range s.authority.Authorities() {
		switch root.State {
		case ca.Active:
			resp.Active = authorityState(root)
		case ca.Prepared:
			resp.Prepared = authorityState(root)
		case ca.Retired, ca.Tainted:
			resp.Old = authorityState(root)
		}
	}
	return resp, nil
}

// PrepareX509Authority implements localauthorityv1.LocalAuthorityServer.
func (s *LocalAuthorityService) PrepareX509Authority(ctx context.Context, _ *localauthorityv1.PrepareX509AuthorityRequest) (*localauthorityv1.PrepareX509AuthorityResponse, error) {
	by, err := request(ctx, "")
	if err != nil {
		return nil, err
	}
	root, err := s.rotator.Prepare(ctx, by)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.PrepareX509AuthorityResponse{PreparedAuthority: authorityState(root)}, nil
}

// ActivateX509Authority implements localauthorityv1.LocalAuthorityServer.
func (s *LocalAuthorityService) ActivateX509Authority(ctx context.Context, req *localauthorityv1.ActivateX509AuthorityRequest) (*localauthorityv1.ActivateX509AuthorityResponse, error) {
	by, err := request(ctx, "")
	if err != nil {
		return nil, err
	}
	root, err := s.rotator.Activate(ctx, by, req.GetAuthorityId(), false)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.ActivateX509AuthorityResponse{ActivatedAuthority: authorityState(root)}, nil
}

// TaintX509Authority implements localauthorityv1.LocalAuthorityServer.
func (s *LocalAuthorityService) TaintX509Authority(ctx context.Context, req *localauthorityv1.TaintX509AuthorityRequest) (*localauthorityv1.TaintX509AuthorityResponse, error) {
	by, err := request(ctx, "")
	if err != nil {
		return nil, err
	}
	root, err := s.rotator.Taint(ctx, by, req.GetAuthorityId())
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.TaintX509AuthorityResponse{TaintedAuthority: authorityState(root)}, nil
}

// RevokeX509Authority implements localauthorityv1.LocalAuthorityServer.
func (s *LocalAuthorityService) RevokeX509Authority(ctx context.Context, req *localauthorityv1.RevokeX509AuthorityRequest) (*localauthorityv1.RevokeX509AuthorityResponse, error) {
	by, err := request(ctx, "")
	if err != nil {
		return nil, err
	}
	root, err := s.rotator.Revoke(ctx, by, req.GetAuthorityId(), false)
	if err != nil {
		return nil, err
	}
	return &localauthorityv1.RevokeX509AuthorityResponse{RevokedAuthority: authorityState(root)}, nil
}

func authorityState(root ca.Root) *localauthorityv1.AuthorityState {
	return &localauthorityv1.AuthorityState{AuthorityId: root.ID, ExpiresAt: root.Certificate.NotAfter.Unix()}
}

package api

import (
	"context"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
)

// SVIDService is the operators' part of SPIRE's SVID API. Here alone the name
// of a certificate comes from the one who asks (ADR 8): an operator of this
// host, who could register the same identity.
type SVIDService struct {
	svidv1.UnimplementedSVIDServer
	authority *ca.Authority
	audit     Auditor
}

// NewSVIDService returns the service.
func NewSVIDService(authority *ca.Authority, log Auditor) *SVIDService {
	return &SVIDService{authority: authority, audit: log}
}

// mintRule is by which rule a certificate was minted, in the audit log.
const mintRule = "mint"

// MintX509SVID implements svidv1.SVIDServer. The life that is asked for is a
// wish: it is cut to the cap, as SPIRE's is to what its CA allows.
func (s *SVIDService) MintX509SVID(ctx context.Context, req *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	asked, err := mintRequest(req)
	if err != nil {
		return nil, s.refuse(ctx, asked, err)
	}
	svids, err := s.authority.IssueX509(ctx, origin(ctx), []ca.X509Request{asked})
	if err != nil {
		return nil, s.refuse(ctx, asked, err)
	}
	minted := svids[0]
	if minted.Err != nil {
		return nil, minted.Err // its line is written
	}
	return &svidv1.MintX509SVIDResponse{Svid: &types.X509SVID{
		CertChain: minted.Chain, Id: idToProto(asked.ID), ExpiresAt: minted.NotAfter.Unix(),
	}}, nil
}

func mintRequest(req *svidv1.MintX509SVIDRequest) (ca.X509Request, error) {
	csr, err := ca.ParseNamedCSR(req.GetCsr())
	out := ca.X509Request{
		Kind: ca.Minted, ID: csr.ID, PublicKey: csr.PublicKey, DNSNames: csr.DNSNames,
		TTL: time.Duration(req.GetTtl()) * time.Second, Rule: mintRule,
	}
	switch {
	case err != nil:
		return out, err
	case req.GetTtl() < 0:
		return out, fault.New(fault.Invalid, "ttl_out_of_range", "a lifetime can't be negative: leave ttl out for the default")
	}
	return out, nil
}

// refuse writes down why nothing was signed.
func (s *SVIDService) refuse(ctx context.Context, asked ca.X509Request, err error) error {
	line := audit.Line{
		Origin: origin(ctx), Action: "x509_svid.issue", Target: audit.Target{SPIFFEID: idText(asked.ID)},
		Why: audit.Why{Rule: mintRule}, Result: result(err),
	}
	if aerr := record(ctx, s.audit, line); aerr != nil {
		return aerr
	}
	return err
}

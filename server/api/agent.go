package api

import (
	"context"
	"crypto"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/attest"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/kube"
	"github.com/seed-caa81108/assay/server/registry"
)

// AgentConfig is what an AgentService needs.
type AgentConfig struct {
	TrustDomain spiffeid.TrustDomain
	// ReservedPrefix is "/assay/" or "/spire/".
	ReservedPrefix string
	Authority      *ca.Authority
	Registry       *registry.Registry
	Attestors      map[string]NodeAttestor
	// Clusters are the Kubernetes clusters whose nodes are agents; nil: none.
	Clusters *kube.Clusters
	Audit    Auditor
	// Refused is told of agents whose streams end because they may not go on.
	Refused Refused
	Log     *slog.Logger
	// SignBatch is how many items a SignX509 may have.
	SignBatch int
	// AttestRate is how many attestations an address may begin per second.
	AttestRate int
	// SyncStreams is how many Sync streams an agent may have at a time.
	SyncStreams int
	// Rates of one agent.
	Rates AgentRates
	// LiveKeys is for how many keys the agent of a cluster's node may have
	// certificates of one identity at a time.
	LiveKeys int
	// NotSigned counts certificates that were refused, by reason.
	NotSigned *prometheus.CounterVec
}

// AgentService is the server's side of the protocol between agent and server.
type AgentService struct {
	agentv1.UnimplementedAgentServer
	cfg       AgentConfig
	addresses *addresses
	streams   *streams
	rates     *rates
	keys      *liveKeys
	work      *work
	bundles   bundleCache

	stopOnce sync.Once
	stopping chan struct{}
}

// NewAgentService returns the service.
func NewAgentService(cfg AgentConfig) *AgentService {
	return &AgentService{
		cfg: cfg, addresses: newAddresses(cfg.AttestRate), streams: newStreams(cfg.SyncStreams),
		rates: newRates(cfg.Rates), keys: newLiveKeys(cfg.LiveKeys), work: newWork(), stopping: make(chan struct{}),
	}
}

// Stop ends every stream with Unavailable, so that agents look for another
// server. Calls that are not streams finish.
func (s *AgentService) Stop() { s.stopOnce.Do(func() { close(s.stopping) }) }

// Bundle implements agentv1.AgentServer. It is not authenticated: a caller
// trusts from the answer what it can check.
func (s *AgentService) Bundle(context.Context, *agentv1.BundleRequest) (*agentv1.BundleResponse, error) {
	return &agentv1.BundleResponse{Bundle: s.bundles.message(s.cfg.Authority.Bundle())}, nil
}

// Renew implements agentv1.AgentServer. The new certificate is recorded as
// pending and becomes the active one by its first use; until then the old one
// stays valid, so a lost answer costs nothing.
func (s *AgentService) Renew(ctx context.Context, req *agentv1.RenewRequest) (*agentv1.RenewResponse, error) {
	caller, err := s.admit(ctx)
	if err != nil {
		return nil, err
	}
	// Not audited either: what a flood is refused with must be cheap.
	if err := s.rates.renew(caller.ID, time.Now()); err != nil {
		return nil, err
	}
	leave, err := s.work.enter(ctx, job{kind: agentRenewal, agent: caller.ID, weight: storeWeight})
	if err != nil {
		return nil, err
	}
	defer leave()
	identity, err := s.renew(ctx, caller, req.GetCsr())
	if err != nil {
		// What was signed has its line already; this is about what was not.
		if aerr := record(ctx, s.cfg.Audit, audit.Line{
			Origin: origin(ctx), Action: "agent.renew", Target: audit.Target{AgentID: caller.ID.String()},
			Why: audit.Why{Rule: "active_svid"}, Result: result(err),
		}); aerr != nil {
			return nil, aerr
		}
		return nil, err
	}
	failpoint.Hit("renew_reply")
	return &agentv1.RenewResponse{Identity: identity}, nil
}

func (s *AgentService) renew(ctx context.Context, caller rpc.Caller, csr []byte) (*agentv1.Identity, error) {
	key, err := ca.ParseCSR(csr)
	if err != nil {
		return nil, err
	}
	return s.issueAgent(ctx, caller.ID, key, caller.Serial, "active_svid")
}

// admit returns the calling agent after noting that its certificate is in use:
// the first use of a renewed one makes it the active one.
func (s *AgentService) admit(ctx context.Context) (rpc.Caller, error) {
	caller := rpc.CallerFrom(ctx)
	adopted, err := s.cfg.Registry.UseSerial(ctx, caller.ID, shown(caller))
	if err != nil {
		return rpc.Caller{}, err
	}
	if adopted {
		if err := s.adopted(ctx, caller); err != nil {
			return rpc.Caller{}, err
		}
	}
	return caller, nil
}

// adopted writes down that a certificate was taken that the restored store did
// not know.
func (s *AgentService) adopted(ctx context.Context, caller rpc.Caller) error {
	s.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "adopted a certificate that an agent renewed after the backup was taken",
		slog.String("agent_id", caller.ID.String()), slog.String("serial", caller.Serial), slog.String("request_id", rpc.RequestID(ctx)))
	return record(ctx, s.cfg.Audit, audit.Line{
		Origin: origin(ctx), Action: "agent.adopt", Target: audit.Target{AgentID: caller.ID.String()},
		Why: audit.Why{Rule: "restored"}, Result: result(nil),
		Cert: &audit.Cert{Serial: caller.Serial, SPKISHA256: caller.KeyHash, NotBefore: caller.NotBefore, NotAfter: caller.NotAfter},
	})
}

// issueAgent signs an agent's own certificate and records its serial before
// anybody sees it. under is the serial of the certificate that asks, empty in
// an attestation.
func (s *AgentService) issueAgent(ctx context.Context, id spiffeid.ID, key crypto.PublicKey, under, rule string) (*agentv1.Identity, error) {
	hash, err := attest.KeyHash(key)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Registry.CheckKey(id, hash); err != nil {
		return nil, err
	}
	svids, err := s.cfg.Authority.IssueX509(ctx, origin(ctx), []ca.X509Request{{Kind: ca.Agent, ID: id, PublicKey: key, Rule: rule}})
	if err != nil {
		return nil, err
	}
	svid := svids[0]
	if svid.Err != nil {
		return nil, svid.Err
	}
	issued := registry.Issued{Under: under, Serial: svid.Serial, KeyHash: hash, NotAfter: svid.NotAfter, Authority: svid.AuthorityID}
	if err := s.cfg.Registry.RecordIssued(ctx, id, issued); err != nil {
		return nil, err
	}
	// From here on a rotation waits for it. Before, its root may have gone.
	if !s.cfg.Authority.Published(svid.AuthorityID) {
		return nil, fault.New(fault.NotReady, "root_replaced", "the root was replaced while the certificate was signed: ask again")
	}
	return &agentv1.Identity{
		AgentId: id.String(), Chain: svid.Chain, Bundle: s.bundles.message(s.cfg.Authority.Bundle()),
	}, nil
}

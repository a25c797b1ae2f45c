package api

import (
	"context"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/registry"
)

// AgentAdmin is the operators' half of SPIRE's agent API.
type AgentAdmin struct {
	spireagentv1.UnimplementedAgentServer
	td     spiffeid.TrustDomain
	agents *registry.Registry
	audit  Auditor
	maxTTL time.Duration
}

// NewAgentAdmin returns the service. maxTokenTTL is the longest life that a
// join token can be given.
func NewAgentAdmin(td spiffeid.TrustDomain, agents *registry.Registry, log Auditor, maxTokenTTL time.Duration) *AgentAdmin {
	return &AgentAdmin{td: td, agents: agents, audit: log, maxTTL: maxTokenTTL}
}

// CountAgents implements spireagentv1.AgentServer.
func (s *AgentAdmin) CountAgents(_ context.Context, req *spireagentv1.CountAgentsRequest) (*spireagentv1.CountAgentsResponse, error) {
	filter, err := agentFilterFromProto(req.GetFilter())
	if err != nil {
		return nil, err
	}
	count := int32(0)
	for _, a := range s.agents.Agents() {
		if filter.matches(&a) {
			count++
		}
	}
	return &spireagentv1.CountAgentsResponse{Count: count}, nil
}

// ListAgents implements spireagentv1.AgentServer. Pages are in the order of
// the agents' IDs.
func (s *AgentAdmin) ListAgents(_ context.Context, req *spireagentv1.ListAgentsRequest) (*spireagentv1.ListAgentsResponse, error) {
	filter, err := agentFilterFromProto(req.GetFilter())
	if err != nil {
		return nil, err
	}
	after, err := pageStart(req.GetPageToken())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(req.GetPageSize())
	if err != nil {
		return nil, err
	}
	var list []*types.Agent
	last, more := "", false
	for _, a := range s.agents.Agents() {
		if a.ID.String() <= after || !filter.matches(&a) {
			continue
		}
		if more = len(list) == size; more {
			break
		}
		list, last = append(list, maskAgent(s.agentToProto(&a), req.GetOutputMask())), a.ID.String()
	}
	if n := fill(list); n < len(list) {
		list, more = list[:n], true
		last = "spiffe://" + list[n-1].GetId().GetTrustDomain() + list[n-1].GetId().GetPath()
	}
	resp := &spireagentv1.ListAgentsResponse{Agents: list}
	if more {
		resp.NextPageToken = pageToken(last)
	}
	return resp, nil
}

// GetAgent implements spireagentv1.AgentServer.
func (s *AgentAdmin) GetAgent(_ context.Context, req *spireagentv1.GetAgentRequest) (*types.Agent, error) {
	id, err := idFromProto(s.td, "id", req.GetId())
	if err != nil {
		return nil, err
	}
	a, ok := s.agents.Agent(id)
	if !ok {
		return nil, fault.New(fault.NotFound, "agent_unknown", "no agent has this ID")
	}
	return maskAgent(s.agentToProto(&a), req.GetOutputMask()), nil
}

// BanAgent implements spireagentv1.AgentServer: the agent's streams end within
// a second, and it can't come back until it is deleted.
func (s *AgentAdmin) BanAgent(ctx context.Context, req *spireagentv1.BanAgentRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, s.act(ctx, "agent.ban", req.GetId(), s.agents.Ban)
}

// DeleteAgent implements spireagentv1.AgentServer: an eviction. The agent has
// to attest anew; a ban ends with it.
func (s *AgentAdmin) DeleteAgent(ctx context.Context, req *spireagentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, s.act(ctx, "agent.evict", req.GetId(), s.agents.Evict)
}

// act does something to an agent and writes it down.
func (s *AgentAdmin) act(ctx context.Context, action string, of *types.SPIFFEID, do func(context.Context, spiffeid.ID) error) error {
	id, err := idFromProto(s.td, "id", of)
	if err == nil {
		err = do(ctx, id)
	}
	if aerr := record(ctx, s.audit, audit.Line{
		Origin: origin(ctx), Action: action, Target: audit.Target{AgentID: idText(id)},
		Why: audit.Why{Rule: "operator"}, Result: result(err),
	}); aerr != nil {
		return aerr
	}
	return err
}

// CreateJoinToken implements spireagentv1.AgentServer. Its value appears in
// the answer and nowhere else: the registry keeps a hash. With agent_id it also
// makes the entry that gives the agent this ID as an alias.
func (s *AgentAdmin) CreateJoinToken(ctx context.Context, req *spireagentv1.CreateJoinTokenRequest) (*types.JoinToken, error) {
	token, err := s.createToken(ctx, req)
	lines := []audit.Line{{
		Origin: origin(ctx), Action: "token.create", Target: audit.Target{AgentID: idText(token.AgentID)},
		Why: audit.Why{Rule: "operator"}, Result: result(err),
	}}
	if token.Alias.ID != "" {
		lines = append(lines, audit.Line{
			Origin: origin(ctx), Action: "entry.create", Target: entryTarget(&token.Alias),
			Why: audit.Why{Rule: "operator", SelectorsHash: selectorsHash(&token.Alias)}, Result: result(err),
		})
	}
	if aerr := record(ctx, s.audit, lines...); aerr != nil {
		return nil, aerr
	}
	if err != nil {
		return nil, err
	}
	return &types.JoinToken{Value: token.Value, ExpiresAt: token.ExpiresAt.Unix()}, nil
}

func (s *AgentAdmin) createToken(ctx context.Context, req *spireagentv1.CreateJoinTokenRequest) (registry.Token, error) {
	ttl := time.Duration(req.GetTtl()) * time.Second
	if ttl <= 0 || ttl > s.maxTTL {
		return registry.Token{}, fault.Newf(fault.Invalid, "ttl_out_of_range",
			"a join token lives between 1s and %v (attestation.join_token.max_ttl)", s.maxTTL)
	}
	if req.GetAgentId() == nil {
		return s.agents.CreateToken(ctx, req.GetToken(), ttl)
	}
	alias, err := idFromProto(s.td, "agent_id", req.GetAgentId())
	if err != nil {
		return registry.Token{}, err
	}
	return s.agents.CreateTokenWithAlias(ctx, req.GetToken(), ttl, alias)
}

func (s *AgentAdmin) agentToProto(a *registry.Agent) *types.Agent {
	serial, notAfter := a.ActiveSerial, a.NotAfter
	if serial == "" { // attested, and its first certificate not used yet
		serial, notAfter = a.PendingSerial, a.PendingNotAfter
	}
	return &types.Agent{
		Id: idToProto(a.ID), AttestationType: a.Attestor, X509SvidSerialNumber: decimalSerial(serial),
		X509SvidExpiresAt: unixSeconds(notAfter), Selectors: selectorsToProto(a.Selectors),
		Banned: a.Banned, CanReattest: a.CanReattest, AgentVersion: a.Version,
	}
}

// decimalSerial is a serial as SPIRE's API writes it.
func decimalSerial(hex string) string {
	n, ok := new(big.Int).SetString(hex, 16)
	if !ok {
		return ""
	}
	return n.String()
}

func idText(id spiffeid.ID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}

package main

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

// spiffeIDType is the type of the selector that names a node by its ID.
const spiffeIDType = "spiffe_id"

// serverIDOf is the SPIFFE ID of the server: the parent of entries about nodes.
func serverIDOf(state *adminv1.StatusResponse) (spiffeid.ID, error) {
	td, err := spiffeid.TrustDomainFromString(state.GetTrustDomain())
	if err != nil || state.GetReservedPrefix() == "" {
		return spiffeid.ID{}, badAnswer("a valid trust domain and its reserved prefix")
	}
	id, err := spiffeid.FromPath(td, state.GetReservedPrefix()+"server")
	if err != nil {
		return spiffeid.ID{}, badAnswer("a valid reserved prefix")
	}
	return id, nil
}

// askServerID asks the server who it is.
func askServerID(ctx context.Context, s *serverConn) (spiffeid.ID, error) {
	state, err := ask(ctx, s, s.admin.Status, &adminv1.StatusRequest{})
	if err != nil {
		return spiffeid.ID{}, err
	}
	return serverIDOf(state)
}

// isAlias says whether an entry is about nodes: its parent is the server, or
// its only selector is its parent's own ID.
func isAlias(e *types.Entry, server spiffeid.ID) bool {
	parent := idFromProto(e.GetParentId())
	list := e.GetSelectors()
	return parent == server.String() ||
		len(list) == 1 && list[0].GetType() == spiffeIDType && list[0].GetValue() == parent
}

// aliasesOf returns the SPIFFE IDs that an agent has besides its own. The
// server decides by the same rule and has no call to tell it.
func aliasesOf(ctx context.Context, s *serverConn, server spiffeid.ID, agent *types.Agent) ([]string, error) {
	own := &types.Selector{Type: spiffeIDType, Value: idFromProto(agent.GetId())}
	all := append(slices.Clone(agent.GetSelectors()), own)
	aliases := []string{}
	for _, filter := range []*spireentry.ListEntriesRequest_Filter{
		{ByParentId: idToProto(server), BySelectors: &types.SelectorMatch{Selectors: all, Match: types.SelectorMatch_MATCH_SUBSET}},
		{ByParentId: agent.GetId(), BySelectors: &types.SelectorMatch{Selectors: []*types.Selector{own}, Match: types.SelectorMatch_MATCH_EXACT}},
	} {
		err := pages(func(token string) (string, error) {
			resp, err := ask(ctx, s, s.entries.ListEntries, &spireentry.ListEntriesRequest{Filter: filter, PageToken: token})
			for _, e := range resp.GetEntries() {
				if shape := entryFromProto(e); !shape.ended(time.Now()) && !shape.StoreSVID {
					aliases = append(aliases, shape.SPIFFEID)
				}
			}
			return resp.GetNextPageToken(), err
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(aliases)
	return slices.Compact(aliases), nil
}

// warnOfAlias tells what keeps nodes from ever having an alias.
func (t *tool) warnOfAlias(ctx context.Context, s *serverConn, e *types.Entry) {
	named := false
	for _, sel := range e.GetSelectors() {
		named = named || sel.GetType() == spiffeIDType
		if sel.GetType() == "unix" {
			t.warn(fault.New(fault.Invalid, "selector_unknown",
				quote(sel.GetType()+":"+sel.GetValue())+" matches no node: it tells of processes; see assay agent show for what a node has"))
			return
		}
	}
	if named { // an agent may join under that ID at any time
		return
	}
	resp, err := ask(ctx, s, s.agents.ListAgents, &spireagent.ListAgentsRequest{
		PageSize: 1, OutputMask: &types.AgentMask{}, Filter: &spireagent.ListAgentsRequest_Filter{
			BySelectorMatch: &types.SelectorMatch{Selectors: e.GetSelectors(), Match: types.SelectorMatch_MATCH_SUPERSET},
		},
	})
	if err == nil && len(resp.GetAgents()) == 0 {
		t.warn(fault.New(fault.NotFound, "alias_unheld",
			"no agent on record has these selectors: nobody gets the entries of this alias until one joins; see assay agent list"))
	}
}

// knownParent says whether an agent has this ID, or an entry makes it an alias.
// A call that fails says nothing about that.
func knownParent(ctx context.Context, s *serverConn, server spiffeid.ID, parent *types.SPIFFEID) bool {
	_, err := ask(ctx, s, s.agents.GetAgent, &spireagent.GetAgentRequest{Id: parent})
	if !errors.Is(err, fault.NotFound) {
		return true
	}
	found := false
	err = pages(func(token string) (string, error) {
		filter := &spireentry.ListEntriesRequest_Filter{BySpiffeId: parent}
		resp, err := ask(ctx, s, s.entries.ListEntries, &spireentry.ListEntriesRequest{Filter: filter, PageToken: token})
		found = found || slices.ContainsFunc(resp.GetEntries(), func(e *types.Entry) bool { return isAlias(e, server) })
		return resp.GetNextPageToken(), err
	})
	return found || err != nil
}

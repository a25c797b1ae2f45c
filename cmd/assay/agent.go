package main

import (
	"context"
	"io"
	"time"

	"github.com/spf13/cobra"
	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

// agentList is what `agent list -o json` prints.
type agentList struct {
	Agents []agentShape `json:"agents"`
}

// agentShape is one agent as the server has it on record. Serial is that of
// its active X.509-SVID; SVIDExpiresAt is null for an agent without one.
// Connected says whether the server has a stream to it open.
type agentShape struct {
	ID            string     `json:"id"`
	Attestor      string     `json:"attestor"`
	Serial        string     `json:"serial"`
	SVIDExpiresAt *time.Time `json:"svid_expires_at"`
	Selectors     []string   `json:"selectors"`
	Connected     bool       `json:"connected"`
	Banned        bool       `json:"banned"`
	CanReattest   bool       `json:"can_reattest"`
	Version       string     `json:"version"`
}

func newAgentCommand(t *tool) *cobra.Command {
	return group("agent", "Agents: the nodes of this trust domain", newAgentListCommand(t), newAgentShowCommand(t),
		newAgentBanCommand(t), newAgentEvictCommand(t), newAgentPurgeCommand(t))
}

func newAgentListCommand(t *tool) *cobra.Command {
	var f agentFilter
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List agents",
		Long: `List the agents on record that match all the given flags, also those that are
not connected.

  $ assay agent list --expires-before 3h
  $ assay agent list -o json | jq -r '.agents[] | select(.connected | not) | .id'`,
		Args: noArgs,
	}
	cmd.RunE = t.serverVerb(func(ctx context.Context, s *serverConn, _ []string) error {
		filter, err := f.proto(cmd.Flags().Changed, time.Now())
		if err != nil {
			return err
		}
		agents, err := listAgents(ctx, s, filter)
		if err != nil {
			return err
		}
		state, err := ask(ctx, s, s.admin.Status, &adminv1.StatusRequest{})
		if err != nil {
			return err
		}
		markConnected(state, agents)
		return t.print(agentList{Agents: agents}, func(w io.Writer) error { return writeAgents(w, agents) })
	})
	f.flags(cmd)
	return t.serverFlags(cmd)
}

func listAgents(ctx context.Context, s *serverConn, filter *spireagent.ListAgentsRequest_Filter) ([]agentShape, error) {
	agents := []agentShape{}
	err := pages(func(token string) (string, error) {
		resp, err := ask(ctx, s, s.agents.ListAgents, &spireagent.ListAgentsRequest{Filter: filter, PageToken: token})
		for _, a := range resp.GetAgents() {
			agents = append(agents, agentFromProto(a))
		}
		return resp.GetNextPageToken(), err
	})
	return agents, err
}

// markConnected adds what SPIRE's form of an agent has no field for.
func markConnected(state *adminv1.StatusResponse, agents []agentShape) {
	connected := map[string]bool{}
	for _, a := range state.GetAgents() {
		connected[a.GetId()] = a.GetConnected()
	}
	for i := range agents {
		agents[i].Connected = connected[agents[i].ID]
	}
}

func agentFromProto(a *types.Agent) agentShape {
	return agentShape{
		ID: idFromProto(a.GetId()), Attestor: a.GetAttestationType(), Serial: a.GetX509SvidSerialNumber(),
		SVIDExpiresAt: fromUnix(a.GetX509SvidExpiresAt()), Selectors: selectorTexts(a.GetSelectors()),
		Banned: a.GetBanned(), CanReattest: a.GetCanReattest(), Version: a.GetAgentVersion(),
	}
}

func writeAgents(w io.Writer, agents []agentShape) error {
	rows := table{header: []string{"ID", "ATTESTOR", "CONNECTED", "SVID EXPIRES", "STATE", "VERSION"}}
	for _, a := range agents {
		rows.add(a.ID, a.Attestor, yesNo(a.Connected), stampOf(a.SVIDExpiresAt), a.state(), a.Version)
	}
	return rows.write(w)
}

func (a agentShape) state() string {
	if a.Banned {
		return "banned"
	}
	return "ok"
}

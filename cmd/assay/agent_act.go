package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

func newAgentShowCommand(t *tool) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show one agent",
		Long: `Show the agent with this SPIFFE ID.

  $ assay agent show spiffe://example.org/assay/agent/join_token/6d1f...`,
		Args: oneArg("agent ID"),
		RunE: t.serverVerb(func(ctx context.Context, s *serverConn, args []string) error {
			id, err := parseID("ID", args[0])
			if err != nil {
				return err
			}
			agent, err := ask(ctx, s, s.agents.GetAgent, &spireagent.GetAgentRequest{Id: idToProto(id)})
			if err != nil {
				return err
			}
			one, err := describeAgent(ctx, s, agent)
			if err != nil {
				return err
			}
			return t.print(one, one.write)
		}),
	}
	return t.serverFlags(cmd)
}

// agentDetail is what `agent show -o json` prints: the agent as in a list, and
// the SPIFFE IDs besides its own whose entries it has.
type agentDetail struct {
	agentShape
	Aliases []string `json:"aliases"`
}

func describeAgent(ctx context.Context, s *serverConn, agent *types.Agent) (agentDetail, error) {
	state, err := ask(ctx, s, s.admin.Status, &adminv1.StatusRequest{})
	if err != nil {
		return agentDetail{}, err
	}
	server, err := serverIDOf(state)
	if err != nil {
		return agentDetail{}, err
	}
	one := []agentShape{agentFromProto(agent)}
	markConnected(state, one)
	aliases, err := aliasesOf(ctx, s, server, agent)
	return agentDetail{one[0], aliases}, err
}

// write is the text form of one agent.
func (a agentDetail) write(w io.Writer) error {
	rows := table{}
	rows.add("id", a.ID)
	rows.add("attestor", a.Attestor)
	rows.add("state", a.state())
	rows.add("connected", yesNo(a.Connected))
	rows.add("serial", a.Serial)
	rows.add("svid expires", stampOf(a.SVIDExpiresAt))
	for _, selector := range a.Selectors {
		rows.add("selector", selector)
	}
	for _, alias := range a.Aliases {
		rows.add("alias", alias)
	}
	rows.add("can reattest", yesNo(a.CanReattest))
	rows.add("version", a.Version)
	return rows.write(w)
}

func newAgentBanCommand(t *tool) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "ban ID...",
		Short: "Ban agents: cut off at once, and kept out",
		Long: `Ban agents. Within a second the server serves them nothing more; an agent that
hears of it forgets its keys and ends, and the workloads' streams end with it.
Certificates that workloads hold by then end by themselves, within the hour.
To let a node back in, evict its agent and make it attest anew.

  $ assay agent ban spiffe://example.org/assay/agent/join_token/6d1f...`,
		Args: someArgs("agent ID"),
	}
	cmd.RunE = t.localVerb(func(ctx context.Context, s *serverConn, args []string) error {
		return t.actOnAgents(args, yes, "Ban %d agent(s), so that they forget their keys?", "banned", func(id spiffeid.ID) error {
			_, err := ask(ctx, s, s.agents.BanAgent, &spireagent.BanAgentRequest{Id: idToProto(id)})
			return err
		})
	})
	cmd.Flags().BoolVar(&yes, "yes", false, "don't ask")
	return t.localFlags(cmd)
}

func newAgentEvictCommand(t *tool) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "evict ID...",
		Short: "Evict agents: they have to attest anew",
		Long: `Remove agents from the record, banned ones too. Such an agent goes on serving
what it holds, until that ends, and has to attest anew: one that joined with a
token needs a new token, by which it gets another ID.

  $ assay agent evict spiffe://example.org/assay/agent/join_token/6d1f...`,
		Args: someArgs("agent ID"),
	}
	cmd.RunE = t.localVerb(func(ctx context.Context, s *serverConn, args []string) error {
		return t.actOnAgents(args, yes, "Evict %d agent(s)?", "evicted", func(id spiffeid.ID) error { return s.evict(ctx, id) })
	})
	cmd.Flags().BoolVar(&yes, "yes", false, "don't ask")
	return t.localFlags(cmd)
}

func (s *serverConn) evict(ctx context.Context, id spiffeid.ID) error {
	_, err := ask(ctx, s, s.agents.DeleteAgent, &spireagent.DeleteAgentRequest{Id: idToProto(id)})
	return err
}

// actOnAgents does something to each of the agents that are named, once their
// IDs are known to be well formed and somebody agreed.
func (t *tool) actOnAgents(names []string, yes bool, question, done string, act func(spiffeid.ID) error) error {
	ids := make([]spiffeid.ID, len(names))
	for i, name := range names {
		var err error
		if ids[i], err = parseID("ID", name); err != nil {
			return err
		}
	}
	if err := t.confirm(yes, fmt.Sprintf(question, len(ids))); err != nil {
		return err
	}
	doc := newVerdicts()
	for _, id := range ids {
		doc.add(id.String(), done, act(id))
	}
	return t.finish(doc, "agents were not "+done)
}

// defaultPurgeAge is far beyond the time in which an agent can rejoin.
const defaultPurgeAge = 30 * 24 * time.Hour

func newAgentPurgeCommand(t *tool) *cobra.Command {
	var yes, dryRun bool
	var older time.Duration
	cmd := &cobra.Command{
		Use:   "purge",
		Short: "Evict agents that are gone for good",
		Long: `Evict the agents whose X.509-SVID ended long ago, as those of nodes that were
taken down. Banned agents stay, so that they stay banned.

  $ assay agent purge --older 720h --dry-run`,
		Args: noArgs,
	}
	cmd.RunE = t.localVerb(func(ctx context.Context, s *serverConn, _ []string) error {
		if older < 0 {
			return usageError("--older can't be negative")
		}
		return t.purgeAgents(ctx, s, time.Now().Add(-older), yes, dryRun)
	})
	fl := cmd.Flags()
	fl.DurationVar(&older, "older", defaultPurgeAge, "how long ago the agent's X.509-SVID must have ended")
	fl.BoolVar(&dryRun, "dry-run", false, "list whom it would evict, and change nothing")
	fl.BoolVar(&yes, "yes", false, "don't ask")
	return t.localFlags(cmd)
}

func (t *tool) purgeAgents(ctx context.Context, s *serverConn, before time.Time, yes, dryRun bool) error {
	all, err := listAgents(ctx, s, nil)
	if err != nil {
		return err
	}
	state, err := ask(ctx, s, s.admin.Status, &adminv1.StatusRequest{})
	if err != nil {
		return err
	}
	markConnected(state, all)
	doc := newVerdicts()
	var gone []string
	for _, a := range all {
		if !a.Banned && !a.Connected && a.SVIDExpiresAt != nil && a.SVIDExpiresAt.Before(before) {
			gone = append(gone, a.ID)
			doc.add(a.ID, "would be evicted", nil)
		}
	}
	if dryRun || len(gone) == 0 {
		return t.finish(doc, "")
	}
	return t.actOnAgents(gone, yes, "Evict %d agent(s)?", "evicted", func(id spiffeid.ID) error {
		if err := s.evict(ctx, id); fault.ReasonOf(err) != "agent_unknown" { // else somebody was faster
			return err
		}
		return nil
	})
}

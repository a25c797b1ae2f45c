package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spireagent "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

// tokenShape is what `token create -o json` prints. Token is the secret;
// AgentID the SPIFFE ID that the agent will have, Alias one that it has besides
// (empty for none); Pin the SHA-256 of the active
// root's public key, by which the agent knows the server.
type tokenShape struct {
	Token     string    `json:"token"`
	AgentID   string    `json:"agent_id"`
	Alias     string    `json:"alias"`
	Pin       string    `json:"pin"`
	ExpiresAt time.Time `json:"expires_at"`
}

// joinTokenFile is where docs/operating.md puts the token on a node.
const joinTokenFile = "/etc/assay-agent/join.token" //nolint:gosec // G101: a path, not a token

func newTokenCommand(t *tool) *cobra.Command {
	return group("token", "Join tokens: one-time rights to become an agent", newTokenCreateCommand(t))
}

func newTokenCreateCommand(t *tool) *cobra.Command {
	var ttl time.Duration
	var alias string
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create a one-time join token for an agent",
		Long: `Create a join token, and print what a new agent needs: the token, the SPIFFE ID
that the agent will have (the parent ID for its entries) and the pin of the
server's active root. Whoever holds the token can become that agent until it
is used or expires: write it to /etc/assay-agent/join.token on the node, with
mode 0600, and nowhere else.

With --agent-id the agent also has that SPIFFE ID as an alias: entries with it
as parent are the agent's, and those of every other agent that has the alias.
That is an entry of its own; it stays when the agent is evicted.

  $ assay token create --ttl 1h
  $ assay token create --agent-id spiffe://example.org/host/web
  $ (umask 077; assay token create -o json | jq -r .token > join.token)`,
		Args: noArgs,
		RunE: t.localVerb(func(ctx context.Context, s *serverConn, _ []string) error {
			made, err := createToken(ctx, s, ttl, alias)
			if err != nil {
				return err
			}
			return t.print(made, made.write)
		}),
	}
	cmd.Flags().DurationVar(&ttl, "ttl", 10*time.Minute, "how long the token can be used")
	cmd.Flags().StringVar(&alias, "agent-id", "", "SPIFFE ID that the agent has besides its own, as spiffe://example.org/host/web")
	return t.localFlags(cmd)
}

func (s tokenShape) write(w io.Writer) error {
	rows := table{}
	rows.add("token", s.Token)
	rows.add("agent id", s.AgentID)
	if s.Alias != "" {
		rows.add("alias", s.Alias)
	}
	rows.add("pin", s.Pin)
	rows.add("expires", stamp(s.ExpiresAt))
	if err := rows.write(w); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, `
On the node, put the token alone into a file (paste it, Enter, Ctrl-D):

(umask 077; cat > %[1]s)

and name that file in /etc/assay-agent/agent.yaml:

pin: %[2]s
join_token_file: %[1]s
`, joinTokenFile, plain(s.Pin))
	if err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// createToken reads first and creates last: a token that could not be printed
// with its pin would be a secret without a use.
func createToken(ctx context.Context, s *serverConn, ttl time.Duration, alias string) (tokenShape, error) {
	secs, err := ttlSeconds(ttl)
	if err != nil {
		return tokenShape{}, err
	}
	if secs == 0 {
		return tokenShape{}, usageError("--ttl must be at least one second")
	}
	req := &spireagent.CreateJoinTokenRequest{Ttl: secs}
	if alias != "" {
		if err := readID("--agent-id", alias, &req.AgentId); err != nil {
			return tokenShape{}, err
		}
	}
	state, err := ask(ctx, s, s.admin.Status, &adminv1.StatusRequest{})
	if err != nil {
		return tokenShape{}, err
	}
	td, err := spiffeid.TrustDomainFromString(state.GetTrustDomain())
	if err != nil || state.GetReservedPrefix() == "" {
		return tokenShape{}, badAnswer("a valid trust domain and its reserved prefix")
	}
	pin, err := activePin(state.GetAuthorities())
	if err != nil {
		return tokenShape{}, err
	}
	token, err := ask(ctx, s, s.agents.CreateJoinToken, req)
	if err != nil {
		return tokenShape{}, err
	}
	if token.GetValue() == "" {
		return tokenShape{}, badAnswer("the token")
	}
	return tokenShape{
		Token: token.GetValue(), AgentID: tokenAgentID(td, state.GetReservedPrefix(), token.GetValue()),
		Alias: alias, Pin: pin, ExpiresAt: time.Unix(token.GetExpiresAt(), 0).UTC(),
	}, nil
}

// tokenAgentID is the ID that redeeming a token gives (design section 2). It
// tells who made which agent without telling the token.
func tokenAgentID(td spiffeid.TrustDomain, prefix, token string) string {
	sum := sha256.Sum256([]byte(token))
	return "spiffe://" + td.Name() + prefix + "agent/join_token/" + hex.EncodeToString(sum[:16])
}

func activePin(authorities []*adminv1.Authority) (string, error) {
	for _, a := range authorities {
		if a.GetState() == "active" && a.GetUse() == "x509" && a.GetPin() != "" {
			return a.GetPin(), nil
		}
	}
	return "", fault.New(fault.Precondition, "no_active_root", "the server has no active root to pin: see assay status")
}

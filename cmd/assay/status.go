package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

// statusShape is what `status -o json` prints.
type statusShape struct {
	TrustDomain    string           `json:"trust_domain"`
	Version        string           `json:"version"`
	StartedAt      *time.Time       `json:"started_at"`
	ServerTime     *time.Time       `json:"server_time"`
	Revision       int64            `json:"revision"`
	BundleSequence uint64           `json:"bundle_sequence"`
	Authorities    []authorityShape `json:"authorities"`
	Issuer         issuerShape      `json:"issuer"`
	Entries        uint32           `json:"entries"`
	AgentCounts    agentCounts      `json:"agent_counts"`
	Agents         []agentState     `json:"agents"`
	Outage         *outageShape     `json:"outage_budget"`
	Warnings       []string         `json:"warnings"`
}

// outageShape says when, and where, the first workload would lose its identity
// if no server answered any more from now on; null while nobody holds one.
type outageShape struct {
	FirstExpiry *time.Time `json:"first_expiry"`
	AgentID     string     `json:"agent_id"`
}

// authorityShape is one authority; Use is "x509", State "prepared", "active",
// "retired", "tainted" or "revoked".
type authorityShape struct {
	ID        string     `json:"id"`
	Use       string     `json:"use"`
	State     string     `json:"state"`
	CreatedAt *time.Time `json:"created_at"`
	NotAfter  *time.Time `json:"not_after"`
	Pin       string     `json:"pin"`
	// LiveSVIDs under it have not ended, by what agents said last.
	LiveSVIDs uint64 `json:"live_svids"`
}

// issuerShape is the intermediate that the server signs with.
type issuerShape struct {
	ID          string     `json:"id"`
	AuthorityID string     `json:"authority_id"`
	NotAfter    *time.Time `json:"not_after"`
}

// agentCounts sums up the agents: Total leaves out the banned ones, so that
// Connected and Acknowledged can reach it.
type agentCounts struct {
	Total        int `json:"total"`
	Connected    int `json:"connected"`
	Acknowledged int `json:"acknowledged"`
	Banned       int `json:"banned"`
}

// agentState is one agent; times are null when unknown.
type agentState struct {
	ID                   string     `json:"id"`
	SVIDNotAfter         *time.Time `json:"svid_not_after"`
	Banned               bool       `json:"banned"`
	Connected            bool       `json:"connected"`
	LastSeen             *time.Time `json:"last_seen"`
	Version              string     `json:"version"`
	AcknowledgedSequence uint64     `json:"acknowledged_sequence"`
	WaitsUntil           *time.Time `json:"waits_until"`
	Revision             int64      `json:"revision"`
	LiveSVIDs            uint32     `json:"live_svids"`
	EarliestExpiry       *time.Time `json:"earliest_expiry"`
	ClockOffsetMillis    int64      `json:"clock_offset_ms"`
}

func authorityFromProto(a *adminv1.Authority) authorityShape {
	return authorityShape{
		ID: a.GetId(), Use: a.GetUse(), State: a.GetState(),
		CreatedAt: momentOf(a.GetCreatedAt()), NotAfter: momentOf(a.GetNotAfter()), Pin: a.GetPin(), LiveSVIDs: a.GetLiveSvids(),
	}
}

func newStatusCommand(t *tool) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the server, its authorities and its fleet on one screen",
		Long: `Show how the server and its fleet are: authorities and how long they last, how
many agents are connected and serve the current bundle, and what needs a look.
The exit code says only whether the server answered.

  $ assay status
  $ assay status -o json | jq '.agents[] | select(.connected | not) | .id'`,
		Args: noArgs,
		RunE: t.serverVerb(func(ctx context.Context, s *serverConn, _ []string) error {
			resp, err := ask(ctx, s, s.admin.Status, &adminv1.StatusRequest{})
			if err != nil {
				return err
			}
			shape := statusFromProto(resp)
			return t.print(shape, shape.write)
		}),
	}
	return t.serverFlags(cmd)
}

func momentOf(ts *timestamppb.Timestamp) *time.Time {
	if ts == nil {
		return nil
	}
	at := ts.AsTime()
	return &at
}

func statusFromProto(r *adminv1.StatusResponse) statusShape {
	s := statusShape{
		TrustDomain: r.GetTrustDomain(), Version: r.GetVersion(),
		StartedAt: momentOf(r.GetStartedAt()), ServerTime: momentOf(r.GetServerTime()),
		Revision: r.GetRevision(), BundleSequence: r.GetBundleSequence(),
		Authorities: []authorityShape{}, Agents: []agentState{},
		Issuer: issuerShape{
			ID: r.GetIssuer().GetId(), AuthorityID: r.GetIssuer().GetAuthorityId(), NotAfter: momentOf(r.GetIssuer().GetNotAfter()),
		},
		Entries: r.GetEntries(), Warnings: list(r.GetWarnings()),
	}
	if b := r.GetOutageBudget(); b != nil {
		s.Outage = &outageShape{FirstExpiry: momentOf(b.GetFirstExpiry()), AgentID: b.GetAgentId()}
	}
	for _, a := range r.GetAuthorities() {
		s.Authorities = append(s.Authorities, authorityFromProto(a))
	}
	for _, a := range r.GetAgents() {
		state := agentState{
			ID: a.GetId(), SVIDNotAfter: momentOf(a.GetSvidNotAfter()), Banned: a.GetBanned(), Connected: a.GetConnected(),
			LastSeen: momentOf(a.GetLastSeen()), Version: a.GetVersion(), AcknowledgedSequence: a.GetAcknowledgedSequence(),
			WaitsUntil: momentOf(a.GetWaitsUntil()), Revision: a.GetRevision(), LiveSVIDs: a.GetLiveSvids(),
			EarliestExpiry: momentOf(a.GetEarliestExpiry()), ClockOffsetMillis: a.GetClockOffsetMs(),
		}
		s.Agents = append(s.Agents, state)
		s.AgentCounts.add(state, s.serves(state))
	}
	return s
}

func (c *agentCounts) add(a agentState, serves bool) {
	if a.Banned {
		c.Banned++
		return
	}
	c.Total++
	if a.Connected {
		c.Connected++
	}
	if serves {
		c.Acknowledged++
	}
}

// serves says whether the agent acknowledged the current bundle and no SVID
// delivered with an older one outlives the acknowledgement.
func (s statusShape) serves(a agentState) bool {
	waits := a.WaitsUntil != nil && s.ServerTime != nil && a.WaitsUntil.After(*s.ServerTime)
	return a.AcknowledgedSequence >= s.BundleSequence && !waits
}

// mostLagging is how many agents the one screen names.
const mostLagging = 8

func (s statusShape) write(w io.Writer) error {
	head := table{}
	head.add("trust domain", s.TrustDomain)
	head.add("server", fmt.Sprintf("%s, up %s, revision %d", s.Version, s.uptime(), s.Revision))
	head.add("bundle", "sequence "+strconv.FormatUint(s.BundleSequence, 10))
	head.add("issuer", s.Issuer.ID+s.lasts(s.Issuer.NotAfter))
	head.add("entries", strconv.FormatUint(uint64(s.Entries), 10))
	c := s.AgentCounts
	agents := fmt.Sprintf("%d/%d connected, %d/%d acknowledged", c.Connected, c.Total, c.Acknowledged, c.Total)
	if c.Banned > 0 {
		agents += fmt.Sprintf(", %d banned", c.Banned)
	}
	head.add("agents", agents)
	if a := s.offset(); a != nil {
		head.add("clocks", fmt.Sprintf("%s is off by %s", a.ID, span(time.Duration(abs(a.ClockOffsetMillis))*time.Millisecond)))
	}
	if s.Outage != nil {
		head.add("outage budget", fmt.Sprintf("without a server the first workload breaks in %s, at %s", s.left(s.Outage.FirstExpiry), s.Outage.AgentID))
	}
	if err := head.write(w); err != nil {
		return err
	}
	authorities := table{header: []string{"AUTHORITY", "USE", "STATE", "LIVE SVIDS", "ENDS", "LEFT"}}
	for _, a := range s.Authorities {
		authorities.add(a.ID, a.Use, a.State, strconv.FormatUint(a.LiveSVIDs, 10), stampOf(a.NotAfter), s.left(a.NotAfter))
	}
	if err := section(w, authorities); err != nil {
		return err
	}
	if err := section(w, s.lagging()); err != nil {
		return err
	}
	warnings := table{header: []string{"WARNINGS"}}
	for _, text := range s.Warnings {
		warnings.add(text)
	}
	return section(w, warnings)
}

// tellOffset is from when on a difference of clocks is shown, in milliseconds:
// reports take a moment to arrive.
const tellOffset = 3000

// offset is the agent whose clock differs most from the server's, nil if none
// does by much.
func (s statusShape) offset() (most *agentState) {
	for i := range s.Agents {
		a := &s.Agents[i]
		if off := abs(a.ClockOffsetMillis); a.Connected && off >= tellOffset && (most == nil || off > abs(most.ClockOffsetMillis)) {
			most = a
		}
	}
	return most
}

func abs(n int64) int64 { return max(n, -n) }

// section writes a table with rows under an empty line.
func section(w io.Writer, t table) error {
	if len(t.rows) == 0 {
		return nil
	}
	if _, err := io.WriteString(w, "\n"); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return t.write(w)
}

// lagging names agents that are not connected or serve an older bundle.
func (s statusShape) lagging() table {
	t := table{header: []string{"AGENT TO LOOK AT", "CONNECTED", "BUNDLE", "WAITS UNTIL", "LAST SEEN"}}
	more := 0
	for _, a := range s.Agents {
		if a.Banned || a.Connected && s.serves(a) {
			continue
		}
		if len(t.rows) == mostLagging {
			more++
			continue
		}
		t.add(a.ID, yesNo(a.Connected), strconv.FormatUint(a.AcknowledgedSequence, 10), stampOf(a.WaitsUntil), stampOf(a.LastSeen))
	}
	if more > 0 {
		t.add(fmt.Sprintf("and %d more", more), " ", " ", " ", " ")
	}
	return t
}

// uptime and left go by the server's clock: it is the one that signs.
func (s statusShape) uptime() string {
	if s.StartedAt == nil || s.ServerTime == nil {
		return "?"
	}
	return span(s.ServerTime.Sub(*s.StartedAt))
}

func (s statusShape) left(until *time.Time) string {
	if until == nil || s.ServerTime == nil {
		return ""
	}
	if left := until.Sub(*s.ServerTime); left > 0 {
		return span(left)
	}
	return "expired"
}

func (s statusShape) lasts(until *time.Time) string {
	if left := s.left(until); left != "" {
		return ", " + left + " left"
	}
	return ""
}

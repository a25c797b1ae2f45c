// Package agentv1 is the protocol between agents and servers. Most of it is
// generated from agent.proto; this file has what a .proto can't say and both
// ends must mean alike.
package agentv1

// Names of attestors, in AttestRequest.Start and in agents' records.
const (
	AttestorJoinToken = "join_token" // the payload is the token
	AttestorRejoin    = "rejoin"     // the payload is a RejoinPayload
)

// What both ends export from the TLS connection for a RejoinPayload (RFC 8446
// section 7.5). The context is the agent's ID.
const (
	// RejoinExporterLabel separates this use of the exporter from all others.
	RejoinExporterLabel = "EXPORTER-assay-rejoin"
	// RejoinExporterLength is in bytes.
	RejoinExporterLength = 32
)

// Reasons of a server upon which agents act.
const (
	// ReasonAgentBanned makes an agent forget all that it has, for good.
	ReasonAgentBanned = "agent_banned"
	// ReasonAgentUnknown makes an agent attest anew.
	ReasonAgentUnknown = "agent_unknown"
	// ReasonAgentSVIDNotActive makes an agent attest anew, unless a renewed
	// certificate is what replaced the one that was refused.
	ReasonAgentSVIDNotActive = "agent_svid_not_active"
	// ReasonEntryNotAuthorized is of one item of SignX509: the entry is not, or
	// no longer, this agent's.
	ReasonEntryNotAuthorized = "entry_not_authorized"
)

package api

import (
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/registry"
)

// agentChecker says from memory whether an agent may act under a certificate.
type agentChecker interface {
	CheckAgent(id spiffeid.ID, shown registry.Shown) error
}

// Refused is told of callers whose certificate or uid is known and who may not
// do what they asked. It must not block.
type Refused func(rpc.Caller, error)

// AgentMethods is the method table of the agents' listener. prefix is the
// reserved prefix, "/assay/".
func AgentMethods(prefix string, agents agentChecker, refused Refused) rpc.Methods {
	agent := reporting(AgentRule(prefix, agents), refused)
	return rpc.Methods{
		agentv1.Agent_Attest_FullMethodName:   rpc.Anyone, // the evidence decides
		agentv1.Agent_Bundle_FullMethodName:   rpc.Anyone, // public; the caller checks it against its pin
		agentv1.Agent_Renew_FullMethodName:    agent,
		agentv1.Agent_Sync_FullMethodName:     agent,
		agentv1.Agent_SignX509_FullMethodName: agent,
	}
}

// AgentRule admits attested agents: a valid certificate that has not ended
// since the handshake, an ID below the agents' prefix, and a record in the
// registry that has this serial and no ban.
func AgentRule(prefix string, agents agentChecker) rpc.Rule {
	below := prefix + "agent/"
	return func(c rpc.Caller) error {
		switch {
		case c.State == rpc.CertNone:
			return fault.New(fault.Unauthenticated, "agent_svid_missing", "this method needs an agent's X.509-SVID: attest first")
		case c.State != rpc.CertValid || !time.Now().Before(c.NotAfter):
			return fault.New(fault.Unauthenticated, "agent_svid_expired", "the agent's X.509-SVID has expired: attest again")
		case !isUnder(c.ID, below):
			return fault.New(fault.Denied, "not_an_agent", "only agents may call this method")
		}
		return agents.CheckAgent(c.ID, shown(c))
	}
}

// shown is the certificate that the registry judges.
func shown(c rpc.Caller) registry.Shown {
	return registry.Shown{Serial: c.Serial, KeyHash: c.KeyHash, NotBefore: c.NotBefore, NotAfter: c.NotAfter, Authority: c.Authority}
}

// Operators says who may use the admin socket.
type Operators struct {
	UIDs []uint32
	// GID is the group whose members may, by primary group; nil for none.
	GID *uint32
}

// AdminRule admits local peers with uid 0, a listed uid or the group. The
// caller adds the server's own uid to the list.
func AdminRule(ops Operators) rpc.Rule {
	return func(c rpc.Caller) error {
		if c.Local && (c.UID == 0 || slices.Contains(ops.UIDs, c.UID) || ops.GID != nil && *ops.GID == c.GID) {
			return nil
		}
		return fault.New(fault.Denied, "operator_not_allowed",
			"this user may not operate the server: add its uid to admin.uids or its primary group as admin.group")
	}
}

// AdminMethods is the method table of the admin socket.
func AdminMethods(ops Operators, refused Refused) rpc.Methods {
	admin := reporting(AdminRule(ops), refused)
	return operatorMethods(admin, admin)
}

// operatorMethods is the table of what operators may call: reads and writes of
// entries wherever they are, all else on the server's host only (local).
func operatorMethods(operator, local rpc.Rule) rpc.Methods {
	return rpc.Methods{
		adminv1.Admin_Status_FullMethodName: operator,
		adminv1.Admin_Wait_FullMethodName:   operator,
		adminv1.Admin_Backup_FullMethodName: local,

		adminv1.Rotation_ListRoots_FullMethodName:     operator,
		adminv1.Rotation_WatchRotation_FullMethodName: operator,
		adminv1.Rotation_StartRotation_FullMethodName: local,
		adminv1.Rotation_AbortRotation_FullMethodName: local,
		adminv1.Rotation_ForceRotation_FullMethodName: local,
		adminv1.Rotation_MoveRoot_FullMethodName:      local,

		localauthorityv1.LocalAuthority_GetX509AuthorityState_FullMethodName: operator,
		localauthorityv1.LocalAuthority_PrepareX509Authority_FullMethodName:  local,
		localauthorityv1.LocalAuthority_ActivateX509Authority_FullMethodName: local,
		localauthorityv1.LocalAuthority_TaintX509Authority_FullMethodName:    local,
		localauthorityv1.LocalAuthority_RevokeX509Authority_FullMethodName:   local,
		// There is no upstream authority, and no signing of tokens yet.
		localauthorityv1.LocalAuthority_TaintX509UpstreamAuthority_FullMethodName:  rpc.NotImplemented,
		localauthorityv1.LocalAuthority_RevokeX509UpstreamAuthority_FullMethodName: rpc.NotImplemented,
		localauthorityv1.LocalAuthority_GetJWTAuthorityState_FullMethodName:        rpc.NotImplemented,
		localauthorityv1.LocalAuthority_PrepareJWTAuthority_FullMethodName:         rpc.NotImplemented,
		localauthorityv1.LocalAuthority_ActivateJWTAuthority_FullMethodName:        rpc.NotImplemented,
		localauthorityv1.LocalAuthority_TaintJWTAuthority_FullMethodName:           rpc.NotImplemented,
		localauthorityv1.LocalAuthority_RevokeJWTAuthority_FullMethodName:          rpc.NotImplemented,
		localauthorityv1.LocalAuthority_GetWITAuthorityState_FullMethodName:        rpc.NotImplemented,
		localauthorityv1.LocalAuthority_PrepareWITAuthority_FullMethodName:         rpc.NotImplemented,
		localauthorityv1.LocalAuthority_ActivateWITAuthority_FullMethodName:        rpc.NotImplemented,
		localauthorityv1.LocalAuthority_TaintWITAuthority_FullMethodName:           rpc.NotImplemented,
		localauthorityv1.LocalAuthority_RevokeWITAuthority_FullMethodName:          rpc.NotImplemented,

		entryv1.Entry_CountEntries_FullMethodName:     operator,
		entryv1.Entry_ListEntries_FullMethodName:      operator,
		entryv1.Entry_GetEntry_FullMethodName:         operator,
		entryv1.Entry_BatchCreateEntry_FullMethodName: operator,
		entryv1.Entry_BatchDeleteEntry_FullMethodName: operator,
		entryv1.Entry_BatchUpdateEntry_FullMethodName: operator,
		// The agents' half: Assay's agents have a protocol of their own.
		entryv1.Entry_GetAuthorizedEntries_FullMethodName:  rpc.NotImplemented,
		entryv1.Entry_SyncAuthorizedEntries_FullMethodName: rpc.NotImplemented,

		spireagentv1.Agent_CountAgents_FullMethodName:     operator,
		spireagentv1.Agent_ListAgents_FullMethodName:      operator,
		spireagentv1.Agent_GetAgent_FullMethodName:        operator,
		spireagentv1.Agent_CreateJoinToken_FullMethodName: local,
		spireagentv1.Agent_DeleteAgent_FullMethodName:     local,
		spireagentv1.Agent_BanAgent_FullMethodName:        local,
		// The agents' half.
		spireagentv1.Agent_AttestAgent_FullMethodName: rpc.NotImplemented,
		spireagentv1.Agent_RenewAgent_FullMethodName:  rpc.NotImplemented,
		spireagentv1.Agent_PostStatus_FullMethodName:  rpc.NotImplemented,

		bundlev1.Bundle_GetBundle_FullMethodName:    operator,
		bundlev1.Bundle_CountBundles_FullMethodName: rpc.NotImplemented,
		// The bundle is a projection of the authority records (I3): nothing
		// is appended to it or published into it from outside.
		bundlev1.Bundle_AppendBundle_FullMethodName:               rpc.NotImplemented,
		bundlev1.Bundle_PublishJWTAuthority_FullMethodName:        rpc.NotImplemented,
		bundlev1.Bundle_PublishWITAuthority_FullMethodName:        rpc.NotImplemented,
		bundlev1.Bundle_ListFederatedBundles_FullMethodName:       rpc.NotImplemented,
		bundlev1.Bundle_GetFederatedBundle_FullMethodName:         rpc.NotImplemented,
		bundlev1.Bundle_BatchCreateFederatedBundle_FullMethodName: rpc.NotImplemented,
		bundlev1.Bundle_BatchUpdateFederatedBundle_FullMethodName: rpc.NotImplemented,
		bundlev1.Bundle_BatchSetFederatedBundle_FullMethodName:    rpc.NotImplemented,
		bundlev1.Bundle_BatchDeleteFederatedBundle_FullMethodName: rpc.NotImplemented,

		svidv1.SVID_MintX509SVID_FullMethodName: local,
		// The agents' half, a downstream server's, and SVIDs of other kinds.
		svidv1.SVID_MintJWTSVID_FullMethodName:         rpc.NotImplemented,
		svidv1.SVID_MintWITSVID_FullMethodName:         rpc.NotImplemented,
		svidv1.SVID_BatchNewX509SVID_FullMethodName:    rpc.NotImplemented,
		svidv1.SVID_NewJWTSVID_FullMethodName:          rpc.NotImplemented,
		svidv1.SVID_BatchNewWITSVID_FullMethodName:     rpc.NotImplemented,
		svidv1.SVID_NewDownstreamX509CA_FullMethodName: rpc.NotImplemented,

		reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName:      operator,
		reflectionv1alpha.ServerReflection_ServerReflectionInfo_FullMethodName: operator,
	}
}

// reporting tells refused of those whom rule turns away although they are
// known. Strangers are not reported: they would fill the audit log.
func reporting(rule rpc.Rule, refused Refused) rpc.Rule {
	return func(c rpc.Caller) error {
		err := rule(c)
		if err != nil && refused != nil && fault.KindOf(err) == fault.Denied {
			refused(c, err)
		}
		return err
	}
}

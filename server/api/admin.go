package api

import (
	"context"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	"github.com/seed-caa81108/assay/server/backup"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/registry"
)

const (
	// tellOffset is from when on an agent's clock is worth a warning.
	tellOffset = 30 * time.Second
	// maxNamed is how many agents one warning names.
	maxNamed = 5
)

// AdminService is what operators need beyond SPIRE's API.
type AdminService struct {
	adminv1.UnimplementedAdminServer
	cfg     AdminServiceConfig
	waits   chan struct{} // one for each call of Wait
	backups chan struct{} // one for each of Backup
}

// AdminServiceConfig is what an AdminService needs.
type AdminServiceConfig struct {
	TrustDomain    spiffeid.TrustDomain
	ReservedPrefix string
	Version        string
	StartedAt      time.Time
	Authority      *ca.Authority
	Registry       *registry.Registry
	// Spool takes a backup of the store.
	Spool func(context.Context) (*backup.Spooled, error)
	Audit Auditor
	// Warnings are what was found at start.
	Warnings []string
	// Stopping is closed when the server stops: Wait ends then.
	Stopping <-chan struct{}
}

// NewAdminService returns the service.
func NewAdminService(cfg AdminServiceConfig) *AdminService {
	return &AdminService{cfg: cfg, waits: make(chan struct{}, maxWaits), backups: make(chan struct{}, maxBackups)}
}

// Status implements adminv1.AdminServer.
func (s *AdminService) Status(context.Context, *adminv1.StatusRequest) (*adminv1.StatusResponse, error) {
	now := time.Now()
	bundle, issuer, fleet := s.cfg.Authority.Bundle(), s.cfg.Authority.Issuer(), s.cfg.Registry.Fleet()
	resp := &adminv1.StatusResponse{
		TrustDomain: s.cfg.TrustDomain.Name(), ReservedPrefix: s.cfg.ReservedPrefix, Version: s.cfg.Version,
		StartedAt: timestamppb.New(s.cfg.StartedAt), ServerTime: timestamppb.New(now),
		Revision: s.cfg.Registry.Revision(), BundleSequence: bundle.Sequence,
		Issuer:  &adminv1.Issuer{Id: issuer.ID, AuthorityId: issuer.AuthorityID, NotAfter: stamp(issuer.NotAfter)},
		Entries: uint32(s.cfg.Registry.CountEntries(registry.EntryFilter{})),
	}
	roots := s.cfg.Authority.Authorities()
	live := registry.LiveUnder(fleet, now)
	for _, root := range roots {
		shown := authorityToProto(root)
		shown.LiveSvids = live[root.ID]
		resp.Authorities = append(resp.Authorities, shown)
	}
	for i := range fleet {
		resp.Agents = append(resp.Agents, agentStatus(&fleet[i]))
	}
	if agent, at := s.cfg.Registry.FirstExpiry(now); !at.IsZero() {
		resp.OutageBudget = &adminv1.OutageBudget{FirstExpiry: stamp(at), AgentId: agent.String()}
	}
	resp.Warnings = append(resp.Warnings, s.cfg.Warnings...)
	resp.Warnings = append(resp.Warnings, rootWarnings(roots, now)...)
	resp.Warnings = append(resp.Warnings, fleetWarnings(fleet, bundle.Sequence, now)...)
	return resp, nil
}

func authorityToProto(root ca.Root) *adminv1.Authority {
	return &adminv1.Authority{
		Id: root.ID, Use: "x509", State: string(root.State), NotAfter: stamp(root.Certificate.NotAfter),
		CreatedAt: stamp(root.CreatedAt), Pin: ca.Pin(root.Certificate),
	}
}

func agentStatus(a *registry.AgentStatus) *adminv1.AgentStatus {
	return &adminv1.AgentStatus{
		Id: a.ID.String(), SvidNotAfter: stamp(svidEnd(&a.Agent)), Banned: a.Banned, Connected: a.Connected,
		LastSeen: stamp(a.LastSeen), Version: a.Version, AcknowledgedSequence: a.AcknowledgedSequence,
		WaitsUntil: stamp(a.WaitsUntil), Revision: a.Revision, LiveSvids: a.LiveCount(),
		EarliestExpiry: stamp(a.EarliestExpiry), ClockOffsetMs: a.ClockOffset.Milliseconds(),
	}
}

// svidEnd is when the agent's certificate ends: the active one, or the first
// one if it was not used yet.
func svidEnd(a *registry.Agent) time.Time {
	if a.ActiveSerial == "" {
		return a.PendingNotAfter
	}
	return a.NotAfter
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func rootWarnings(roots []ca.Root, now time.Time) (out []string) {
	for _, root := range roots {
		if since := now.Sub(root.CreatedAt); root.State == ca.Prepared && since > 24*time.Hour {
			out = append(out, fmt.Sprintf("the root %s has been prepared for %v and does not sign: no rotation begins by itself meanwhile; activate or revoke it", root.ID, since.Round(time.Hour)))
		}
		life := root.Certificate.NotAfter.Sub(root.Certificate.NotBefore)
		if left := root.Certificate.NotAfter.Sub(now); root.State == ca.Active && left < life/3 {
			out = append(out, fmt.Sprintf("the active root %s ends in %v, at %s: rotate it", root.ID, left.Round(time.Hour), root.Certificate.NotAfter.Format(time.RFC3339)))
		}
	}
	return out
}

func fleetWarnings(fleet []registry.AgentStatus, sequence uint64, now time.Time) (out []string) {
	warn := func(what string, is func(*registry.AgentStatus) bool) {
		count, names := 0, ""
		for i := range fleet {
			if a := &fleet[i]; !a.Banned && is(a) {
				if count++; count <= maxNamed {
					names += " " + a.ID.Path()
				}
			}
		}
		if count > maxNamed {
			names += " and others"
		}
		if count > 0 {
			out = append(out, fmt.Sprintf("%d %s:%s", count, what, names))
		}
	}
	warn("agents have let their SVID expire and have to rejoin", func(a *registry.AgentStatus) bool {
		return !now.Before(svidEnd(&a.Agent))
	})
	warn("connected agents have not acknowledged the current bundle", func(a *registry.AgentStatus) bool {
		return a.Connected && a.AcknowledgedSequence < sequence
	})
	warn("agents have a clock that is off by more than 30s", func(a *registry.AgentStatus) bool {
		return a.ClockOffset.Abs() > tellOffset
	})
	return out
}

package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
)

// identity keeps the server's own X.509-SVID fresh. Its key lives in memory
// and is a new one for each certificate.
type identity struct {
	id        spiffeid.ID
	dns       []string // by which the proxies of a mesh reach the server
	ips       []netip.Addr
	authority *ca.Authority
	log       *slog.Logger
	metrics   *metrics
	leaf      atomic.Pointer[ownLeaf]
}

// ownLeaf is a certificate with the root that it chains to.
type ownLeaf struct {
	tls.Certificate
	authorityID string
}

// serverID is the server's own SPIFFE ID.
func (c Config) serverID() (spiffeid.ID, error) {
	id, err := spiffeid.FromPath(c.trustDomain(), c.prefix()+"server")
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("build server ID: %w", err)
	}
	return id, nil
}

// newIdentity issues the first certificate.
func (s *Server) newIdentity(ctx context.Context, r *rooms) (*identity, error) {
	id, err := s.cfg.serverID()
	if err != nil {
		return nil, err
	}
	i := &identity{id: id, dns: s.cfg.Istio.DNSNames, ips: s.cfg.Istio.Addresses(), authority: r.authority, log: s.deps.Log, metrics: s.metrics}
	return i, i.issue(ctx)
}

// certificate returns the current certificate; it is asked at each handshake.
func (i *identity) certificate() (*tls.Certificate, error) {
	leaf := i.leaf.Load()
	if leaf == nil || !time.Now().Before(leaf.Leaf.NotAfter) {
		return nil, fault.New(fault.NotReady, "server_svid_expired", "the server's own certificate has expired and could not be renewed: see its log")
	}
	return &leaf.Certificate, nil
}

// authorityID is the root that the current certificate chains to.
func (i *identity) authorityID() string { return i.leaf.Load().authorityID }

// keepFresh renews at half life, by wall clock, and at once when another root
// signs; it tries again until it succeeds. Connections that are open keep the
// certificate they began with.
func (i *identity) keepFresh(ctx context.Context) error {
	var backoff schedule.Backoff
	leaf := i.leaf.Load()
	due := schedule.RenewAt(time.Now(), leaf.Leaf.NotAfter)
	for {
		if err := i.sleep(ctx, schedule.Tick(leaf.Leaf.NotAfter.Sub(leaf.Leaf.NotBefore))); err != nil {
			return nil
		}
		signs := i.authority.Issuer().AuthorityID
		if outdated := signs != "" && signs != leaf.authorityID; time.Now().Before(due) && !outdated {
			continue
		}
		if err := i.issue(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			i.log.LogAttrs(ctx, slog.LevelWarn, "server certificate could not be renewed",
				slog.String("error", err.Error()), slog.Time("not_after", leaf.Leaf.NotAfter))
			if err := schedule.Sleep(ctx, backoff.Next()); err != nil {
				return nil
			}
			continue
		}
		backoff.Reset()
		leaf = i.leaf.Load()
		due = schedule.RenewAt(time.Now(), leaf.Leaf.NotAfter)
	}
}

// sleep ends early when the bundle changes, since that may come with another
// root that signs.
func (i *identity) sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-i.authority.Bundle().Replaced():
	case <-ctx.Done():
	}
	return ctx.Err()
}

// issue makes a key and has our own authority sign for it: there is no other
// road to a signature (I1).
func (i *identity) issue(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("generate server key: %w", err)
	}
	by := audit.Origin{Actor: audit.Actor{Kind: "server", SPIFFEID: i.id.String()}}
	svids, err := i.authority.IssueX509(ctx, by, []ca.X509Request{{
		Kind: ca.Server, ID: i.id, DNSNames: i.dns, IPAddresses: i.ips, PublicKey: key.Public(), Rule: "own_identity",
	}})
	if err != nil {
		return fmt.Errorf("issue server certificate: %w", err)
	}
	if svids[0].Err != nil {
		return fmt.Errorf("issue server certificate: %w", svids[0].Err)
	}
	leaf, err := x509.ParseCertificate(svids[0].Chain[0])
	if err != nil {
		return fmt.Errorf("parse server certificate: %w", err)
	}
	i.leaf.Store(&ownLeaf{
		Certificate: tls.Certificate{Certificate: svids[0].Chain, PrivateKey: key, Leaf: leaf}, authorityID: svids[0].AuthorityID,
	})
	i.metrics.svidNotAfter.Set(float64(leaf.NotAfter.Unix()))
	i.log.LogAttrs(ctx, slog.LevelInfo, "server certificate issued",
		slog.String("serial", svids[0].Serial), slog.Time("not_after", leaf.NotAfter))
	return nil
}

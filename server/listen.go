package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/api"
	"github.com/seed-caa81108/assay/server/attest"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/istioca"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/rotation"
)

const (
	// maxAgentMessage holds a full batch of CSRs with EC keys.
	maxAgentMessage = 256 << 10
	// maxAdminMessage is gRPC's usual limit: operators' tools expect it.
	maxAdminMessage = 4 << 20
	// refusalLines is how many refused calls per second the log has of a port
	// that strangers reach.
	refusalLines = 20
	// meshStreams is how many calls may run on one connection of a mesh's proxy: a
	// ztunnel has as many under way at a time, a sidecar one. Who has proved nothing
	// costs memory with each.
	meshStreams = 8
	// drainTime is how long calls may take to finish once the server stops.
	drainTime = 5 * time.Second
)

// listen serves on both listeners until ctx ends.
func (s *Server) listen(ctx context.Context, r *rooms) error {
	own, err := s.newIdentity(ctx, r)
	if err != nil {
		return err
	}
	r.rotator = rotation.New(rotation.Options{
		Authority: r.authority, Fleet: r.registry.Fleet, MaxTTL: s.cfg.CA.MaxX509SVIDTTL, OwnAuthority: own.authorityID,
		Automatic: *s.cfg.CA.AutoRotate, Clock: r.clock, Audit: r.audit, Log: s.deps.Log, Registerer: s.deps.Registerer,
	})
	agentService := s.agentService(r)
	door := newHandover(r.port.Addr())
	watch := newRootWatch(r.authority.Bundle, s.deps.Log)
	servers, err := s.grpcServers(r, own, agentService, door, watch)
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return served(gctx, servers.agents.Serve(r.port)) })
	g.Go(func() error { return served(gctx, servers.remote.Serve(door)) })
	g.Go(func() error { return s.serveAdmin(gctx, servers.admin, r.socket) })
	g.Go(func() error { return own.keepFresh(gctx) })
	g.Go(func() error { return watch.run(gctx) })
	g.Go(func() error { return r.rotator.Run(gctx) })
	if servers.mesh != nil {
		g.Go(func() error { return served(gctx, servers.mesh.Serve(r.mesh)) })
		g.Go(func() error { return r.istio.Run(gctx) })
		g.Go(func() error { return r.istiods.Run(gctx) })
	}
	g.Go(func() error {
		<-gctx.Done()
		s.setStopping()
		agentService.Stop()
		drain(servers.all()...)
		return errStopped
	})
	s.setServing(r, func() error { return health(r, own) })
	s.deps.Log.LogAttrs(ctx, slog.LevelInfo, "server is ready", slog.String("trust_domain", s.cfg.TrustDomain),
		slog.String("listen", r.port.Addr().String()), slog.String("admin_socket", s.cfg.Admin.Socket),
		slog.Int("remote_operators", len(s.cfg.Admin.RemoteIDs)), slog.String("istio_listen", s.cfg.Istio.Listen))
	return g.Wait()
}

func (s *Server) agentService(r *rooms) *api.AgentService {
	attestors := map[string]api.NodeAttestor{
		agentv1.AttestorJoinToken: attest.NewJoinToken(r.registry),
		agentv1.AttestorRejoin:    attest.NewRejoin(r.registry),
	}
	if len(r.nodeRoots) > 0 {
		attestors[agentv1.AttestorX509Pop] = attest.NewX509Pop(attest.X509PopConfig{
			TrustDomain: s.cfg.trustDomain(), ReservedPrefix: s.cfg.prefix(), Roots: r.nodeRoots, Records: r.registry,
		})
	}
	if len(s.cfg.Kubernetes.Clusters) > 0 {
		attestors[agentv1.AttestorK8SPsat] = attest.NewK8SPsat(attest.K8SPsatConfig{
			TrustDomain: s.cfg.trustDomain(), ReservedPrefix: s.cfg.prefix(), Clusters: r.clusters, Records: r.registry,
		})
	}
	return api.NewAgentService(api.AgentConfig{
		TrustDomain: s.cfg.trustDomain(), ReservedPrefix: s.cfg.prefix(), Authority: r.authority, Registry: r.registry,
		Attestors: attestors, Clusters: r.clusters, Refused: r.refusals.Report,
		Audit: r.audit, Log: s.deps.Log, SignBatch: s.cfg.Limits.SignBatch, AttestRate: s.cfg.Limits.AttestRate,
		SyncStreams: s.cfg.Limits.AgentConnections, // an honest agent has one on each
		Rates: api.AgentRates{
			Signatures: s.cfg.Limits.SignRate, Renewals: s.cfg.Limits.RenewRate, SyncStreams: s.cfg.Limits.SyncRate,
		},
		LiveKeys: s.cfg.Limits.LiveKeys, NotSigned: s.metrics.refused,
	})
}

// servers are the gRPC servers of an Assay server.
type servers struct {
	agents, remote, admin *grpc.Server
	mesh                  *grpc.Server // nil: there is none
}

func (s servers) all() []*grpc.Server {
	all := []*grpc.Server{s.agents, s.remote, s.admin}
	if s.mesh != nil {
		all = append(all, s.mesh)
	}
	return all
}

// grpcServers builds them; every method that they have is in a table.
func (s *Server) grpcServers(r *rooms, own *identity, agentService *api.AgentService, door *handover, watch *rootWatch) (servers, error) {
	gid, err := s.cfg.Admin.gid()
	if err != nil {
		return servers{}, err
	}
	td := s.cfg.trustDomain()
	// An agent, or an operator who is not listed, that calls what is for
	// operators hears why it may not.
	methods := api.AgentMethods(s.cfg.prefix(), r.registry, r.refusals.Report)
	maps.Copy(methods, api.RemoteMethods(s.cfg.Admin.remoteIDs(), r.refusals.Report))
	agents := rpc.NewServer(rpc.ServerConfig{
		Name: "agents", Methods: methods,
		Creds: &connLimits{
			TransportCredentials: watch.credentials(rpc.ServerTLS(own.certificate, freshRoots(td, r.authority))),
			isAgent:              api.AgentRule(s.cfg.prefix(), r.registry),
			isOperator:           api.RemoteOperatorRule(s.cfg.Admin.remoteIDs()),
			operators:            door,
			counts:               newConnCounts(s.cfg.Limits.AgentConnections, s.cfg.Limits.AnonymousConnections),
			refused:              func(limit string) { s.metrics.rpc.LimitReached("agents", limit) },
			failed:               func(err error) { s.metrics.rpc.HandshakeFailed("agents", err) },
		},
		MaxRecvBytes: maxAgentMessage, MaxStreams: s.cfg.Limits.Streams, Log: s.deps.Log, Metrics: s.metrics.rpc,
		RefusalsPerSecond: refusalLines,
		Unlisted:          r.refusals.ReportUnlisted,
		Options:           keepalives(),
	})
	agentv1.RegisterAgentServer(agents, agentService)
	remote, err := s.remoteServer(r)
	if err != nil {
		return servers{}, err
	}
	operators := api.Operators{UIDs: append([]uint32{uint32(os.Geteuid())}, s.cfg.Admin.UIDs...), GID: gid}
	admin := rpc.NewServer(rpc.ServerConfig{
		Name: "admin", Methods: api.AdminMethods(operators, r.refusals.Report), Creds: rpc.LocalCreds(),
		MaxRecvBytes: maxAdminMessage, Log: s.deps.Log, Metrics: s.metrics.rpc, Unlisted: r.refusals.ReportUnlisted,
	})
	s.registerOperators(admin, r)
	return servers{agents: agents, remote: remote, admin: admin, mesh: s.meshServer(r, own)}, nil
}

// meshServer builds the server of a mesh's proxies, nil if there is no mesh. None
// of them has a certificate of ours yet, so all are limited by their address.
func (s *Server) meshServer(r *rooms, own *identity) *grpc.Server {
	if r.istio == nil {
		return nil
	}
	nobody := func(rpc.Caller) error { return errNobody }
	mesh := rpc.NewServer(rpc.ServerConfig{
		Name: "istio", Methods: istioca.Methods(),
		Creds: &connLimits{
			TransportCredentials: rpc.TokenTLS(own.certificate), isAgent: nobody, isOperator: nobody,
			counts:  newConnCounts(0, s.cfg.Limits.MeshConnections),
			refused: func(limit string) { s.metrics.rpc.LimitReached("istio", limit) },
			failed:  func(err error) { s.metrics.rpc.HandshakeFailed("istio", err) },
		},
		MaxStreams: meshStreams, Log: s.deps.Log, Metrics: s.metrics.rpc, RefusalsPerSecond: refusalLines,
		Options: slices.Concat(meshKeepalives(), meshBuffers(), istioca.ServerOptions()),
	})
	r.istio.Register(mesh)
	return mesh
}

// meshBuffers are small, as requests are: a mesh has a connection for each of its
// pods, which is idle nearly always.
func meshBuffers() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ReadBufferSize(4 << 10),
		grpc.StaticStreamWindowSize(64 << 10), grpc.StaticConnWindowSize(64 << 10),
	}
}

// meshKeepalives let proxies ping every half minute, and some sooner: one that is
// told to go away loses its request.
func meshKeepalives() []grpc.ServerOption {
	return append(keepalives(), grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}))
}

// errNobody says that a caller has no certificate that counts.
var errNobody = fault.New(fault.Denied, "no_certificate", "this port knows its callers by their tokens")

// keepalives are for connections over the network.
func keepalives() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: 5 * time.Minute,
			// A connection that agents keep using is replaced now and then,
			// without ending the streams on it.
			MaxConnectionAge: 30 * time.Minute,
			Time:             time.Minute, Timeout: 20 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 30 * time.Second}),
	}
}

// registerOperators puts the operators' services on a server; its method table
// says which of them its callers may call.
func (s *Server) registerOperators(srv *grpc.Server, r *rooms, guards ...registry.Guard) {
	td := s.cfg.trustDomain()
	entryv1.RegisterEntryServer(srv, api.NewEntryService(td, r.registry, r.audit, guards...))
	spireagentv1.RegisterAgentServer(srv, api.NewAgentAdmin(td, r.registry, r.audit, s.cfg.Attestation.JoinToken.MaxTTL))
	bundlev1.RegisterBundleServer(srv, api.NewBundleService(r.authority))
	svidv1.RegisterSVIDServer(srv, api.NewSVIDService(r.authority, r.audit))
	adminv1.RegisterAdminServer(srv, api.NewAdminService(api.AdminServiceConfig{
		TrustDomain: td, ReservedPrefix: s.cfg.prefix(), Version: s.deps.Version, StartedAt: r.startedAt, Authority: r.authority, Registry: r.registry, Warnings: r.warnings,
		Spool: s.spool(r), Audit: r.audit, Stopping: s.stopping,
	}))
	adminv1.RegisterRotationServer(srv, api.NewRotationService(r.authority, r.rotator, r.registry.Fleet))
	localauthorityv1.RegisterLocalAuthorityServer(srv, api.NewLocalAuthorityService(r.authority, r.rotator))
	reflection.Register(srv)
}

// freshRoots gives each handshake the roots of the bundle as it is then. The
// pool is made once per bundle and never changed.
func freshRoots(td spiffeid.TrustDomain, authority *ca.Authority) rpc.Roots {
	type generation struct {
		bundle *ca.Bundle
		pool   *x509.CertPool
	}
	var last atomic.Pointer[generation]
	return func() (spiffeid.TrustDomain, *x509.CertPool) {
		bundle := authority.Bundle()
		g := last.Load()
		if g == nil || g.bundle != bundle {
			g = &generation{bundle: bundle, pool: bundle.Pool()}
			last.Store(g)
		}
		return td, g.pool
	}
}

// listenAdmin puts the operators' socket in place. The socket, and a directory
// that is for a group only, are given to admin.group if there is one.
func (s *Server) listenAdmin() (*durable.Listener, error) {
	dir := filepath.Dir(s.cfg.Admin.Socket)
	if err := durable.MkdirPrivate(dir, 0o750); err != nil {
		return nil, fmt.Errorf("check directory of admin.socket: %w", err)
	}
	gid, err := s.cfg.Admin.gid()
	if err != nil {
		return nil, err
	}
	lis, err := durable.ListenUnix(s.cfg.Admin.Socket, 0o660)
	if err != nil || gid == nil {
		return lis, err
	}
	paths := []string{s.cfg.Admin.Socket}
	// A directory that everybody may pass, such as /run, is left alone.
	if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&0o017 == 0o010 {
		paths = append(paths, dir)
	}
	for _, path := range paths {
		if err := os.Lchown(path, -1, int(*gid)); err != nil {
			_ = lis.Close()
			return nil, fault.Wrap(fault.Precondition, err, "admin_group_denied",
				path+" can't be given to admin.group: let the server's user be a member of it, or leave admin.group out")
		}
	}
	return lis, nil
}

// serveAdmin serves the admin socket and puts it back if somebody removed it.
func (s *Server) serveAdmin(ctx context.Context, admin *grpc.Server, socket *durable.KeptListener) error {
	g, keeping := errgroup.WithContext(ctx)
	// By ctx itself, which is what the stop of the server waited for: one that
	// is derived from it may end a moment later.
	g.Go(func() error { return served(ctx, admin.Serve(socket)) })
	g.Go(func() error {
		socket.Keep(keeping, func(err error) {
			if err != nil {
				s.deps.Log.LogAttrs(ctx, slog.LevelWarn, "admin socket is gone and can't be put back", slog.String("error", err.Error()))
				return
			}
			s.deps.Log.LogAttrs(ctx, slog.LevelWarn, "admin socket was removed: put it back", slog.String("path", s.cfg.Admin.Socket))
		})
		return nil
	})
	return g.Wait()
}

// served turns the end of a grpc.Server into an error only if nobody asked
// for it.
func served(ctx context.Context, err error) error {
	if ctx.Err() != nil || errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	if err == nil {
		return errors.New("a listener ended by itself")
	}
	return fmt.Errorf("serve: %w", err)
}

// drain lets calls finish for drainTime and then ends them.
func drain(servers ...*grpc.Server) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		var g errgroup.Group
		for _, srv := range servers {
			g.Go(func() error { srv.GracefulStop(); return nil })
		}
		_ = g.Wait()
	}()
	timer := time.NewTimer(drainTime)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		for _, srv := range servers {
			srv.Stop()
		}
		<-done
	}
}

// health says whether the server can do its work.
func health(r *rooms, own *identity) error {
	select {
	case <-r.store.Failed():
		return r.store.Err()
	default:
	}
	if err := r.audit.Err(); err != nil {
		return err
	}
	if err := r.authority.Ready(); err != nil {
		return err
	}
	_, err := own.certificate()
	return err
}

package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/schedule"
	"github.com/seed-caa81108/assay/server/api"
	"github.com/seed-caa81108/assay/server/attest"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/istioca"
	"github.com/seed-caa81108/assay/server/keys"
	"github.com/seed-caa81108/assay/server/kube"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/rotation"
	"github.com/seed-caa81108/assay/server/store"
)

// rooms is everything that is open while the server runs.
type rooms struct {
	socket    *durable.KeptListener // of operators
	port      net.Listener          // of agents
	mesh      net.Listener          // of proxies; nil: there is no mesh
	store     *store.Bolt
	audit     *audit.Log
	seal      keys.SealKey
	authority *ca.Authority
	registry  *registry.Registry
	rotator   *rotation.Rotator
	refusals  *api.Refusals
	istio     *istioca.Service    // nil: there is no mesh
	istiods   *istioca.Istiods    // likewise
	nodeRoots []*x509.Certificate // of attestation by certificate; none if that is off
	clusters  *kube.Clusters
	clock     *schedule.Clock // notices when the wall clock is set
	warnings  []string
	startedAt time.Time

	closers []func() error // in the order of opening
}

// close closes what was opened, the last first.
func (r *rooms) close() error {
	var errs []error
	for i := len(r.closers) - 1; i >= 0; i-- {
		errs = append(errs, r.closers[i]())
	}
	return errors.Join(errs...)
}

// open opens the rooms in the order in which they need each other.
func (s *Server) open(ctx context.Context) (_ *rooms, err error) {
	r := &rooms{startedAt: time.Now(), clock: schedule.SystemClock()}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if err := durable.MkdirPrivate(s.cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("check data_dir: %w", err)
	}
	if r.seal, err = keys.LoadSealKey(s.cfg.SealKeyFile); err != nil {
		return nil, err
	}
	if r.nodeRoots, err = loadNodeRoots(s.cfg.Attestation.X509Pop.CABundleFile); err != nil {
		return nil, err
	}
	if r.clusters, err = kube.Open(s.cfg.Kubernetes, s.cfg.trustDomain(), s.cfg.prefix(), s.deps.Version); err != nil {
		return nil, err
	}
	r.warnings = append(s.warnings(), r.clusters.Warnings()...)
	for _, text := range r.warnings {
		s.deps.Log.LogAttrs(ctx, slog.LevelWarn, "configuration needs attention", slog.String("warning", text))
	}
	r.clusters.KeepRootMaps(s.cfg.Istio.RootConfigMaps())
	if err := r.clusters.Register(s.deps.Registerer); err != nil {
		return nil, err
	}
	// Before anything is made that can't be taken back: an address that is in
	// use must not cost a trust domain its first root.
	if err := s.bind(ctx, r); err != nil {
		return nil, err
	}
	if r.store, err = store.OpenBolt(store.BoltConfig{Dir: s.cfg.DataDir, Log: s.deps.Log}); err != nil {
		return nil, err
	}
	r.closers = append(r.closers, r.store.Close)
	if r.audit, err = audit.Open(s.cfg.Audit, s.deps.Log); err != nil {
		return nil, err
	}
	r.closers = append(r.closers, r.audit.Close)
	if err := checkRollback(r.store, r.audit); err != nil {
		return nil, err
	}
	r.refusals = api.NewRefusals(r.audit, s.deps.Log)
	td := s.cfg.trustDomain()
	if r.authority, err = ca.Open(ctx, ca.Options{
		TrustDomain: td, Config: s.cfg.CA, AgentSVIDTTL: s.cfg.Attestation.AgentSVIDTTL, Bootstrap: s.cfg.Bootstrap,
		ReservedPrefix: s.cfg.prefix(), Store: r.store, Keys: keys.NewSealed(r.seal, td), MAC: r.seal.MAC,
		Audit: r.audit, Clock: r.clock, Log: s.deps.Log, Registerer: s.deps.Registerer,
	}); err != nil {
		return nil, fmt.Errorf("open authority: %w", err)
	}
	if err := checkNodeRoots(r.nodeRoots, r.authority.Bundle()); err != nil {
		return nil, err
	}
	if r.registry, err = registry.Open(ctx, registry.Options{
		TrustDomain: td, ReservedPrefix: s.cfg.prefix(), RejoinWindow: *s.cfg.Attestation.RejoinWindow,
		MaxX509SVIDTTL: s.cfg.CA.MaxX509SVIDTTL, AgentSVIDTTL: s.cfg.Attestation.AgentSVIDTTL, NewEntry: s.newEntry(r.clusters), Clock: r.clock, Store: r.store, Log: s.deps.Log, Registerer: s.deps.Registerer,
	}); err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	if s.cfg.Istio.On() {
		if err := s.openMesh(r); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// openMesh opens what a mesh needs.
func (s *Server) openMesh(r *rooms) (err error) {
	td := s.cfg.trustDomain()
	if r.istio, err = istioca.New(istioca.Options{
		TrustDomain: td, Config: s.cfg.Istio, DefaultTTL: s.cfg.CA.X509SVIDTTL, Authority: r.authority, Clusters: r.clusters,
		Audit: r.audit, Log: s.deps.Log, Registerer: s.deps.Registerer,
	}); err != nil {
		return err
	}
	id, err := s.cfg.serverID()
	if err != nil {
		return err
	}
	r.istiods, err = istioca.NewIstiods(istioca.IstiodOptions{
		TrustDomain: td, Config: s.cfg.Istio, Server: id, Authority: r.authority, Secrets: r.clusters,
		Log: s.deps.Log, Registerer: s.deps.Registerer,
	})
	return err
}

// newEntry refuses entries that would give a pod the identity of another.
func (s *Server) newEntry(clusters *kube.Clusters) registry.Guard {
	if len(s.cfg.Kubernetes.Clusters) == 0 && !s.cfg.Istio.On() {
		return nil
	}
	return func(e *registry.Entry) error { return clusters.CheckEntry(e.SPIFFEID, e.Selectors) }
}

// checkRollback refuses a store that has not come as far as the audit log says
// that it once had: a copy of an earlier day was put in its place, and tokens
// that were used, bans and roots that were replaced are forgotten. An empty
// store is another matter, see bootstrap.
func checkRollback(kv *store.Bolt, log *audit.Log) error {
	has, had := kv.Revision(), log.Reached()
	if has > store.FirstRevision && has < had {
		return fault.Newf(fault.Precondition, "store_rollback",
			"the store is at revision %d and the audit log knows of %d: it went back in time; put the newest store in place, or make this one fit for use with assay-server restore --accept-rollback", has, had)
	}
	log.Follow(kv.Revision)
	return nil
}

// maxNodeRoots bounds the file of loadNodeRoots.
const maxNodeRoots = 1 << 20

// loadNodeRoots reads the authorities that vouch for nodes. A file that can't
// be used stops the server: none at all would be another rule than the one
// that was configured.
func loadNodeRoots(path string) ([]*x509.Certificate, error) {
	if path == "" {
		return nil, nil
	}
	data, err := durable.ReadTrusted(path, maxNodeRoots)
	if err != nil {
		return nil, fmt.Errorf("read attestation.x509pop.ca_bundle_file: %w", err)
	}
	roots, err := attest.ParseNodeRoots(data)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "config_x509pop",
			"attestation.x509pop.ca_bundle_file: "+path+" can't be used: put PEM certificates of authorities into it, and nothing else")
	}
	return roots, nil
}

// checkNodeRoots refuses our own roots as authorities of nodes, which bundle
// files invite to. The attestor refuses SVIDs of ours in any case.
func checkNodeRoots(nodes []*x509.Certificate, own *ca.Bundle) error {
	for _, root := range own.Roots {
		if slices.ContainsFunc(nodes, root.Certificate.Equal) {
			return fault.New(fault.Precondition, "config_x509pop",
				"attestation.x509pop.ca_bundle_file holds a root of this trust domain, which certifies workloads: name an authority that gives certificates to nodes alone")
		}
	}
	return nil
}

// bind opens the listeners; nothing is served on them yet.
func (s *Server) bind(ctx context.Context, r *rooms) (err error) {
	if r.socket, err = durable.KeepUnix(s.listenAdmin); err != nil {
		return err
	}
	r.closers = append(r.closers, closeListener(r.socket))
	for _, port := range []struct {
		field, address string
		into           *net.Listener
	}{{"listen", s.cfg.Listen, &r.port}, {"istio.listen", s.cfg.Istio.Listen, &r.mesh}} {
		if port.address == "" {
			continue
		}
		lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", port.address)
		if err != nil {
			return fault.Wrap(fault.Precondition, err, "config_listen", port.field+": "+port.address+" can't be opened: free the port or set another address")
		}
		*port.into = lis
		r.closers = append(r.closers, closeListener(lis))
	}
	return nil
}

// closeListener closes lis, which a server that served it has closed already.
func closeListener(lis net.Listener) func() error {
	return func() error {
		if err := lis.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("close listener: %w", err)
		}
		return nil
	}
}

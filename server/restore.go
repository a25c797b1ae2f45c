package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/keys"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/store"
)

// RestoreRequest says what to restore, and why.
type RestoreRequest struct {
	// Backup is the file to restore. If it is empty, the store that is in place
	// is accepted though it went back in time.
	Backup string
	// Check: find out what it would do, and change nothing.
	Check bool
	// Force goes on though a root was replaced since. It needs a reason, and so
	// does accepting a store that went back.
	Force  bool
	Reason string
}

// RestoreReport is what Restore found and did.
type RestoreReport struct {
	TakenAt  time.Time // the moment that was gone back to
	Revision int64     // of the store from now on
	Root     string    // that signs
	Prepared string    // that was about to; empty: none was
	Sequence uint64    // of the bundle
	Agents   registry.Restored
	Since    Since // what is lost, as far as the audit log tells
	// Kept is where the store is that was in place before; empty: none was.
	Kept string
}

// restoreDir, in the data directory, is where a store is made ready.
const restoreDir = "restore.tmp"

// Restore puts a store in place that continues a backup, while no server runs.
// It
//
//  1. takes the data directory, and refuses to replace a store;
//  2. reads from the audit log, if there is one, what is lost;
//  3. loads the backup into a store beside, which fails if a bit of it is wrong;
//  4. has the owners of the records make them fit for use;
//  5. writes the audit line and moves the store into place.
//
// Before the last step nothing is changed.
func Restore(ctx context.Context, cfg Config, req RestoreRequest, deps Deps) (_ RestoreReport, err error) {
	if cfg, err = cfg.Validate(); err != nil {
		return RestoreReport{}, err
	}
	if (req.Force || req.Backup == "") && !req.Check && req.Reason == "" {
		return RestoreReport{}, fault.New(fault.Invalid, "usage", "say why with --reason: it goes into the audit log")
	}
	j := &restoring{cfg: cfg, req: req, deps: deps, work: filepath.Join(cfg.DataDir, restoreDir)}
	if j.seal, err = keys.LoadSealKey(cfg.SealKeyFile); err != nil {
		return RestoreReport{}, err
	}
	if err := durable.MkdirPrivate(cfg.DataDir, 0o700); err != nil {
		return RestoreReport{}, fmt.Errorf("check data_dir: %w", err)
	}
	src, err := j.openSource(ctx)
	if err != nil {
		return RestoreReport{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(j.work), src.close()) }()
	if err := j.makeRoom(); err != nil {
		return RestoreReport{}, err
	}
	j.report.TakenAt = src.moment.Time
	err = j.run(ctx, src)
	return j.report, err
}

// makeRoom finds a directory to work in. A check may run beside a server and
// other checks.
func (j *restoring) makeRoom() (err error) {
	if j.req.Check {
		j.work, err = os.MkdirTemp(j.cfg.DataDir, restoreDir+"-")
		return err
	}
	if err := os.RemoveAll(j.work); err != nil {
		return fmt.Errorf("remove what an earlier restore left: %w", err)
	}
	return nil
}

// restoring is one run of Restore.
type restoring struct {
	cfg  Config
	req  RestoreRequest
	deps Deps
	seal keys.SealKey
	work string
	// history is what the audit log tells.
	history history
	report  RestoreReport
}

func (j *restoring) run(ctx context.Context, src source) (err error) {
	if j.history, err = readHistory(j.cfg.Audit.Path, src.moment.Revision); err != nil {
		return err
	}
	// Above every revision that the audit log knows, else it would refuse the
	// store that is to come.
	at := store.Moment{Revision: max(src.moment.Revision, j.history.reached), Time: src.moment.Time}
	if err := store.Load(store.BoltConfig{Dir: j.work}, at, src.records); err != nil {
		return fmt.Errorf("load the store: %w", err)
	}
	if err := j.makeFit(ctx); err != nil || j.req.Check {
		return err
	}
	if err := j.audit(ctx); err != nil {
		return err
	}
	j.report.Kept, err = store.Install(j.work, j.cfg.DataDir)
	return err
}

// makeFit has the owners of the records make them so.
func (j *restoring) makeFit(ctx context.Context) (err error) {
	kv, err := store.OpenBolt(store.BoltConfig{Dir: j.work})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kv.Close()) }()
	td := j.cfg.trustDomain()
	roots, err := ca.Restore(ctx, ca.RestoreOptions{
		TrustDomain: td, Config: j.cfg.CA, AgentSVIDTTL: j.cfg.Attestation.AgentSVIDTTL,
		Store: kv, Keys: keys.NewSealed(j.seal, td), MAC: j.seal.MAC,
	})
	if err != nil {
		return err
	}
	j.report.Since = j.history.of(roots.States)
	if err := j.checkRoots(roots); err != nil {
		return err
	}
	for id, state := range roots.States {
		if state == ca.Prepared {
			j.report.Prepared = id
		}
	}
	j.report.Agents, err = registry.Restore(ctx, registry.RestoreOptions{
		TrustDomain: td, ReservedPrefix: j.cfg.prefix(), Store: kv, After: j.report.Since.Acts,
		TakenAt: j.report.TakenAt.Add(-j.cfg.CA.Backdate), // certificates of after it begin as early as this
	})
	if err != nil {
		return err
	}
	j.report.Root, j.report.Sequence, j.report.Revision = roots.Active.ID, roots.Sequence, kv.Revision()
	return nil
}

// checkRoots refuses to go back behind a root that was replaced: agents may
// trust its successor only, and it may have been replaced because it was known
// to others.
func (j *restoring) checkRoots(roots ca.Restored) error {
	lost := j.report.Since.rootsLost(roots.States)
	if lost == "" || j.req.Force {
		return nil
	}
	return fault.New(fault.Precondition, "restore_roots_moved",
		"since this backup "+lost+": agents and workloads may no longer trust what it would bring back; use a newer backup, or, if there is none, --force --reason and give every agent that has lost contact a new pin or trust bundle and a new token")
}

// audit writes the line of the restore. It names the new store's revision: from
// here on a server refuses the old one.
func (j *restoring) audit(ctx context.Context) (err error) {
	log, err := audit.Open(j.cfg.Audit, j.deps.Log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	log.Follow(func() int64 { return j.report.Revision })
	uid, gid := uint32(os.Getuid()), uint32(os.Getgid())
	line := audit.Line{
		Origin: audit.Origin{Actor: audit.Actor{Kind: "operator", UID: &uid, GID: &gid}},
		Action: "store.restore", Target: audit.Target{AuthorityID: j.report.Root},
		Why: audit.Why{Rule: "operator", Reason: j.req.Reason}, Result: audit.Result{Code: "ok"},
	}
	if j.req.Force {
		line.Why.Rule = "forced"
	}
	return log.Record(ctx, line)
}

package server

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/backup"
	"github.com/seed-caa81108/assay/server/store"
)

// source is what a restore reads. Until it is closed no server can use the data
// directory, unless the restore only checks.
type source struct {
	moment  store.Moment
	records iter.Seq2[store.Record, error]
	close   func() error
}

func (j *restoring) openSource(ctx context.Context) (source, error) {
	if j.req.Backup == "" {
		return j.openPlaced(ctx)
	}
	if j.req.Check {
		return j.openBackup()
	}
	unlock, err := durable.LockDir(j.cfg.DataDir)
	if err != nil {
		return source{}, err
	}
	err = store.CheckVacant(j.cfg.DataDir)
	var src source
	if err == nil {
		src, err = j.openBackup()
	}
	if err != nil {
		return source{}, errors.Join(err, unlock())
	}
	closeFile := src.close
	src.close = func() error { return errors.Join(closeFile(), unlock()) }
	return src, nil
}

// openBackup opens the file.
func (j *restoring) openBackup() (source, error) {
	f, err := os.Open(j.req.Backup)
	if err != nil {
		return source{}, fault.Wrap(fault.Precondition, err, "backup_unreadable", "the backup "+j.req.Backup+" can't be opened: look at its path, owner and mode")
	}
	r, err := backup.NewReader(f, j.seal.MAC)
	if err == nil && r.Header().TrustDomain != j.cfg.TrustDomain {
		err = fault.Newf(fault.Precondition, "trust_domain_mismatch",
			"the backup is of trust domain %.255q and trust_domain is %s: use another backup, or another configuration", r.Header().TrustDomain, j.cfg.TrustDomain)
	}
	if err != nil {
		return source{}, errors.Join(err, f.Close())
	}
	h := r.Header()
	return source{moment: store.Moment{Revision: h.Revision, Time: h.TakenAt}, records: r.Records(), close: f.Close}, nil
}

// openPlaced opens the store that is in place, which locks the directory too.
func (j *restoring) openPlaced(ctx context.Context) (source, error) {
	if store.CheckVacant(j.cfg.DataDir) == nil {
		return source{}, fault.New(fault.Precondition, "store_missing", "there is no store in "+j.cfg.DataDir+" to accept: name a backup")
	}
	placed, err := store.OpenBolt(store.BoltConfig{Dir: j.cfg.DataDir, Log: j.deps.Log})
	if err != nil {
		return source{}, err
	}
	at, err := placed.Moment(ctx)
	if err != nil {
		return source{}, errors.Join(fmt.Errorf("read the store: %w", err), placed.Close())
	}
	return source{moment: at, records: placed.Records(ctx), close: placed.Close}, nil
}

package server

import (
	"context"

	"github.com/seed-caa81108/assay/server/backup"
)

// spool takes backups of the store into the data directory.
func (s *Server) spool(r *rooms) func(context.Context) (*backup.Spooled, error) {
	return func(ctx context.Context) (*backup.Spooled, error) {
		h := backup.Header{TrustDomain: s.cfg.TrustDomain, Version: s.deps.Version}
		return backup.Spool(ctx, s.cfg.DataDir, r.store, h, r.seal.MAC)
	}
}

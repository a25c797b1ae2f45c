package api_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	"github.com/seed-caa81108/assay/server/api"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/backup"
)

// backupStream takes what Backup sends.
type backupStream struct {
	grpc.ServerStream
	ctx  context.Context
	sent int
}

func (s *backupStream) Context() context.Context { return s.ctx }

func (s *backupStream) Send(*adminv1.BackupResponse) error { s.sent++; return nil }

type auditor struct{ err error }

func (a auditor) Record(context.Context, ...audit.Line) error { return a.err }

// A backup that is not written down is not given out, and takes no space: its
// file is gone when the call ends, however it ends.
func TestABackupThatIsNotWrittenDownIsNotGivenOut(t *testing.T) {
	full := fault.New(fault.Exhausted, "audit_full", "no space")
	for name, tc := range map[string]struct {
		audit error
		want  string
		sent  int
	}{
		"full": {full, "audit_full", 0},
		"good": {nil, "", 2},
	} {
		var file *os.File
		s := api.NewAdminService(api.AdminServiceConfig{
			Audit: auditor{tc.audit},
			Spool: func(context.Context) (*backup.Spooled, error) {
				path := filepath.Join(t.TempDir(), "spool")
				if err := os.WriteFile(path, []byte("backup"), 0o600); err != nil {
					return nil, err
				}
				var err error
				file, err = os.Open(path)
				return &backup.Spooled{File: file, Bytes: 6}, err
			},
		})
		stream := &backupStream{ctx: t.Context()}
		err := s.Backup(&adminv1.BackupRequest{}, stream)
		if tc.want == "" && err != nil || tc.want != "" && fault.ReasonOf(err) != tc.want || stream.sent != tc.sent {
			t.Errorf("%s: %v, %d messages", name, err, stream.sent)
		}
		if _, err := file.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: the file is still open", name)
		}
	}
}

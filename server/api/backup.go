package api

import (
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
	"github.com/seed-caa81108/assay/server/audit"
)

const (
	// maxBackups is how many backups are fetched at a time; each takes the
	// store's size in the data directory meanwhile.
	maxBackups = 2
	// backupChunk is how many bytes of a backup a message has.
	backupChunk = 64 << 10
)

// Backup implements adminv1.AdminServer.
func (s *AdminService) Backup(_ *adminv1.BackupRequest, stream grpc.ServerStreamingServer[adminv1.BackupResponse]) (err error) {
	select {
	case s.backups <- struct{}{}:
		defer func() { <-s.backups }()
	default:
		return fault.Newf(fault.Exhausted, "backup_in_progress", "%d backups are being fetched already: wait for one to end", maxBackups)
	}
	ctx := stream.Context()
	spooled, err := s.cfg.Spool(ctx)
	if err == nil {
		defer func() { err = errors.Join(err, spooled.Close()) }()
	}
	line := audit.Line{Origin: origin(ctx), Action: "backup.take", Why: audit.Why{Rule: "operator"}, Result: result(err)}
	if aerr := record(ctx, s.cfg.Audit, line); aerr != nil {
		return aerr
	}
	if err != nil {
		return err
	}
	h := spooled.Header
	info := &adminv1.BackupInfo{TrustDomain: h.TrustDomain, Revision: h.Revision, TakenAt: stamp(h.TakenAt), Records: spooled.Records, Bytes: uint64(spooled.Bytes)}
	if err := stream.Send(&adminv1.BackupResponse{Part: &adminv1.BackupResponse_Info{Info: info}}); err != nil {
		return err
	}
	for {
		chunk := make([]byte, backupChunk) // gRPC may hold on to it
		n, err := spooled.Read(chunk)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read spooled backup: %w", err)
		}
		if err := stream.Send(&adminv1.BackupResponse{Part: &adminv1.BackupResponse_Chunk{Chunk: chunk[:n]}}); err != nil {
			return err
		}
	}
}

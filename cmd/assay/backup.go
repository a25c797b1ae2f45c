package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

// backupShape is what `backup FILE -o json` prints.
type backupShape struct {
	File          string     `json:"file"`
	TrustDomain   string     `json:"trust_domain"`
	StoreRevision int64      `json:"store_revision"`
	TakenAt       *time.Time `json:"taken_at"`
	Records       uint64     `json:"records"`
	Bytes         uint64     `json:"bytes"`
}

func newBackupCommand(t *tool) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "Write a backup of the server's store, for assay-server restore",
		Long: `Write the server's store as of this moment into a new file, with mode 0600: roots
with their encrypted keys, entries, agents, bans. The server goes on meanwhile.
An existing file is never replaced; - is standard output.

The seal key is not in the backup. Keep a copy of it somewhere else: the backup
is of no use without it, and whoever has both has the CA.

  $ assay backup /var/backups/assay-$(date +%F).backup
  $ kubectl exec assay-server-0 -- assay backup - > assay.backup`,
		Args: oneArg("file"),
	}
	cmd.RunE = t.localVerb(func(ctx context.Context, s *serverConn, args []string) error { return t.backup(ctx, s, args[0]) })
	return t.localFlags(cmd)
}

func (t *tool) backup(ctx context.Context, s *serverConn, path string) error {
	if path == "-" {
		_, err := fetchBackup(ctx, s, t.stdout)
		return err
	}
	var info *adminv1.BackupInfo
	err := durable.CreateFile(path, 0o600, func(w io.Writer) (err error) {
		info, err = fetchBackup(ctx, s, w)
		return err
	})
	if err != nil {
		return err
	}
	doc := backupShape{
		File: path, TrustDomain: info.GetTrustDomain(), StoreRevision: info.GetRevision(),
		TakenAt: momentOf(info.GetTakenAt()), Records: info.GetRecords(), Bytes: info.GetBytes(),
	}
	return t.print(doc, doc.write)
}

func (b backupShape) write(w io.Writer) error {
	all := table{}
	all.add("file", b.File)
	all.add("trust domain", b.TrustDomain)
	all.add("store revision", strconv.FormatInt(b.StoreRevision, 10))
	all.add("taken at", stampOf(b.TakenAt))
	all.add("records", strconv.FormatUint(b.Records, 10))
	all.add("bytes", strconv.FormatUint(b.Bytes, 10))
	return all.write(w)
}

// fetchBackup writes what the server sends to w. If it ends early, w has less
// than a backup and there is an error.
func fetchBackup(ctx context.Context, s *serverConn, w io.Writer) (*adminv1.BackupInfo, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := s.admin.Backup(ctx, &adminv1.BackupRequest{})
	if err != nil {
		return nil, callError(ctx, err, s.peer)
	}
	first, err := stream.Recv()
	if err != nil {
		return nil, callError(ctx, err, s.peer)
	}
	written, err := copyChunks(w, stream)
	switch broken, isWriting := errors.AsType[*writeError](err); {
	case isWriting:
		return nil, fmt.Errorf("write backup: %w", broken.cause)
	case err != nil:
		return nil, callError(ctx, err, s.peer)
	case first.GetInfo() == nil || written != first.GetInfo().GetBytes():
		return nil, fault.Newf(fault.NotReady, "backup_incomplete", "the server sent %d bytes of %d: try again", written, first.GetInfo().GetBytes())
	}
	return first.GetInfo(), nil
}

// writeError tells an error of the disk from one of the stream.
type writeError struct{ cause error }

func (e *writeError) Error() string { return e.cause.Error() }

func copyChunks(w io.Writer, stream grpc.ServerStreamingClient[adminv1.BackupResponse]) (written uint64, err error) {
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return written, nil
		}
		if err != nil {
			return written, err
		}
		n, err := w.Write(part.GetChunk())
		written += uint64(n)
		if err != nil {
			return written, &writeError{err}
		}
	}
}

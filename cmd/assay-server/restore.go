package main

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server"
)

func restoreCommand() *cobra.Command {
	var req server.RestoreRequest
	var config, sealKey string
	var rollback bool
	cmd := &cobra.Command{
		Use:   "restore [FILE]",
		Short: "Put a store in place that continues a backup, while the server is stopped",
		Long: `restore puts a store into an empty data_dir that continues the backup in FILE, made
by assay backup. The configuration and the seal key are those of the server that
made it; without that key a backup is of no use.

What happened since the backup is lost. Join tokens become void, the bundle gets
a sequence above every one before, and agents go on with the certificates that
they have, though the backup does not know them. If the audit log is still there,
bans and evictions since the backup are made again, and what else is lost is
printed: entries to look at, agents that have to attest anew. A backup from
before a root was replaced is refused, because agents may not trust it any more.

--check finds all that out and changes nothing; of a FILE it may do so beside the
running server.

Without FILE and with --accept-rollback it makes the store fit for use that is
in place and that the server refuses as store_rollback, because it is older than
the audit log. Restore the newest backup instead, if there is one.`,
		Example: `  assay-server restore --check /var/backups/assay.backup
  assay-server restore /var/backups/assay.backup`,
		Args: cobra.MaximumNArgs(1),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == 1 && rollback:
			return fault.New(fault.Invalid, "usage", "name a backup, or give --accept-rollback for the store that is in place, not both")
		case len(args) == 0 && !rollback:
			return fault.New(fault.Invalid, "usage", "name the backup to restore")
		case len(args) == 1:
			req.Backup = args[0]
		}
		if err := daemon.Harden(); err != nil {
			return err
		}
		var cfg server.Config
		if err := daemon.Load(config, &cfg); err != nil {
			return err
		}
		if sealKey != "" {
			cfg.SealKeyFile = sealKey
		}
		log, err := daemon.NewLogger(cmd.ErrOrStderr(), "warn", "text")
		if err != nil {
			return err
		}
		return restore(cmd, cfg, req, log)
	}
	fl := cmd.Flags()
	fl.StringVar(&config, "config", defaultConfig, "configuration file")
	fl.StringVar(&sealKey, "seal-key-file", "", "the seal key, if it is not where seal_key_file of the configuration says")
	fl.BoolVar(&req.Check, "check", false, "find out what it would do, and change nothing")
	fl.BoolVar(&rollback, "accept-rollback", false, "go on with the store that is in place, though it is older than the audit log")
	fl.BoolVar(&req.Force, "force", false, "go on though a root was replaced since the backup")
	fl.StringVar(&req.Reason, "reason", "", "why, for the audit log; needed with --accept-rollback and --force")
	return cmd
}

func restore(cmd *cobra.Command, cfg server.Config, req server.RestoreRequest, log *slog.Logger) error {
	done, err := server.Restore(cmd.Context(), cfg, req, server.Deps{Log: log})
	if err != nil {
		return err
	}
	return writeReport(cmd.OutOrStdout(), done, req.Check)
}

// writeReport tells what was done, then what somebody has to look at.
func writeReport(w io.Writer, r server.RestoreReport, check bool) error {
	var b strings.Builder
	verb := "restored"
	if check {
		verb = "can be restored, nothing was changed"
	}
	fmt.Fprintf(&b, "%s: the store of %s\n", verb, r.TakenAt.UTC().Format(time.RFC3339))
	fmt.Fprintf(&b, "  root that signs      %s\n", r.Root)
	fmt.Fprintf(&b, "  bundle sequence      %d\n", r.Sequence)
	fmt.Fprintf(&b, "  store revision       %d\n", r.Revision)
	fmt.Fprintf(&b, "  join tokens voided   %d\n", r.Agents.Tokens)
	if r.Kept != "" {
		fmt.Fprintf(&b, "  store before         %s\n", r.Kept)
	}
	if r.Prepared != "" {
		fmt.Fprintf(&b, "a root was about to take over, %s: a rotation that was under way goes on when the server starts; see assay root status, and assay root abort\n", r.Prepared)
	}
	ids(&b, "agents that are banned", r.Agents.Bans)
	if !r.Since.Complete {
		b.WriteString("the audit log does not tell of all the time since then, or there is none: more bans, entries and roots may have changed since than is told here; look at each\n")
	}
	ids(&b, "banned since, and banned again", r.Agents.Banned)
	ids(&b, "evicted since, and evicted again", r.Agents.Evicted)
	ids(&b, "attested since: those that are new have to attest anew", r.Since.Attested.List)
	ids(&b, "entries created since, which are gone", r.Since.Created.List)
	ids(&b, "entries updated since, which are as they were before", r.Since.Updated.List)
	ids(&b, "entries deleted since, which are back: delete them again", r.Since.Deleted.List)
	_, err := io.WriteString(w, b.String())
	return err
}

// maxIDs is how many IDs of a list are printed; the audit log has them all.
const maxIDs = 20

func ids(b *strings.Builder, what string, list []string) {
	if len(list) == 0 {
		return
	}
	fmt.Fprintf(b, "%s (%d):\n", what, len(list))
	for _, id := range list[:min(len(list), maxIDs)] {
		fmt.Fprintf(b, "  %s\n", id)
	}
	if more := len(list) - maxIDs; more > 0 {
		fmt.Fprintf(b, "  and %d more: see the audit log\n", more)
	}
}

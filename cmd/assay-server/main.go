// Command assay-server is the CA of a trust domain: it attests nodes and signs
// X.509-SVIDs for the workloads on them.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/server"
)

const defaultConfig = "/etc/assay-server/server.yaml"

func main() {
	os.Exit(daemon.Main(context.Background(), program(), os.Args[1:], os.Stdout, os.Stderr))
}

func program() daemon.Program {
	return daemon.Program{
		Name:     "assay-server",
		Short:    "The Assay workload CA",
		Config:   defaultConfig,
		Load:     load,
		Commands: []*cobra.Command{sealKeyCommand(), restoreCommand()},
	}
}

func load(path string) (daemon.Settings, error) {
	var cfg server.Config
	if err := daemon.Load(path, &cfg); err != nil {
		return daemon.Settings{}, err
	}
	cfg, err := cfg.Validate()
	if err != nil {
		return daemon.Settings{}, err
	}
	return daemon.Settings{
		LogLevel:  cfg.Log.Level,
		LogFormat: cfg.Log.Format,
		Metrics:   cfg.Metrics.Listen,
		New: func(r daemon.Runtime) (daemon.Service, error) {
			return server.New(cfg, server.Deps{Log: r.Log, Registerer: r.Registerer, Version: r.Version})
		},
	}, nil
}

func sealKeyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "seal-key FILE",
		Short: "Make the key that root keys are encrypted with; an existing file is never overwritten",
		Long: `seal-key writes a new random key to FILE, with mode 0600. Name the file as
seal_key_file in the configuration.

The store and this key together are the whole CA: keep a copy of the key, and
keep it away from the backups of the data directory. Without it the store can't
be opened again.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := server.WriteSealKey(args[0]); err != nil {
				return err
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), args[0]+" written: keep a copy, away from the backups of the data directory")
			return err
		},
	}
}

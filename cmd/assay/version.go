package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/seed-caa81108/assay/pkg/daemon"
)

// versionShape is what `version -o json` prints. Revision is the commit that
// the program was built from, empty if it was not built in a work tree.
type versionShape struct {
	Version  string `json:"version"`
	Revision string `json:"revision"`
	Go       string `json:"go"`
}

func newVersionCommand(t *tool) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Long: `Print the version of this program; it reaches no server.

  $ assay version -o json`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error { return t.printVersion() },
	}
}

func (t *tool) printVersion() error {
	build := daemon.ReadBuild()
	shape := versionShape{Version: build.Version, Revision: build.Revision, Go: build.Go}
	return t.print(shape, func(w io.Writer) error {
		if _, err := fmt.Fprintln(w, "assay "+build.String()); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
		return nil
	})
}

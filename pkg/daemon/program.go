package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

// Program is a daemon as its main describes it.
type Program struct {
	Name   string // of the command
	Short  string
	Config string // where the configuration file is by default
	// Load reads and completes the configuration.
	Load func(path string) (Settings, error)
	// Commands are further commands of this program.
	Commands []*cobra.Command
}

// Settings is what this package needs to know of a complete configuration, and
// how to make the daemon from it.
type Settings struct {
	LogLevel, LogFormat string
	Metrics             string // address of the operations listener
	New                 func(Runtime) (Service, error)
}

// Runtime is what a daemon gets from its program.
type Runtime struct {
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Version    string
}

// Service is a daemon.
type Service interface {
	// Run serves until ctx ends and everything is closed.
	Run(ctx context.Context) error
	// Ready says why the daemon can't serve; nil when it can.
	Ready(ctx context.Context) error
}

// Main runs one command line of p and returns its exit code.
func Main(ctx context.Context, p Program, args []string, stdout, stderr io.Writer) int {
	c := commandLine{Program: p, stdout: stdout, stderr: stderr, build: ReadBuild()}
	root := c.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err != nil && !c.accepted {
		err = usage(err.Error())
	}
	return Fail(stderr, c.logFormat, err)
}

type commandLine struct {
	Program
	stdout, stderr io.Writer
	build          Build
	accepted       bool   // cobra took the command line: errors are no longer about it
	logFormat      string // once it is known; a last error has the log's form
}

// Commands returns the command tree of p, which its reference is made of.
func Commands(p Program) *cobra.Command {
	c := commandLine{Program: p, stdout: io.Discard, stderr: io.Discard}
	return c.root()
}

func (c *commandLine) root() *cobra.Command {
	root := &cobra.Command{
		Use:               c.Name,
		Short:             c.Short,
		Version:           c.build.String(),
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRun:  func(*cobra.Command, []string) { c.accepted = true },
		Args:              cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usage("name a command: " + c.names() + "; --help tells all")
		},
	}
	root.SetOut(c.stdout)
	root.SetErr(c.stderr)
	root.AddCommand(c.runCommand(), c.validateCommand(), c.healthCommand())
	root.AddCommand(c.Commands...)
	return root
}

// names lists the commands as a sentence does.
func (c *commandLine) names() string {
	names := []string{"run", "validate", "healthcheck"}
	for _, cmd := range c.Commands {
		names = append(names, cmd.Name())
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

func (c *commandLine) configFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("config", c.Config, "configuration file")
}

func (c *commandLine) runCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "run", Short: "Serve until SIGTERM or SIGINT", Args: cobra.NoArgs}
	config := c.configFlag(cmd)
	profiling := cmd.Flags().Bool("pprof", false, "serve /debug/pprof beside /metrics; on a loopback address only")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := Harden(); err != nil {
			return err
		}
		return c.run(cmd.Context(), *config, *profiling)
	}
	return cmd
}

func (c *commandLine) validateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "validate", Args: cobra.NoArgs,
		Short: "Check the configuration file: nothing is opened or started",
	}
	config := c.configFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if _, err := c.Load(*config); err != nil {
			return err
		}
		_, err := fmt.Fprintln(c.stdout, *config+" is valid")
		return err
	}
	return cmd
}

func (c *commandLine) healthCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "healthcheck", Args: cobra.NoArgs,
		Short: "Ask the running daemon whether it is ready: exit 0, or 69 with its reason",
	}
	config := c.configFlag(cmd)
	addr := cmd.Flags().String("addr", "", "host:port of its metrics.listen, instead of reading the configuration")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *addr != "" && cmd.Flags().Changed("config") {
			return usage("give --config or --addr, not both")
		}
		if *addr == "" {
			s, err := c.Load(*config)
			if err != nil {
				return err
			}
			*addr = s.Metrics
		}
		if err := CheckHealth(cmd.Context(), *addr); err != nil {
			return err
		}
		_, err := fmt.Fprintln(c.stdout, "ready")
		return err
	}
	return cmd
}

// run is the life of the daemon, in the order of the package comment.
func (c *commandLine) run(ctx context.Context, config string, profiling bool) error {
	settings, err := c.Load(config)
	if err != nil {
		return err
	}
	log, err := NewLogger(c.stderr, settings.LogLevel, settings.LogFormat)
	if err != nil {
		return err
	}
	c.logFormat = settings.LogFormat
	ctx, stop := Signals(ctx)
	defer stop()

	registry := NewRegistry(c.build)
	service, err := settings.New(Runtime{Log: log, Registerer: registry, Version: c.build.Version})
	if err != nil {
		return err
	}
	ops, err := ListenOps(ctx, Ops{Addr: settings.Metrics, Registry: registry, Ready: service.Ready, Profiling: profiling, Log: log})
	if err != nil {
		return err
	}
	log.LogAttrs(ctx, slog.LevelInfo, "starting", slog.String("program", c.Name), slog.String("version", c.build.String()),
		slog.String("config", config), slog.String("metrics", ops.Addr().String()))
	if err := serve(ctx, service, ops); err != nil {
		return err
	}
	log.LogAttrs(ctx, slog.LevelInfo, "stopped", slog.String("program", c.Name))
	return nil
}

// serve runs the listener beside the service and a little longer.
func serve(ctx context.Context, service Service, ops *OpsServer) error {
	opsCtx, stopOps := context.WithCancel(context.WithoutCancel(ctx))
	defer stopOps()
	g, serviceCtx := errgroup.WithContext(ctx)
	g.Go(func() error { return ops.Run(opsCtx) })
	g.Go(func() error {
		defer stopOps()
		return service.Run(serviceCtx)
	})
	return g.Wait()
}

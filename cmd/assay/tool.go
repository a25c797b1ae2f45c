package main

import (
	"context"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// env is all that the tool takes from the process it runs in.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	// isTTY says that a person is watching stderr: progress may be shown.
	isTTY bool
	// asksTTY says that a person can answer on stdin.
	asksTTY bool
}

// tool is one run of the program: its surroundings and its global flags.
type tool struct {
	env
	format format
	socket string
	remote remoteFlags
	// started is set once cobra has accepted the command line.
	started bool
	// noHelp is why there was no help to show.
	noHelp error
}

// run executes one command line and returns the exit code.
func run(ctx context.Context, e env, args []string) int {
	t := &tool{env: e, format: formatText}
	root := newRoot(t)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		err = t.noHelp
	}
	if err == nil {
		return 0
	}
	if !t.started {
		err = usageError(daemon.Describe(err).Message)
	}
	return daemon.Fail(t.stderr, string(t.format), err)
}

// usageError is a command line that can't be run: exit 64.
func usageError(text string) error { return fault.New(fault.Invalid, "usage", text) }

// newRoot returns the whole command tree.
func newRoot(t *tool) *cobra.Command {
	root := &cobra.Command{
		Use:   "assay",
		Short: "Operate and debug an Assay workload CA",
		Long: `assay talks to an Assay server through its admin socket, or as a remote operator
over the network (--server), and to an agent through the SPIFFE Workload API.

Every command takes -o json for scripts. Exit codes: 0 done, 64 wrong usage,
65 bad data, 69 unavailable or not found, 70 a defect, 73 can't create or
full, 74 input or output, 75 conflict or try again, 77 not permitted,
78 configuration.

  $ assay status
  $ assay entry create --spiffe-id spiffe://example.org/web \
      --parent-id spiffe://example.org/assay/agent/join_token/6d1f... \
      --selector unix:uid:1000
  $ assay svid fetch`,
		SilenceErrors: true,
		SilenceUsage:  true,
		// Runs when the command line is accepted, for cobra's own commands too.
		PersistentPreRun: func(*cobra.Command, []string) { t.started = true },
		Args:             noVerb,
	}
	version := root.Flags().Bool("version", false, "print the version of this program, as assay version does")
	root.RunE = func(cmd *cobra.Command, _ []string) error {
		if *version {
			return t.printVersion()
		}
		return cmd.Help()
	}
	root.SetIn(t.stdin)
	root.SetOut(t.stdout)
	root.SetErr(t.stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError(err.Error()) })
	root.PersistentFlags().VarP(&t.format, "output", "o", "form of the output: text or json")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(
		newSVIDCommand(t), newEntryCommand(t), newAgentCommand(t), newTokenCommand(t),
		newBundleCommand(t), newX509Command(t), newRootCommand(t), newStatusCommand(t), newWaitCommand(t), newBackupCommand(t),
		newDevCommand(t), newVersionCommand(t),
	)
	completeGroups(root)
	t.helpOnlyForCommands(root)
	return root
}

// helpOnlyForCommands makes help for an unknown command the error that the
// command itself is. Left alone, cobra shows the help of what it did find.
func (t *tool) helpOnlyForCommands(root *cobra.Command) {
	show := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		if cmd.HasSubCommands() {
			t.noHelp = noVerb(cmd, cmd.Flags().Args())
		}
		if t.noHelp == nil {
			show(cmd, args)
		}
	})
	root.SetHelpCommand(&cobra.Command{
		Use: "help [COMMAND]", Short: "Explain a command", Long: "Explain a command.\n\n  $ assay help entry create",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil {
				return usageError(err.Error())
			}
			if err := noVerb(cmd, rest); err != nil {
				return err
			}
			cmd.InitDefaultHelpFlag()
			return cmd.Help()
		},
	})
}

// completeGroups makes cobra's completion command refuse what it does not
// know, as our own groups do.
func completeGroups(root *cobra.Command) {
	root.InitDefaultCompletionCmd("completion")
	for _, cmd := range root.Commands() {
		if !cmd.Runnable() {
			cmd.Args, cmd.RunE = noVerb, needsVerb
		}
	}
}

// group returns a command that only holds others.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Long: short + ".",
		Args: noVerb, RunE: needsVerb,
	}
	cmd.AddCommand(subs...)
	return cmd
}

func needsVerb(cmd *cobra.Command, _ []string) error {
	return usageError(cmd.CommandPath() + " needs a verb: see " + cmd.CommandPath() + " --help")
}

func noVerb(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	cmd.SuggestionsMinimumDistance = 2
	text := "unknown command " + quote(args[0]) + ": see " + cmd.CommandPath() + " --help"
	if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
		text = "unknown command " + quote(args[0]) + ", did you mean " + strings.Join(like, " or ") + "?"
	}
	return usageError(text)
}

// noArgs is for verbs that take flags only.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError(cmd.CommandPath() + " takes no argument, got " + quote(args[0]))
	}
	return nil
}

// someArgs is for verbs that take at least one argument.
func someArgs(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError(cmd.CommandPath() + " needs at least one " + what)
		}
		return nil
	}
}

// oneArg is for verbs that take exactly one argument.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usageError(cmd.CommandPath() + " needs exactly one " + what)
		}
		return nil
	}
}

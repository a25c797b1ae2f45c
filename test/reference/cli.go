package reference

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Commands is the page of a program: every command that its help shows, with
// its flags.
func Commands(root *cobra.Command) string {
	var b strings.Builder
	root.InitDefaultHelpCmd()
	writeCommand(&b, root)
	return b.String()
}

func writeCommand(b *strings.Builder, cmd *cobra.Command) {
	if cmd.HasParent() {
		b.WriteString("\n#")
	}
	text := cmd.Long
	if text == "" {
		text = strings.TrimSuffix(cmd.Short, ".") + "."
	}
	fmt.Fprintf(b, "# %s\n\n", cmd.CommandPath())
	writeText(b, text)
	if cmd.Runnable() && !cmd.HasAvailableSubCommands() {
		fmt.Fprintf(b, "\n    %s\n", strings.TrimSuffix(cmd.UseLine(), " [flags]"))
	}
	cmd.InitDefaultHelpFlag()
	writeFlags(b, cmd.NonInheritedFlags())
	if cmd.Name() == "completion" { // cobra's own, one for each shell
		var shells []string
		for _, sub := range cmd.Commands() {
			shells = append(shells, sub.Name())
		}
		fmt.Fprintf(b, "\n    %s %s\n", cmd.CommandPath(), strings.Join(shells, "|"))
		return
	}
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" {
			writeCommand(b, sub)
		}
	}
}

// writeText keeps the lines of a help text: indented ones are examples.
func writeText(b *strings.Builder, text string) {
	for line := range strings.Lines(strings.TrimSpace(text)) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "  ") {
			line = "  " + line
		}
		b.WriteString(line + "\n")
	}
}

func writeFlags(b *strings.Builder, flags *pflag.FlagSet) {
	first := true
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		if first {
			b.WriteString("\n| flag | what it does |\n|---|---|\n")
			first = false
		}
		kind, usage := pflag.UnquoteUsage(f)
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		if kind != "" {
			name += " " + strings.ToUpper(strings.TrimSuffix(kind, "Array"))
		}
		if d := shortDuration(f.DefValue); kind != "" && !strings.Contains(usage, "default") && !slices.Contains([]string{"", "[]", "0", "0s"}, d) {
			usage += " (default " + d + ")"
		}
		fmt.Fprintf(b, "| `%s` | %s |\n", cell(name), cell(usage))
	})
}

// shortDuration leaves out the zeros that package time writes: 720h0m0s.
func shortDuration(text string) string {
	if _, err := time.ParseDuration(text); err != nil {
		return text
	}
	for _, unit := range []string{"m", "h"} {
		for _, zero := range []string{"0s", "0m"} {
			if short, ok := strings.CutSuffix(text, unit+zero); ok {
				text = short + unit
			}
		}
	}
	return text
}

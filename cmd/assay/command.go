package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// splitCommand cuts a command line into words, as a shell would, but expands
// nothing: single quotes hold all, double quotes all but \" and \\, and a
// backslash elsewhere takes the next character as it is.
func splitCommand(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	started := false // of the current word; '' is an empty one
	var quoted rune  // the quote we are in, or 0
	escaped := false
	for _, r := range line {
		switch {
		case escaped:
			if quoted == '"' && r != '"' && r != '\\' {
				word.WriteRune('\\')
			}
			word.WriteRune(r)
			escaped = false
		case r == '\\' && quoted != '\'':
			escaped, started = true, true
		case quoted != 0 && r == quoted:
			quoted = 0
		case quoted != 0:
			word.WriteRune(r)
		case r == '\'' || r == '"':
			quoted, started = r, true
		case r == ' ' || r == '\t' || r == '\n':
			if started {
				words = append(words, word.String())
				word.Reset()
				started = false
			}
		default:
			word.WriteRune(r)
			started = true
		}
	}
	if quoted != 0 || escaped {
		return nil, errors.New("a quote or a backslash is not closed")
	}
	if started {
		words = append(words, word.String())
	}
	if len(words) > 0 && words[0] == "" {
		return nil, errors.New("the command's name is empty")
	}
	return words, nil
}

// runCommand runs a command and waits for it. At the timeout, or when ctx ends,
// it gets SIGTERM and, some seconds later, SIGKILL.
func runCommand(ctx context.Context, words []string, timeout time.Duration, dir string, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, words[0], words[1:]...) //nolint:gosec // G204: running what the user gave as --exec is the feature
	cmd.Env = append(os.Environ(), "ASSAY_SVID_DIR="+dir)
	// Standard output is ours alone: a script may be reading it.
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("ended after %s: %w", timeout, ctx.Err())
	}
	return err
}

// Command assay is the tool for people: operators and whoever debugs a
// workload. It owns no state. It asks the server through the server's admin
// socket and the agent through the Workload API, as any workload would, and
// never opens a store.
//
// It trusts the kernel for who serves a socket's path (only root or the
// daemon's user can put a socket there) and the daemons for what they answer;
// text that a third party may have chosen, such as a hint or a selector, is
// printed with its control characters escaped.
//
// Each verb does: parse flags (anything wrong is exit 64), dial, call, print
// one document in the asked form, and map its error to an exit code. An error is
// one line on standard error, `error: <reason>: <text>`, or with -o json an
// object.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends what does not stop
	code := run(ctx, env{
		stdin:  os.Stdin,
		stdout: os.Stdout,
		stderr: os.Stderr,
		getenv: os.Getenv,
		isTTY:  isTerminal(os.Stderr), asksTTY: isTerminal(os.Stdin),
	}, os.Args[1:])
	stop()
	os.Exit(code)
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

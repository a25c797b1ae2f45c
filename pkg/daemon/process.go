package daemon

import (
	"context"
	"fmt"
	"os/signal"

	"golang.org/x/sys/unix"
)

// Signals returns a context that ends with the first SIGTERM or SIGINT. From
// then on the signals have their usual effect again: a second one ends a
// daemon that does not stop. A reader of the log that goes away does not.
func Signals(ctx context.Context) (context.Context, context.CancelFunc) {
	signal.Ignore(unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// Harden keeps the process's memory and files from others: no debugger of the
// same user and no core dump sees a key, and a file made without a mode in mind
// is its owner's alone.
func Harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid tracing: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	unix.Umask(0o077)
	return nil
}

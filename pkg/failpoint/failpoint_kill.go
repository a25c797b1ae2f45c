//go:build failpoint

// Package failpoint kills the process at a named point: tests only.
package failpoint

import (
	"os"
	"syscall"
)

// Hit kills the process without any clean-up if ASSAY_FAILPOINT is name.
func Hit(name string) {
	if os.Getenv("ASSAY_FAILPOINT") != name {
		return
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // the signal may take a moment; nothing may run after the point
}

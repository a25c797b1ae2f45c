//go:build failpoint

// Package failpoint kills the process at a named point: tests only.
package failpoint

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

var hits atomic.Int64

// Hit kills the process without any clean-up if ASSAY_FAILPOINT is name, or
// name:n and this is the nth time.
func Hit(name string) {
	want, nth, _ := strings.Cut(os.Getenv("ASSAY_FAILPOINT"), ":")
	if want != name {
		return
	}
	if n, err := strconv.ParseInt(nth, 10, 64); err == nil && hits.Add(1) < n {
		return
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // the signal may take a moment; nothing may run after the point
}

//go:build !failpoint

// Package failpoint names the points at which a crash must not lose or double
// anything. In a normal build Hit does nothing and is inlined away; built with
// the tag failpoint, the process kills itself at the point that the
// environment variable ASSAY_FAILPOINT names, as name or as name:nth.
package failpoint

// Hit marks a named point.
func Hit(string) {}

// Package e2e drives the real binaries over real sockets, as a user would.
// It is built with the tag e2e; the suites that take minutes also need long.
package e2e

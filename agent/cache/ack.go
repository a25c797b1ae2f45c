//go:build !ackunsent

package cache

// acksUnsent is true in a build that goes on serving the bundle it began with
// and acknowledges the newest: it exists to show that this breaks handshakes
// during a rotation, and must never be shipped.
const acksUnsent = false

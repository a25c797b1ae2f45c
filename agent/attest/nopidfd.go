//go:build nopidfd

package attest

const pinned = false

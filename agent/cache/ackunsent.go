//go:build ackunsent

package cache

const acksUnsent = true

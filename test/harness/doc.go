// Package harness runs the real binaries in a directory of their own: a
// server, any number of agents, and the command line tool. The end-to-end
// tests and the benchmarks stand on it.
package harness

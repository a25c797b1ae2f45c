// Package audit owns the audit log: one JSON line per act, each durable before
// the act is answered.
//
// The log is what an investigation starts from, so it promises three things.
// Nothing is answered before its line is on disk: Record returns after the
// write and the fdatasync, and an error means that nothing may be answered.
// Nothing can be taken out unseen: lines are numbered, and each holds the
// SHA-256 of the line before it, across rotations and restarts. Nothing secret
// gets in: a line consists of the declared fields of Line and of nothing else.
//
// The steps of Record: encode the lines; join the batch that is being gathered,
// or begin it; whoever began it waits for the batch before it to reach the
// disk, closes it, numbers and chains its lines, rotates if the file is full,
// writes once, syncs once and wakes everybody who joined. There is no goroutine
// and no timer: under load batches grow by themselves, without load a line
// costs one write and one sync.
//
// A write that fails is taken back. A full disk is answered with audit_full
// until there is space again. What can't be taken back for certain leaves the
// log failed until it is opened anew, because a line after an unknown one would
// break the chain.
//
// The package trusts its directory (checked at Open, locked while open) and no
// content of its files: the last line is decoded with bounds before the chain
// is continued from it.
package audit

// Package daemon is what the mains of the daemons share: the command line, the
// configuration file, the log, the operations listener, signals, hardening and
// exit codes. Only cmd imports it.
//
// The steps of a start: harden the process, before anything secret is in it;
// load the configuration strictly and complete it; open the log; bind the
// operations listener, so that a taken address is known before anything else
// is opened; run the daemon beside it until a signal; stop the listener last,
// so that a draining daemon still says that it is not ready.
//
// The configuration file is trusted only as far as its owner: it must belong to
// root or to us and be writable by nobody else. The operations listener trusts
// nobody: it is read only, small and bounded.
package daemon

// Package server is the Assay server as one thing: its configuration, the
// order in which its rooms are opened and closed, its listeners and its own
// TLS identity.
//
// Run checks the data directory, reads the seal key and binds both listeners,
// before anything is made that can't be taken back. Then it opens the store,
// which locks the directory, the audit log, the authority and the registry. Then
// everything runs: the authority and the registry follow the store, the server
// gets itself an X.509-SVID from its own authority, and the listeners serve. To
// stop, it first drains the calls, so that none loses the ground it stands on,
// and then closes in the reverse order of opening.
//
// It trusts its configuration, the paths that pkg/durable has checked, and the
// rooms below it.
package server

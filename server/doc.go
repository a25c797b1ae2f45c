// Package server is the Assay server as one thing: its configuration, the
// order in which its rooms are opened and closed, its listeners and its own
// TLS identity.
//
// Run opens, in this order: the data directory (checked, locked), the seal key,
// the store, the audit log, the authority, the registry. Then everything runs:
// the authority and the registry follow the store, the server gets itself an
// X.509-SVID from its own authority, and the listeners serve. It closes in the
// reverse order: listeners first, so that no call loses the ground it stands
// on.
//
// It trusts its configuration, the paths that pkg/durable has checked, and the
// rooms below it.
package server

// Package registry owns registration entries, agents and join tokens: their
// types, their rules, who may get what, their records in the store, and the
// mirror in memory that answers every read.
//
// It trusts the store to be the only writer of what it reads back and nothing
// else: entries are checked when they are written and again when they are
// loaded; what an agent says about itself is kept as a claim, apart from the
// records, and is never an input to a decision here.
//
// An agent has the entries whose parent is its ID, and those whose parent is an
// alias of it (alias.go). Its aliases follow from its record and the entries;
// nobody stores them, and what the agent says is no part of them.
//
// The order of steps of a write: check the rules; commit the record together
// with what must stay unique (an index record for entries, the agent's record
// for a token) under preconditions; wait until the mirror has seen the commit;
// answer. The mirror changes in one place only, from the store's Watch, so
// every server that shares a store comes to the same view.
//
// Records:
//
//	registry/epoch      names the store's history; revisions compare within it
//	registry/restored   which part of that history is lost; only after a restore
//	entry/<id>          a registration entry
//	entryix/<sha256>    which entry has this SPIFFE ID, parent and selectors
//	agent/<path>        an attested agent, by the path of its SPIFFE ID
//	token/<sha256>      a join token, by its hash; its value is nowhere
package registry

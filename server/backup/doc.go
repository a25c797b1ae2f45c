// Package backup writes the content of a store into one file and reads it back.
//
// A backup is the whole CA but its seal key: root keys are in it as the store
// has them, encrypted under that key. Whoever holds the file without the key
// has no CA, and can't change a bit of the file unnoticed, because it ends in a
// MAC under the same key.
//
//	assay backup 1\n
//	{"trust_domain": ..., "revision": ..., "taken_at": ..., "version": ...}\n
//	records, in the order of their keys: key, revision, value
//	end: an empty key, the number of records
//	SHA-256 of all bytes before it, MAC of that digest
//
// Keys, values and the header have their length before them, all numbers are
// unsigned varints. The digest tells a file that was cut or damaged from one
// of another seal key.
package backup

package adminv1

// RevisionMetadata is the key of the trailer by which answers of the entry API
// tell a revision of the store that has everything they speak of: one that Wait
// accepts. SPIRE's messages have no place for it; their revision_number counts
// the changes of one entry.
const RevisionMetadata = "assay-revision"

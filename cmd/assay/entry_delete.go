package main

import (
	"context"
	"slices"

	"github.com/spf13/cobra"
	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
)

// deleteBatch is how many IDs go in one request: far below the server's
// message limit, whatever the IDs.
const deleteBatch = 100

func newEntryDeleteCommand(t *tool) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "delete ID...",
		Short: "Delete registration entries",
		Long: `Delete registration entries by ID. Workloads lose the identities at once;
certificates they hold end by themselves. Each ID succeeds or fails alone; the
exit code is that of the first failure.

  $ assay entry delete zcmjbsw6w47mjhtyow77sjgr45`,
		Args: someArgs("entry ID"),
		RunE: t.serverVerb(t.deleteEntries),
	}
	return t.serverFlags(cmd)
}

func (t *tool) deleteEntries(ctx context.Context, s *serverConn, ids []string) error {
	doc := newVerdicts()
	for batch := range slices.Chunk(ids, deleteBatch) {
		resp, err := ask(ctx, s, s.entries.BatchDeleteEntry, &spireentry.BatchDeleteEntryRequest{Ids: batch})
		if err == nil && len(resp.GetResults()) != len(batch) {
			err = badAnswer("a result for each entry")
		}
		for i, id := range batch {
			item := err // a batch that failed whole failed for each of its IDs
			if err == nil {
				item = itemError(resp.GetResults()[i].GetStatus())
			}
			doc.add(id, "deleted", item)
		}
	}
	doc.StoreRevision = s.revision.Load()
	return t.finish(doc, "entries were not deleted")
}

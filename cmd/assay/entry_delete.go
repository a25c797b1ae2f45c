package main

import (
	"context"
	"io"
	"slices"

	"github.com/spf13/cobra"
	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// deletion is what `entry delete -o json` prints: each ID of the command line
// in its order. Error is null for an entry that was deleted.
type deletion struct {
	Results []deletionResult `json:"results"`
}

type deletionResult struct {
	ID    string      `json:"id"`
	Error *errorShape `json:"error"`
}

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
	doc := deletion{Results: []deletionResult{}}
	rows := table{header: []string{"ID", "RESULT"}}
	var first error
	failures := 0
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
			result, text := deletionResult{ID: id}, "deleted"
			if item != nil {
				shape := describe(item)
				result.Error, text = &shape, shape.Reason+": "+shape.Message
				failures++
				if first == nil {
					first = item
				}
			}
			doc.Results = append(doc.Results, result)
			rows.add(id, text)
		}
	}
	if err := t.print(doc, func(w io.Writer) error { return rows.write(w) }); err != nil {
		return err
	}
	if first == nil || len(ids) == 1 {
		return first
	}
	return fault.Newf(fault.KindOf(first), fault.ReasonOf(first),
		"%d of %d entries were not deleted, the first because: %s", failures, len(ids), fault.SafeText(first))
}

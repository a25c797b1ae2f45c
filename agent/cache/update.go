package cache

import (
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// What one message of the server may have in all its chunks together: a server
// that never comes to the last one must not take the agent's memory, and with
// it the workloads' service. A node has tens of thousands of entries at most,
// of a few hundred bytes each; this is twenty times that.
const (
	maxUpdateItems  = 1_000_000
	maxUpdateBytes  = 512 << 20
	maxUpdateChunks = 16384
)

// update is a message of the server as far as it has come.
type update struct {
	chunks       []*agentv1.SyncResponse
	items, bytes int
}

func (u *update) add(chunk *agentv1.SyncResponse) error {
	u.items += len(chunk.GetEntries()) + len(chunk.GetRemovedEntryIds()) + len(chunk.GetPods().GetPods()) + len(chunk.GetPods().GetRemovedUids())
	u.bytes += proto.Size(chunk)
	u.chunks = append(u.chunks, chunk)
	if u.items > maxUpdateItems || u.bytes > maxUpdateBytes || len(u.chunks) > maxUpdateChunks {
		return fault.Newf(fault.Precondition, "sync_protocol", "the server sent an update that does not end: %d entries and %d bytes in %d chunks so far",
			u.items, u.bytes, len(u.chunks))
	}
	return nil
}

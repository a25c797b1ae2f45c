package cache

import (
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// I9: an update has an end, whatever it is made of, and an honest one of a
// large node is far from it.
func TestUpdateIsBounded(t *testing.T) {
	entry := &agentv1.Entry{Id: strings.Repeat("i", 36), SpiffeId: "spiffe://example.org/" + strings.Repeat("p", 200)}
	many := &agentv1.SyncResponse{}
	for range 5000 {
		many.Entries = append(many.Entries, entry)
	}
	cases := map[string]struct {
		chunk *agentv1.SyncResponse
		pass  int // as many chunks must pass
	}{
		"entries":  {many, 20},
		"removals": {&agentv1.SyncResponse{RemovedEntryIds: make([]string, 5000)}, 20},
		"bytes":    {&agentv1.SyncResponse{RemovedEntryIds: []string{strings.Repeat("x", 15<<20)}}, 20},
		"nothing":  {&agentv1.SyncResponse{}, 10_000},
	}
	for name, c := range cases {
		var u update
		n := 0
		for ; n <= 20_000; n++ {
			if err := u.add(c.chunk); err != nil {
				if fault.ReasonOf(err) != "sync_protocol" {
					t.Errorf("%s: %v", name, err)
				}
				break
			}
		}
		if n < c.pass || n > 20_000 {
			t.Errorf("%s: ended after %d chunks", name, n)
		}
	}
}

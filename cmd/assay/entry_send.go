package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
)

const (
	// applyBatch and applyBytes bound one request: well below the server's
	// message limit, and small enough that progress shows.
	applyBatch = 500
	applyBytes = 1 << 20
	// applyInFlight is how many requests are sent at a time: one is on its way
	// to the disk while others are read and checked.
	applyInFlight = 4
)

// storedEntries lists all entries of the server, with selectors in canonical
// order.
func storedEntries(ctx context.Context, s *serverConn) ([]*types.Entry, error) {
	var stored []*types.Entry
	err := pages(func(token string) (string, error) {
		resp, err := ask(ctx, s, s.entries.ListEntries, &spireentry.ListEntriesRequest{PageToken: token})
		stored = append(stored, resp.GetEntries()...)
		return resp.GetNextPageToken(), err
	})
	for _, e := range stored {
		if !slices.IsSortedFunc(e.GetSelectors(), compareSelectors) {
			slices.SortFunc(e.Selectors, compareSelectors)
		}
	}
	return stored, err
}

// carryOut does what is planned: the updates first, since one of them may make
// room for what is to be made. Each entry succeeds or fails alone.
func (t *tool) carryOut(ctx context.Context, s *serverConn, plan []planned) {
	updates := map[string][]*planned{} // by the fields that change
	var creates []*planned
	changing := 0
	for i := range plan {
		switch p := &plan[i]; p.action() {
		case "create":
			creates = append(creates, p)
		case "update":
			changing++
			updates[p.fields()] = append(updates[p.fields()], p)
		}
	}
	pr := t.progress(changing + len(creates))
	defer pr.end()
	for _, fields := range slices.Sorted(maps.Keys(updates)) {
		sendBatches(ctx, s, updates[fields], updateBatch, pr)
	}
	sendBatches(ctx, s, creates, createBatch, pr)
}

// sendBatches sends list in batches, several at a time, and notes what became
// of each. A batch that failed whole failed for each of its entries.
func sendBatches(ctx context.Context, s *serverConn, list []*planned, send func(context.Context, *serverConn, []*planned) error, pr *progress) {
	var g errgroup.Group
	g.SetLimit(applyInFlight)
	for len(list) > 0 {
		n := batchSize(list)
		batch := list[:n]
		list = list[n:]
		g.Go(func() error {
			if err := send(ctx, s, batch); err != nil {
				for _, p := range batch {
					p.err = err
				}
			}
			pr.add(n)
			return nil
		})
	}
	_ = g.Wait() // each entry has its own error
}

// batchSize returns how many entries of list go into one request.
func batchSize(list []*planned) int {
	n, size := 0, 0
	for n < min(len(list), applyBatch) {
		if size += proto.Size(list[n].want); size > applyBytes && n > 0 {
			break
		}
		n++
	}
	return n
}

// onlyID asks for entries without anything but their id.
func onlyID() *types.EntryMask { return &types.EntryMask{} }

func wanted(batch []*planned) []*types.Entry {
	entries := make([]*types.Entry, len(batch))
	for i, p := range batch {
		entries[i] = p.want
	}
	return entries
}

func createBatch(ctx context.Context, s *serverConn, batch []*planned) error {
	resp, err := ask(ctx, s, s.entries.BatchCreateEntry, &spireentry.BatchCreateEntryRequest{Entries: wanted(batch), OutputMask: onlyID()})
	if err != nil {
		return err
	}
	if len(resp.GetResults()) != len(batch) {
		return badAnswer("a result for each entry")
	}
	for i, r := range resp.GetResults() {
		p := batch[i]
		if p.err = itemError(r.GetStatus()); p.err != nil {
			continue
		}
		if p.want.Id = r.GetEntry().GetId(); p.want.Id == "" {
			p.err = badAnswer("the id of the entry that was created")
		}
	}
	return nil
}

func updateBatch(ctx context.Context, s *serverConn, batch []*planned) error {
	resp, err := ask(ctx, s, s.entries.BatchUpdateEntry, &spireentry.BatchUpdateEntryRequest{
		Entries: wanted(batch), InputMask: batch[0].mask, OutputMask: onlyID(),
	})
	if err != nil {
		return err
	}
	if len(resp.GetResults()) != len(batch) {
		return badAnswer("a result for each entry")
	}
	for i, r := range resp.GetResults() {
		batch[i].err = itemError(r.GetStatus())
	}
	return nil
}

// progress tells whoever waits how far long work is: on a terminal in one line
// that is written anew, else in a line for each tenth.
type progress struct {
	t     *tool
	total int

	mu   sync.Mutex
	done int
}

func (t *tool) progress(total int) *progress { return &progress{t: t, total: total} }

// long says whether the work takes more than one request.
func (p *progress) long() bool { return p.total > applyBatch }

func (p *progress) add(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.done
	p.done += n
	// With standard error gone nobody can be told.
	switch tenth := max(p.total/10, 1); {
	case !p.long():
	case p.t.isTTY:
		_, _ = fmt.Fprintf(p.t.stderr, "\r%d of %d entries\x1b[K", p.done, p.total)
	case p.done/tenth > before/tenth:
		_, _ = fmt.Fprintf(p.t.stderr, "%d of %d entries\n", p.done, p.total)
	}
}

// end leaves the terminal's line empty for what comes next.
func (p *progress) end() {
	if p.long() && p.t.isTTY {
		_, _ = fmt.Fprint(p.t.stderr, "\r\x1b[K")
	}
}

package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/registry"
)

// EntryService is the operators' half of SPIRE's entry API.
type EntryService struct {
	entryv1.UnimplementedEntryServer
	td      spiffeid.TrustDomain
	entries *registry.Registry
	audit   Auditor
	guards  []registry.Guard // on every entry that is written
}

// NewEntryService returns the service. The guards stand before each entry that
// is made, and before what is changed or deleted as it was and as it would be.
func NewEntryService(td spiffeid.TrustDomain, entries *registry.Registry, log Auditor, guards ...registry.Guard) *EntryService {
	return &EntryService{td: td, entries: entries, audit: log, guards: guards}
}

// CountEntries implements entryv1.EntryServer.
func (s *EntryService) CountEntries(_ context.Context, req *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	filter, err := entryFilterFromProto(s.td, filterOf(req.GetFilter()))
	if err != nil {
		return nil, err
	}
	if filter.none {
		return &entryv1.CountEntriesResponse{}, nil
	}
	return &entryv1.CountEntriesResponse{Count: int32(s.entries.CountEntries(filter.EntryFilter))}, nil
}

// ListEntries implements entryv1.EntryServer. Pages are in the order of the
// entries' ids, bounded in number and in bytes.
func (s *EntryService) ListEntries(ctx context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	filter, err := entryFilterFromProto(s.td, req.GetFilter())
	if err != nil {
		return nil, err
	}
	after, err := pageStart(req.GetPageToken())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(req.GetPageSize())
	if err != nil {
		return nil, err
	}
	if filter.none {
		return &entryv1.ListEntriesResponse{}, nil
	}
	tellRevision(ctx, s.entries) // before the reading: what is read has it
	found, next := s.entries.ListEntries(filter.EntryFilter, after, size)
	list := make([]*types.Entry, len(found))
	for i := range found {
		list[i] = maskEntry(entryToProto(&found[i]), req.GetOutputMask())
	}
	if n := fill(list); n < len(list) {
		list, next = list[:n], list[n-1].GetId()
	}
	resp := &entryv1.ListEntriesResponse{Entries: list}
	if next != "" {
		resp.NextPageToken = pageToken(next)
	}
	return resp, nil
}

// GetEntry implements entryv1.EntryServer.
func (s *EntryService) GetEntry(_ context.Context, req *entryv1.GetEntryRequest) (*types.Entry, error) {
	if req.GetId() == "" {
		return nil, fault.New(fault.Invalid, "entry_id_missing", "name the entry by its id")
	}
	e, ok := s.entries.Entry(req.GetId())
	if !ok {
		return nil, fault.New(fault.NotFound, "entry_unknown", "no entry has this id")
	}
	return maskEntry(entryToProto(&e), req.GetOutputMask()), nil
}

// BatchCreateEntry implements entryv1.EntryServer.
func (s *EntryService) BatchCreateEntry(ctx context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	if err := checkBatch(len(req.GetEntries())); err != nil {
		return nil, err
	}
	results := make([]registry.EntryResult, len(req.GetEntries()))
	var good []registry.Entry
	var of []int
	for i, p := range req.GetEntries() {
		e, err := entryFromProto(s.td, p)
		if err != nil {
			results[i].Err = err
			continue
		}
		good, of = append(good, e), append(of, i)
	}
	for i, r := range s.entries.CreateEntries(ctx, good, s.guards...) {
		results[of[i]] = r
	}
	resp := &entryv1.BatchCreateEntryResponse{Results: make([]*entryv1.BatchCreateEntryResponse_Result, len(results))}
	log := s.batch(ctx, "entry.create", len(results))
	for i, r := range results {
		log.add(entryTarget(&r.Entry), selectorsHash(&r.Entry), r.Err)
		item := &entryv1.BatchCreateEntryResponse_Result{Status: itemStatus(r.Err)}
		if r.Entry.ID != "" && (r.Err == nil || fault.KindOf(r.Err) == fault.Exists) {
			item.Entry = maskEntry(entryToProto(&r.Entry), req.GetOutputMask())
		}
		resp.Results[i] = item
	}
	if err := log.write(ctx); err != nil {
		return nil, err
	}
	tellRevision(ctx, s.entries)
	return resp, nil
}

// BatchUpdateEntry implements entryv1.EntryServer. Without an input mask all
// fields are replaced.
func (s *EntryService) BatchUpdateEntry(ctx context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	if err := checkBatch(len(req.GetEntries())); err != nil {
		return nil, err
	}
	mask := req.GetInputMask()
	if mask == nil {
		mask = everyField
	}
	resp := &entryv1.BatchUpdateEntryResponse{Results: make([]*entryv1.BatchUpdateEntryResponse_Result, len(req.GetEntries()))}
	log := s.batch(ctx, "entry.update", len(resp.Results))
	for i, r := range s.updateAll(ctx, req.GetEntries(), mask) {
		target := entryTarget(&r.Entry)
		if r.Err != nil {
			target = namedEntry(req.GetEntries()[i].GetId())
		}
		log.add(target, selectorsHash(&r.Entry), r.Err)
		item := &entryv1.BatchUpdateEntryResponse_Result{Status: itemStatus(r.Err)}
		if r.Err == nil {
			item.Entry = maskEntry(entryToProto(&r.Entry), req.GetOutputMask())
		}
		resp.Results[i] = item
	}
	if err := log.write(ctx); err != nil {
		return nil, err
	}
	tellRevision(ctx, s.entries)
	return resp, nil
}

// updatesInFlight is how many updates of a batch wait for the store at a time: it
// writes them together.
const updatesInFlight = 64

// updateAll makes updates as if one after the other, many at a time. One that
// another entry is in the way of is tried again when the others are done: the
// same batch may have moved that entry.
func (s *EntryService) updateAll(ctx context.Context, list []*types.Entry, mask *types.EntryMask) []registry.EntryResult {
	results := make([]registry.EntryResult, len(list))
	update := func(i int) { results[i].Entry, results[i].Err = s.update(ctx, list[i], mask) }
	if namedTwice(list) { // then the order counts
		for i := range list {
			update(i)
		}
		return results
	}
	var g errgroup.Group
	g.SetLimit(updatesInFlight)
	for i := range list {
		g.Go(func() error { update(i); return nil })
	}
	_ = g.Wait() // each update has its own error
	for i := range list {
		if errors.Is(results[i].Err, fault.Exists) {
			update(i)
		}
	}
	return results
}

func namedTwice(list []*types.Entry) bool {
	seen := make(map[string]bool, len(list))
	for _, e := range list {
		if seen[e.GetId()] {
			return true
		}
		seen[e.GetId()] = true
	}
	return false
}

func (s *EntryService) update(ctx context.Context, p *types.Entry, mask *types.EntryMask) (registry.Entry, error) {
	if p.GetId() == "" {
		return registry.Entry{}, fault.New(fault.Invalid, "entry_id_missing", "name the entry by its id")
	}
	change, err := entryChange(s.td, p, mask)
	if err != nil {
		return registry.Entry{}, err
	}
	return s.entries.UpdateEntry(ctx, p.GetId(), change, s.guards...)
}

// BatchDeleteEntry implements entryv1.EntryServer.
func (s *EntryService) BatchDeleteEntry(ctx context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	if err := checkBatch(len(req.GetIds())); err != nil {
		return nil, err
	}
	targets, hashes := make([]audit.Target, len(req.GetIds())), make([]string, len(req.GetIds()))
	for i, id := range req.GetIds() {
		targets[i] = namedEntry(id)
		if e, ok := s.entries.Entry(id); ok {
			targets[i], hashes[i] = entryTarget(&e), selectorsHash(&e)
		}
	}
	resp := &entryv1.BatchDeleteEntryResponse{Results: make([]*entryv1.BatchDeleteEntryResponse_Result, len(req.GetIds()))}
	log := s.batch(ctx, "entry.delete", len(resp.Results))
	for i, err := range s.entries.DeleteEntries(ctx, req.GetIds(), s.guards...) {
		log.add(targets[i], hashes[i], err)
		resp.Results[i] = &entryv1.BatchDeleteEntryResponse_Result{Status: itemStatus(err), Id: req.GetIds()[i]}
	}
	if err := log.write(ctx); err != nil {
		return nil, err
	}
	tellRevision(ctx, s.entries)
	return resp, nil
}

// maxBatch is how many entries an operator can make, change or delete in one
// call: what fits into a message both ways, and does not keep others waiting.
const maxBatch = 500

func checkBatch(n int) error {
	if n > maxBatch {
		return fault.Newf(fault.Exhausted, "limit_batch", "a call may have %d entries: make smaller batches", maxBatch)
	}
	return nil
}

func entryTarget(e *registry.Entry) audit.Target {
	if e.ID == "" {
		return audit.Target{}
	}
	return audit.Target{SPIFFEID: e.SPIFFEID.String(), ParentID: e.ParentID.String(), EntryID: e.ID, EntryRevision: e.Revision}
}

// selectorsHash stands for an entry's selectors in the audit log: who got an
// identity can be compared there, and not read.
func selectorsHash(e *registry.Entry) string {
	if len(e.Selectors) == 0 {
		return ""
	}
	sum := sha256.Sum256([]byte(e.Selectors.Key()))
	return hex.EncodeToString(sum[:])
}

// namedEntry is for an entry that only the request names: too long a name is
// left out rather than cut.
func namedEntry(id string) audit.Target {
	if len(id) > registry.MaxEntryID {
		return audit.Target{}
	}
	return audit.Target{EntryID: id}
}

// batchLog gathers the audit lines of a batch of writes.
type batchLog struct {
	audit  Auditor
	origin audit.Origin
	action string
	lines  []audit.Line
}

func (s *EntryService) batch(ctx context.Context, action string, n int) *batchLog {
	return &batchLog{audit: s.audit, origin: origin(ctx), action: action, lines: make([]audit.Line, 0, n)}
}

func (b *batchLog) add(target audit.Target, selectors string, err error) {
	b.lines = append(b.lines, audit.Line{
		Origin: b.origin, Action: b.action, Target: target, Why: audit.Why{Rule: "operator", SelectorsHash: selectors}, Result: result(err),
	})
}

func (b *batchLog) write(ctx context.Context) error { return record(ctx, b.audit, b.lines...) }

package server

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func selectorsOf(values ...string) []*types.Selector {
	var out []*types.Selector
	for _, v := range values {
		out = append(out, &types.Selector{Type: "a", Value: v})
	}
	return out
}

// subsets are those of {1, 2, 3} that have something in them.
var subsets = [][]string{{"1"}, {"2"}, {"3"}, {"1", "2"}, {"1", "3"}, {"2", "3"}, {"1", "2", "3"}}

var pageSizes = []int32{0, 1, 2, 3, 5, 27, 28, 29, 5000, 5001, math.MaxInt32}

// satisfies is selector.proto: exact is the same set, subset a non-empty part
// of the filter's, superset at least the filter's, any one in common.
func satisfies(have []*types.Selector, m *types.SelectorMatch) bool {
	if m == nil {
		return true
	}
	in := func(list []*types.Selector) func(*types.Selector) bool {
		return func(s *types.Selector) bool {
			return slices.ContainsFunc(list, func(o *types.Selector) bool { return proto.Equal(o, s) })
		}
	}
	every := func(list []*types.Selector, is func(*types.Selector) bool) bool {
		return !slices.ContainsFunc(list, func(s *types.Selector) bool { return !is(s) })
	}
	inFilter, filterIn := every(have, in(m.GetSelectors())), every(m.GetSelectors(), in(have))
	switch m.GetMatch() {
	case types.SelectorMatch_MATCH_EXACT:
		return inFilter && filterIn
	case types.SelectorMatch_MATCH_SUBSET:
		return len(have) > 0 && inFilter
	case types.SelectorMatch_MATCH_SUPERSET:
		return filterIn
	}
	return slices.ContainsFunc(have, in(m.GetSelectors()))
}

func selectorMatches() []*types.SelectorMatch {
	out := []*types.SelectorMatch{nil, {Selectors: selectorsOf("1", "2", "3", "4")}, {Selectors: selectorsOf("4"), Match: types.SelectorMatch_MATCH_ANY}}
	for mode := range types.SelectorMatch_MatchBehavior_name {
		for _, values := range subsets {
			turned := slices.Clone(values)
			slices.Reverse(turned)
			out = append(out, &types.SelectorMatch{Selectors: selectorsOf(append(turned, turned[0])...), Match: types.SelectorMatch_MatchBehavior(mode)})
		}
	}
	return out
}

// Every combination of the filters of ListEntries and CountEntries, over pages
// of all sizes.
func TestSDKEntryFiltersInEveryPageSize(t *testing.T) {
	h := start(t)
	o := h.operator()
	var all []*types.Entry
	for _, path := range []string{"/w/1", "/w/2"} {
		for _, parent := range []string{"/n/1", "/n/2"} {
			for i, values := range subsets {
				e := entry(spiffeid.RequireFromString("spiffe://"+domain+parent), path)
				if e.Selectors = selectorsOf(values...); i%3 == 0 {
					e.Hint = "blue"
				}
				all = append(all, e)
			}
		}
	}
	ids := o.create(t, all...)
	parents := []*types.SPIFFEID{nil, {TrustDomain: domain, Path: "/n/1"}, {TrustDomain: domain, Path: "/n/3"}}
	paths := []*types.SPIFFEID{nil, {TrustDomain: domain, Path: "/w/2"}}
	hints := []*wrapperspb.StringValue{nil, wrapperspb.String("blue"), wrapperspb.String("")}
	turn := 0
	check := func(f *entryv1.ListEntriesRequest_Filter, none bool) {
		t.Helper()
		want := []string{}
		for i, e := range all {
			if !none && (f.BySpiffeId == nil || proto.Equal(f.BySpiffeId, e.GetSpiffeId())) && (f.ByParentId == nil || proto.Equal(f.ByParentId, e.GetParentId())) &&
				(f.ByHint == nil || f.ByHint.GetValue() == e.GetHint()) && satisfies(e.GetSelectors(), f.BySelectors) {
				want = append(want, ids[i])
			}
		}
		slices.Sort(want)
		size := pageSizes[turn%len(pageSizes)]
		turn++
		what := fmt.Sprintf("pages of %d by %v", size, f)
		got := pagesOf(t, what, size, func(token string) (keys []string, next string) {
			resp, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: f, PageSize: size, PageToken: token, OutputMask: &types.EntryMask{}})
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			for _, e := range resp.GetEntries() {
				keys = append(keys, e.GetId())
			}
			return keys, resp.GetNextPageToken()
		})
		if !slices.Equal(got, want) {
			t.Errorf("%s: %d entries, want %d", what, len(got), len(want))
		}
		count, err := o.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
			BySpiffeId: f.BySpiffeId, ByParentId: f.ByParentId, BySelectors: f.BySelectors, ByFederatesWith: f.ByFederatesWith, ByHint: f.ByHint, ByDownstream: f.ByDownstream,
		}})
		if err != nil || int(count.GetCount()) != len(want) {
			t.Errorf("count by %v: %d, %v; want %d", f, count.GetCount(), err, len(want))
		}
	}
	for _, selectors := range selectorMatches() {
		for _, parent := range parents {
			for _, path := range paths {
				for _, hint := range hints {
					check(&entryv1.ListEntriesRequest_Filter{BySpiffeId: path, ByParentId: parent, BySelectors: selectors, ByHint: hint}, false)
				}
			}
		}
	}
	// No entry federates or is downstream yet: every match on the former
	// needs one trust domain in common at least.
	for mode := range types.FederatesWithMatch_MatchBehavior_name {
		for _, tds := range [][]string{{"a.org"}, {"spiffe://a.org", "b.org"}} {
			check(&entryv1.ListEntriesRequest_Filter{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: tds, Match: types.FederatesWithMatch_MatchBehavior(mode)}}, true)
		}
	}
	check(&entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(true)}, true)
	check(&entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(false), ByHint: hints[1]}, false)
}

func TestSDKEntryFiltersThatMeanNothing(t *testing.T) {
	o := start(t).operator()
	for name, f := range map[string]*entryv1.ListEntriesRequest_Filter{
		"no selectors":           {BySelectors: &types.SelectorMatch{Match: types.SelectorMatch_MATCH_ANY}},
		"unknown selector match": {BySelectors: &types.SelectorMatch{Selectors: selectorsOf("1"), Match: 4}},
		"malformed selector":     {BySelectors: &types.SelectorMatch{Selectors: []*types.Selector{{Type: "a"}}}},
		"no trust domains":       {ByFederatesWith: &types.FederatesWithMatch{}},
		"malformed trust domain": {ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{"Not A Domain"}}},
		"trust domain with path": {ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{"spiffe://a.org/b"}}},
		"unknown match of them":  {ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{"a.org"}, Match: 4}},
	} {
		_, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: f})
		if fault.KindOf(fault.FromStatus(err)) != fault.Invalid {
			t.Errorf("list by %s: %v", name, err)
		}
		_, err = o.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
			BySelectors: f.GetBySelectors(), ByFederatesWith: f.GetByFederatesWith(),
		}})
		if fault.KindOf(fault.FromStatus(err)) != fault.Invalid {
			t.Errorf("count by %s: %v", name, err)
		}
	}
}

// Entries that come and go while somebody turns pages don't make others appear
// twice or not at all.
func TestSDKEntryPagesAreStable(t *testing.T) {
	h := start(t)
	o := h.operator()
	var list []*types.Entry
	for i := range 40 {
		e := entry(node, fmt.Sprintf("/w/%d", i))
		e.Id = fmt.Sprintf("e%02d", i)
		list = append(list, e)
	}
	o.create(t, list...)
	page := 0
	got := pagesOf(t, "pages under changes", 7, func(token string) (keys []string, next string) {
		resp, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 7, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range resp.GetEntries() {
			keys = append(keys, e.GetId())
		}
		// The last one seen goes: the next page begins after it all the same.
		if _, err := o.entries.BatchDeleteEntry(t.Context(), deleteOf(keys[len(keys)-1])); err != nil {
			t.Fatal(err)
		}
		before := entry(node, fmt.Sprintf("/new/%d", page))
		before.Id = fmt.Sprintf("a%02d", page) // sorts before all that were seen
		o.create(t, before)
		page++
		return keys, resp.GetNextPageToken()
	})
	if len(got) != 40 {
		t.Errorf("%d of 40 entries were seen: %v", len(got), got)
	}
}

func fullEntry(path string) *types.Entry {
	e := entry(node, path, "uid:1", "gid:2")
	e.Hint, e.X509SvidTtl, e.DnsNames, e.ExpiresAt, e.StoreSvid = "hint", 300, []string{"a.example.org"}, time.Now().Unix()+1000, true
	return e
}

func TestSDKEntryOutputMasks(t *testing.T) {
	h := start(t)
	o := h.operator()
	id := o.create(t, fullEntry("/masked"))[0]
	changed, err := o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{Id: id, Hint: "new"}}, InputMask: &types.EntryMask{Hint: true}})
	if err != nil {
		t.Fatal(err)
	}
	full := changed.GetResults()[0].GetEntry() // without a mask, all of it
	if full.GetRevisionNumber() != 1 || full.GetCreatedAt() == 0 || full.GetExpiresAt() == 0 || len(full.GetDnsNames()) != 1 || !full.GetStoreSvid() {
		t.Fatalf("the entry is %v", full)
	}
	checkMasks(t, "GetEntry", full, &types.EntryMask{}, func(mask proto.Message) proto.Message {
		got, err := o.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: id, OutputMask: mask.(*types.EntryMask)})
		if err != nil {
			t.Fatal(err)
		}
		return got
	})
	checkMasks(t, "ListEntries", full, &types.EntryMask{}, func(mask proto.Message) proto.Message {
		got, err := o.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{OutputMask: mask.(*types.EntryMask)})
		if err != nil {
			t.Fatal(err)
		}
		return got.GetEntries()[0]
	})
	checkMasks(t, "BatchCreateEntry", full, &types.EntryMask{}, func(mask proto.Message) proto.Message {
		got, err := o.entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{fullEntry("/masked")}, OutputMask: mask.(*types.EntryMask)})
		if err != nil || got.GetResults()[0].GetStatus().GetCode() != int32(codes.AlreadyExists) {
			t.Fatalf("%v, %v", got, err)
		}
		return got.GetResults()[0].GetEntry()
	})
	checkMasks(t, "BatchUpdateEntry", full, &types.EntryMask{}, func(mask proto.Message) proto.Message {
		got, err := o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
			Entries: []*types.Entry{{Id: id}}, InputMask: &types.EntryMask{}, OutputMask: mask.(*types.EntryMask),
		})
		if err != nil {
			t.Fatal(err)
		}
		e := got.GetResults()[0].GetEntry()
		if e.GetRevisionNumber() > 0 { // each of these updates adds to it
			e.RevisionNumber = full.GetRevisionNumber()
		}
		return e
	})
}

// An update changes what its input mask names and nothing else, and adds one
// to the revision. What a mask can't change, and what is not honoured yet,
// stays as it is; admin and downstream count only where the mask names them.
func TestSDKEntryInputMasks(t *testing.T) {
	h := start(t)
	o := h.operator()
	id := o.create(t, fullEntry("/w"))[0]
	change := entry(spiffeid.RequireFromString("spiffe://"+domain+"/other/node"), "/w2", "uid:3")
	change.Id, change.Hint, change.X509SvidTtl, change.DnsNames, change.ExpiresAt = id, "other", 600, []string{"b.example.org"}, time.Now().Unix()+5000
	change.FederatesWith, change.Admin, change.Downstream, change.JwtSvidTtl = []string{"a.org"}, true, true, 60
	change.RevisionNumber, change.CreatedAt, change.AdditionalAttributes = 99, 99, &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true}
	ignored := []protoreflect.Name{"federates_with", "jwt_svid_ttl", "additional_attributes", "revision_number", "created_at"}
	refused := []protoreflect.Name{"admin", "downstream"}
	get := func() *types.Entry {
		t.Helper()
		e, err := o.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: id})
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	fields := (&types.EntryMask{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		name := fields.Get(i).Name()
		mask := &types.EntryMask{}
		mask.ProtoReflect().Set(fields.Get(i), protoreflect.ValueOfBool(true))
		want := get()
		resp, err := o.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{change}, InputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		result := resp.GetResults()[0]
		if slices.Contains(refused, name) {
			if result.GetStatus().GetCode() != int32(codes.InvalidArgument) || result.GetEntry() != nil {
				t.Errorf("%s: %v", name, result)
			}
		} else {
			if !slices.Contains(ignored, name) {
				of := want.ProtoReflect().Descriptor().Fields().ByName(name)
				if change.ProtoReflect().Has(of) {
					want.ProtoReflect().Set(of, change.ProtoReflect().Get(of))
				} else {
					want.ProtoReflect().Clear(of)
				}
			}
			want.RevisionNumber++
			if result.GetStatus().GetCode() != 0 || !proto.Equal(result.GetEntry(), want) {
				t.Errorf("%s:\ngot  %v\nwant %v", name, result, want)
			}
		}
		if now := get(); !proto.Equal(now, want) {
			t.Errorf("after %s:\nthere is %v\nwant     %v", name, now, want)
		}
	}
}

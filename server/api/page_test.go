package api

import (
	"math"
	"strings"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func TestPageTokensComeBackAndForeignOnesAreRefused(t *testing.T) {
	for _, after := range []string{"a", "entry-1", strings.Repeat("x", 255), "spiffe://td/assay/agent/a"} {
		got, err := pageStart(pageToken(after))
		if err != nil || got != after {
			t.Errorf("%q came back as %q, %v", after, got, err)
		}
	}
	if got, err := pageStart(""); got != "" || err != nil {
		t.Errorf("first page: %q, %v", got, err)
	}
	for _, token := range []string{"entry-1", "!!", "cDE6", pageToken("a") + "=", "\x00"} {
		if _, err := pageStart(token); fault.ReasonOf(err) != "page_token_invalid" {
			t.Errorf("token %q: %v", token, err)
		}
	}
}

func FuzzPageStart(f *testing.F) {
	f.Add(pageToken("a"))
	f.Add("cDE6YQ")
	f.Fuzz(func(t *testing.T, token string) {
		after, err := pageStart(token)
		if err == nil && token != "" && pageToken(after) == "" {
			t.Fatal("accepted a token that stands for nothing")
		}
	})
}

// NEG-28: nothing is allocated by what a request asks for.
func TestPageSizeIsClamped(t *testing.T) {
	for asked, want := range map[int32]int{0: maxPage, 1: 1, maxPage: maxPage, maxPage + 1: maxPage, math.MaxInt32: maxPage} {
		if got, err := pageSize(asked); got != want || err != nil {
			t.Errorf("pageSize(%d) = %d, %v", asked, got, err)
		}
	}
	if _, err := pageSize(-1); fault.ReasonOf(err) != "page_size_invalid" {
		t.Errorf("negative: %v", err)
	}
}

func TestFillStopsBeforeTheReceiveLimitOfClients(t *testing.T) {
	big := &types.Entry{Hint: strings.Repeat("x", 1<<20)}
	if n := fill([]*types.Entry{big, big, big, big, big}); n != 2 {
		t.Errorf("took %d entries of 1 MiB into 3 MiB", n)
	}
	huge := &types.Entry{Hint: strings.Repeat("x", 5<<20)}
	if n := fill([]*types.Entry{huge, huge}); n != 1 {
		t.Errorf("an item that is too big has to go alone, took %d", n)
	}
	if n := fill([]*types.Entry{}); n != 0 {
		t.Errorf("took %d of none", n)
	}
}

func TestMaskKeepsIDAndWhatItNames(t *testing.T) {
	full := func() *types.Entry {
		return &types.Entry{
			Id: "e", SpiffeId: &types.SPIFFEID{Path: "/a"}, ParentId: &types.SPIFFEID{Path: "/b"}, Hint: "h",
			Selectors: []*types.Selector{{Type: "unix"}}, DnsNames: []string{"a"}, X509SvidTtl: 5, RevisionNumber: 3, CreatedAt: 9,
		}
	}
	if e := maskEntry(full(), nil); e.Hint != "h" || e.SpiffeId == nil || e.RevisionNumber != 3 {
		t.Errorf("no mask is all fields, got %v", e)
	}
	e := maskEntry(full(), &types.EntryMask{SpiffeId: true, RevisionNumber: true})
	if e.Id != "e" || e.SpiffeId == nil || e.RevisionNumber != 3 {
		t.Errorf("lost what the mask names: %v", e)
	}
	if e.ParentId != nil || e.Hint != "" || e.Selectors != nil || e.DnsNames != nil || e.X509SvidTtl != 0 || e.CreatedAt != 0 {
		t.Errorf("kept what the mask does not name: %v", e)
	}
	if e := maskEntry(full(), &types.EntryMask{}); e.Id != "e" || e.SpiffeId != nil {
		t.Errorf("an empty mask is the id alone, got %v", e)
	}
	b := maskBundle(&types.Bundle{TrustDomain: "td", SequenceNumber: 4, RefreshHint: 1}, &types.BundleMask{SequenceNumber: true})
	if b.TrustDomain != "td" || b.SequenceNumber != 4 || b.RefreshHint != 0 {
		t.Errorf("bundle: %v", b)
	}
}

func sizeOf(m proto.Message) int { return proto.Size(m) }

package registry

import (
	"bytes"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/store"
)

func testRules() rules {
	return rules{trustDomain: spiffeid.RequireTrustDomainFromString("example.org"), reservedPrefix: "/assay/", maxTTL: time.Hour}
}

// Whatever is in a record: it is read as an entry or agent that keeps all the
// rules and encodes to what reads the same, or refused for a stated reason.
func FuzzDecodeRecord(f *testing.F) {
	e := Entry{
		SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/a"), ParentID: spiffeid.RequireFromString("spiffe://example.org/assay/agent/x"),
		Selectors: selector.NewSet(selector.Selector{Type: "unix", Value: "uid:1"}), X509SVIDTTL: time.Minute,
		DNSNames: []string{"a.example"}, Hint: "h", ExpiresAt: time.UnixMilli(1 << 42), CreatedAt: time.UnixMilli(1 << 41), Revision: 3,
	}
	entry, err := encodeEntry(&e)
	if err != nil {
		f.Fatal(err)
	}
	a := Agent{ID: spiffeid.RequireFromString("spiffe://example.org/assay/agent/x"), Attestor: JoinToken, ActiveSerial: "01", ActiveKey: "02", NotAfter: time.UnixMilli(1 << 41)}
	agent, err := encodeAgent(&a)
	if err != nil {
		f.Fatal(err)
	}
	token, err := store.Encode(schema, tokenRecord{ExpiresAt: 1 << 41, RedeemedAt: 1, RedeemedBy: "02"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add("e1", entry)
	f.Add("assay/agent/x", agent)
	f.Add("t", token)
	f.Add("e1", []byte("\x02{}"))
	f.Add("e1", []byte{})
	f.Add("e1", bytes.Replace(entry, []byte("example.org/a"), []byte("example.org/assay/server"), 1))
	f.Add("e1", bytes.Replace(entry, []byte("unix:uid:1"), []byte("unix"), 1))
	r := testRules()
	refused := func(t *testing.T, err error) {
		if reason := fault.ReasonOf(err); reason != "store_corrupt" && reason != "store_newer" {
			t.Fatalf("refused with %v", err)
		}
	}
	f.Fuzz(func(t *testing.T, key string, data []byte) {
		rec := store.Record{Key: entryKey(key), Value: data, Revision: 1}
		if e, err := r.decodeEntry(rec); err != nil {
			refused(t, err)
		} else {
			if err := r.check(&e); err != nil || e.ID != key {
				t.Fatalf("%+v was read and breaks a rule: %v", e, err)
			}
			again, err := encodeEntry(&e)
			if err != nil {
				if fault.ReasonOf(err) == "entry_too_large" {
					return
				}
				t.Fatal(err)
			}
			same, err := r.decodeEntry(store.Record{Key: rec.Key, Value: again})
			if err != nil || similarityOf(&same) != similarityOf(&e) || !same.ExpiresAt.Equal(e.ExpiresAt) || same.X509SVIDTTL != e.X509SVIDTTL {
				t.Fatalf("%+v became %+v: %v", e, same, err)
			}
		}
		if a, err := r.decodeAgent(store.Record{Key: agentPrefix + key, Value: data}); err != nil {
			refused(t, err)
		} else if agentKey(a.ID) != agentPrefix+key {
			t.Fatalf("the record %q was read as agent %v", key, a.ID)
		}
		if _, err := decodeToken(store.Record{Value: data}); err != nil {
			refused(t, err)
		}
	})
}

// Reading a record of a newer program as if it were ours could widen a right.
func TestRecordsOfANewerProgramAreRefused(t *testing.T) {
	r := testRules()
	_, err := r.decodeEntry(store.Record{Key: "entry/a", Value: []byte("\x02{}")})
	if fault.ReasonOf(err) != "store_newer" {
		t.Errorf("got %v", err)
	}
}

func TestSimilarityTellsFieldsApart(t *testing.T) {
	base := Entry{
		SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/a"), ParentID: spiffeid.RequireFromString("spiffe://example.org/b"),
		Selectors: selector.NewSet(selector.Selector{Type: "t", Value: "v"}),
	}
	swapped := base
	swapped.SPIFFEID, swapped.ParentID = base.ParentID, base.SPIFFEID
	more := base
	more.Selectors = selector.NewSet(selector.Selector{Type: "t", Value: "v"}, selector.Selector{Type: "t", Value: "w"})
	hint := base
	hint.Hint, hint.ID = "other", "other"
	if s := similarityOf(&base); s == similarityOf(&swapped) || s == similarityOf(&more) || s != similarityOf(&hint) {
		t.Error("similarity is not SPIFFE ID, parent and selectors")
	}
}

package registry_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/registry"
)

func TestEntriesThatBreakARuleAreRefusedAndChangeNothing(t *testing.T) {
	s := start(t, t.TempDir())
	create(t, s.Registry, web("/present", node(1)))
	long := func(n int) string { return strings.Repeat("x", n) }
	cases := map[string]struct {
		change func(*registry.Entry)
		reason string
	}{
		"no SPIFFE ID":         {func(e *registry.Entry) { e.SPIFFEID = spiffeid.ID{} }, "spiffe_id_invalid"},
		"no parent":            {func(e *registry.Entry) { e.ParentID = spiffeid.ID{} }, "spiffe_id_invalid"},
		"root path":            {func(e *registry.Entry) { e.SPIFFEID = td.ID() }, "spiffe_id_invalid"},                                            // X509-4
		"foreign trust domain": {func(e *registry.Entry) { e.SPIFFEID = spiffeid.RequireFromString("spiffe://other.org/a") }, "spiffe_id_invalid"}, // ID-25
		"foreign parent":       {func(e *registry.Entry) { e.ParentID = spiffeid.RequireFromString("spiffe://other.org/a") }, "spiffe_id_invalid"},
		"agent ID":             {func(e *registry.Entry) { e.SPIFFEID = node(7) }, "spiffe_id_invalid"},
		"server ID":            {func(e *registry.Entry) { e.SPIFFEID = id("/assay/server") }, "spiffe_id_invalid"},
		"ID of 2049 bytes": {func(e *registry.Entry) { // ID-11: go-spiffe makes such an ID
			e.SPIFFEID = id("/" + long(2049-len("spiffe://example.org/")))
		}, "spiffe_id_invalid"},
		"no selector":         {func(e *registry.Entry) { e.Selectors = nil }, "selector_missing"},
		"selector no value":   {func(e *registry.Entry) { e.Selectors = selector.Set{{Type: "unix"}} }, "selector_invalid"},
		"selector not UTF-8":  {func(e *registry.Entry) { e.Selectors = selector.Set{{Type: "unix", Value: "\xff"}} }, "selector_invalid"},
		"path alone":          {func(e *registry.Entry) { e.Selectors = selectors("unix:path:/bin/sh", "unix:gid:5") }, "selector_too_weak"}, // NEG-37
		"sha256 alone":        {func(e *registry.Entry) { e.Selectors = selectors("unix:sha256:00", "k8s:uid:5") }, "selector_too_weak"},
		"negative TTL":        {func(e *registry.Entry) { e.X509SVIDTTL = -time.Second }, "ttl_out_of_range"},
		"TTL over the cap":    {func(e *registry.Entry) { e.X509SVIDTTL = time.Hour + time.Second }, "ttl_out_of_range"},
		"hint too long":       {func(e *registry.Entry) { e.Hint = long(1025) }, "hint_invalid"}, // WL-34
		"hint not UTF-8":      {func(e *registry.Entry) { e.Hint = "\xff" }, "hint_invalid"},
		"ended already":       {func(e *registry.Entry) { e.ExpiresAt = time.Now().Add(-time.Minute) }, "expires_at_past"},
		"ended before 1970":   {func(e *registry.Entry) { e.ExpiresAt = time.Unix(-5, 0) }, "expires_at_invalid"},
		"id with slash":       {func(e *registry.Entry) { e.ID = "a/b" }, "entry_id_invalid"},
		"id too long":         {func(e *registry.Entry) { e.ID = long(256) }, "entry_id_invalid"},
		"id not ASCII":        {func(e *registry.Entry) { e.ID = "é" }, "entry_id_invalid"},
		"DNS name empty":      {func(e *registry.Entry) { e.DNSNames = []string{""} }, "dns_name_invalid"},
		"DNS name with dot":   {func(e *registry.Entry) { e.DNSNames = []string{"a.example."} }, "dns_name_invalid"},
		"DNS name with space": {func(e *registry.Entry) { e.DNSNames = []string{"a b"} }, "dns_name_invalid"},
		"DNS name with slash": {func(e *registry.Entry) { e.DNSNames = []string{"a/b"} }, "dns_name_invalid"},
		"DNS name dash first": {func(e *registry.Entry) { e.DNSNames = []string{"-a.example"} }, "dns_name_invalid"},
		"DNS name empty part": {func(e *registry.Entry) { e.DNSNames = []string{"a..example"} }, "dns_name_invalid"},
		"DNS name long part":  {func(e *registry.Entry) { e.DNSNames = []string{long(64) + ".example"} }, "dns_name_invalid"},
		"DNS name too long":   {func(e *registry.Entry) { e.DNSNames = []string{strings.Repeat("abc.", 63) + "ab"} }, "dns_name_invalid"},
		"DNS name IP address": {func(e *registry.Entry) { e.DNSNames = []string{"10.0.0.1"} }, "dns_name_invalid"},
		"DNS name wildcard":   {func(e *registry.Entry) { e.DNSNames = []string{"a.*.example"} }, "dns_name_invalid"},
		"DNS name only star":  {func(e *registry.Entry) { e.DNSNames = []string{"*"} }, "dns_name_invalid"},
		"DNS name twice":      {func(e *registry.Entry) { e.DNSNames = []string{"a.example", "A.example"} }, "dns_name_invalid"},
		"DNS names too many":  {func(e *registry.Entry) { e.DNSNames = slices.Repeat([]string{"a.example"}, 65) }, "dns_name_invalid"},
		"too large": {func(e *registry.Entry) {
			for i := range 70 {
				e.Selectors = append(e.Selectors, selector.Selector{Type: "t", Value: string(rune(0x100+i)) + long(1000)})
			}
		}, "entry_too_large"},
	}
	before := s.Revision()
	for name, c := range cases {
		e := web("/new", node(1))
		c.change(&e)
		result := s.CreateEntries(t.Context(), []registry.Entry{e})[0]
		if fault.KindOf(result.Err) != fault.Invalid || fault.ReasonOf(result.Err) != c.reason {
			t.Errorf("%s: got %v, want %s", name, result.Err, c.reason)
		}
	}
	if n := s.CountEntries(registry.EntryFilter{}); n != 1 || s.Revision() != before { // NEG-1: nothing changed
		t.Errorf("%d entries at revision %d, were 1 at %d", n, s.Revision(), before)
	}
}

func TestEntryComesBackAsItWasMadeAlsoAfterARestart(t *testing.T) {
	s := start(t, t.TempDir())
	given := registry.Entry{
		ID: "My.entry_1-a", SPIFFEID: id("/Foo/" + strings.Repeat("a", 2048-len("spiffe://example.org/Foo/"))), // ID-10
		ParentID:    id("/spire/agent/x509pop/abc"),
		Selectors:   selector.Set{{Type: "unix", Value: "uid:1000"}, {Type: "k8s", Value: "ns:a:b"}, {Type: "unix", Value: "uid:1000"}},
		X509SVIDTTL: time.Hour, DNSNames: []string{"web.example.org", "*.web.example.org", "localhost"},
		Hint:      strings.Repeat("ä", 512), // WL-34: 1024 bytes
		ExpiresAt: time.Now().Add(time.Hour), Revision: 17,
	}
	made := create(t, s.Registry, given)[0]
	if made.ID != given.ID || made.SPIFFEID != given.SPIFFEID || made.ParentID != given.ParentID ||
		!slices.Equal(made.Selectors, selectors("k8s:ns:a:b", "unix:uid:1000")) || made.X509SVIDTTL != time.Hour ||
		!slices.Equal(made.DNSNames, given.DNSNames) || made.Hint != given.Hint ||
		made.ExpiresAt.UnixMilli() != given.ExpiresAt.UnixMilli() || made.Revision != 0 || time.Since(made.CreatedAt) > time.Minute {
		t.Fatalf("made %+v", made)
	}
	same := func(got registry.Entry, ok bool) {
		t.Helper()
		if !ok || got.ID != made.ID || got.SPIFFEID != made.SPIFFEID || got.ParentID != made.ParentID || !slices.Equal(got.Selectors, made.Selectors) ||
			got.X509SVIDTTL != made.X509SVIDTTL || !slices.Equal(got.DNSNames, made.DNSNames) || got.Hint != made.Hint ||
			!got.ExpiresAt.Equal(made.ExpiresAt) || !got.CreatedAt.Equal(made.CreatedAt) || got.Revision != 0 {
			t.Fatalf("got %+v, made %+v", got, made)
		}
	}
	same(s.Entry(made.ID))
	s = s.restart(t)
	same(s.Entry(made.ID))
}

func TestGeneratedIDsAreDifferentLowerCaseAndValid(t *testing.T) {
	s := start(t, t.TempDir())
	made := create(t, s.Registry, web("/a", node(1)), web("/b", node(1)))
	for _, e := range made {
		if len(e.ID) < 26 || strings.ToLower(e.ID) != e.ID || strings.Trim(e.ID, "abcdefghijklmnopqrstuvwxyz234567") != "" {
			t.Errorf("generated id %q", e.ID)
		}
	}
	if made[0].ID == made[1].ID {
		t.Error("one id twice")
	}
}

func TestPathsDifferByCase(t *testing.T) { // ID-17
	s := start(t, t.TempDir())
	made := create(t, s.Registry, web("/foo", node(1)), web("/Foo", node(1)), web("/Assay/x", node(1)), web("/assays", node(1)))
	got, _ := s.ListEntries(registry.EntryFilter{SPIFFEID: id("/foo")}, "", 0)
	if len(got) != 1 || got[0].ID != made[0].ID {
		t.Errorf("got %v", got)
	}
}

func TestStoreKeepsItsTrustDomainAndPrefix(t *testing.T) {
	s := start(t, t.TempDir())
	epoch := s.Epoch()
	s = s.restart(t)
	if s.Epoch() != epoch || epoch == "" {
		t.Errorf("epoch %q became %q", epoch, s.Epoch())
	}
	for name, change := range map[string]func(*registry.Options){
		"trust domain": func(o *registry.Options) { o.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org") },
		"prefix":       func(o *registry.Options) { o.ReservedPrefix = "/spire/" },
	} {
		o := options(s.kv)
		change(&o)
		if _, err := registry.Open(t.Context(), o); fault.ReasonOf(err) != "config_store_mismatch" {
			t.Errorf("another %s: %v", name, err)
		}
	}
}

func TestOpenRefusesOptionsThatCannotBeHonoured(t *testing.T) {
	s := start(t, t.TempDir())
	for name, change := range map[string]func(*registry.Options){
		"no trust domain":        func(o *registry.Options) { o.TrustDomain = spiffeid.TrustDomain{} },
		"prefix without slash":   func(o *registry.Options) { o.ReservedPrefix = "/assay" },
		"empty prefix":           func(o *registry.Options) { o.ReservedPrefix = "//" },
		"no cap":                 func(o *registry.Options) { o.MaxX509SVIDTTL = 0 },
		"negative rejoin window": func(o *registry.Options) { o.RejoinWindow = -1 },
	} {
		o := options(s.kv)
		change(&o)
		if _, err := registry.Open(t.Context(), o); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLoweredCapCutsStoredLifetimes(t *testing.T) {
	s := start(t, t.TempDir())
	e := web("/a", node(1))
	e.X509SVIDTTL = time.Hour
	made := create(t, s.Registry, e)[0]
	s = s.restart(t, func(o *registry.Options) { o.MaxX509SVIDTTL = time.Minute })
	if got, err := s.EntryFor(node(1), made.ID); err != nil || got.X509SVIDTTL != time.Minute {
		t.Errorf("%v, %v", got.X509SVIDTTL, err)
	}
}

// What is made later sorts later, so that the store writes it side by side.
func TestGeneratedIDsSortByTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, t.TempDir())
		last := ""
		for i := range 100 {
			got := create(t, s.Registry, web(fmt.Sprintf("/w/%d", i), node(1)))[0].ID
			if got <= last {
				t.Fatalf("%q after %q", got, last)
			}
			last = got
			time.Sleep(time.Duration(1+i*i) * time.Millisecond)
		}
	})
}

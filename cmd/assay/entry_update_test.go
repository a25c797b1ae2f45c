package main

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
)

func TestUpdateSendsWhatIsNamedAndNothingElse(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	never := time.Date(2126, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, tc := range map[string]struct {
		flags []string
		entry *types.Entry
		mask  *types.EntryMask
	}{
		"ttl":         {[]string{"--ttl", "15m"}, &types.Entry{X509SvidTtl: 900}, &types.EntryMask{X509SvidTtl: true}},
		"default ttl": {[]string{"--ttl", "0"}, &types.Entry{}, &types.EntryMask{X509SvidTtl: true}},
		"dns":         {[]string{"--dns", "a.example", "--dns", "b.example"}, &types.Entry{DnsNames: []string{"a.example", "b.example"}}, &types.EntryMask{DnsNames: true}},
		"no dns":      {[]string{"--dns", ""}, &types.Entry{}, &types.EntryMask{DnsNames: true}},
		"no hint":     {[]string{"--hint", ""}, &types.Entry{}, &types.EntryMask{Hint: true}},
		"stays":       {[]string{"--expires-at", "never"}, &types.Entry{}, &types.EntryMask{ExpiresAt: true}},
		"ends":        {[]string{"--expires-at", never.Format(time.RFC3339)}, &types.Entry{ExpiresAt: never.Unix()}, &types.EntryMask{ExpiresAt: true}},
		"identity": {
			[]string{"--spiffe-id", "spiffe://example.org/x", "--parent-id", nodeID, "--selector", "unix:uid:7"},
			&types.Entry{SpiffeId: id("/x"), ParentId: id("/assay/agent/join_token/01"), Selectors: selectors("unix", "uid:7")},
			&types.EntryMask{SpiffeId: true, ParentId: true, Selectors: true},
		},
	} {
		got := assay(t, vars, append([]string{"entry", "update", "e-1"}, tc.flags...)...)
		tc.entry.Id = "e-1"
		if got.code != 0 || !proto.Equal(f.update.GetEntries()[0], tc.entry) || !proto.Equal(f.update.GetInputMask(), tc.mask) {
			t.Errorf("%s: exit %d, %q; sent %v", name, got.code, got.stderr, f.update)
		}
	}
	f.update = nil
	for name, flags := range map[string][]string{
		"nothing named": nil, "no ID": {"--parent-id", ""},
		"bad selector": {"--selector", "x"}, "past": {"--expires-at", "2020-01-01T00:00:00Z"}, "split second": {"--ttl", "1500ms"},
	} {
		got := assay(t, vars, append([]string{"entry", "update", "e-1"}, flags...)...)
		if got.code != 64 || !strings.HasPrefix(got.stderr, "error: usage: ") || f.update != nil {
			t.Errorf("%s: exit %d, %q; sent %v", name, got.code, got.stderr, f.update)
		}
	}
}

func TestCountFiltersAsListDoes(t *testing.T) {
	f := populated(newPKI(t))
	vars := map[string]string{serverSocketEnv: f.start(t)}
	flags := []string{"--spiffe-id", "spiffe://example.org/x", "--parent-id", nodeID, "--selector", "unix:uid:7", "--hint", ""}
	if got := assay(t, vars, append([]string{"entry", "list"}, flags...)...); got.code != 0 {
		t.Fatalf("exit %d, %q", got.code, got.stderr)
	}
	listed := f.filter
	if got := assay(t, vars, append([]string{"entry", "count"}, flags...)...); got.code != 0 || got.stdout != "3\n" || !proto.Equal(f.filter, listed) {
		t.Errorf("exit %d, %q; counted by %v, listed by %v", got.code, got.stdout, f.filter, listed)
	}
}

package main

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (see -update)\ngot:\n%s\nwant:\n%s", path, got, want)
	}
}

func at(text string) *timestamppb.Timestamp {
	moment, err := time.Parse(time.RFC3339, text)
	if err != nil {
		panic(err)
	}
	return timestamppb.New(moment)
}

func id(path string) *types.SPIFFEID { return &types.SPIFFEID{TrustDomain: "example.org", Path: path} }

func selectors(pairs ...string) []*types.Selector {
	var out []*types.Selector
	for i := 0; i < len(pairs); i += 2 {
		out = append(out, &types.Selector{Type: pairs[i], Value: pairs[i+1]})
	}
	return out
}

// populated is a server with something of everything.
func populated(p *pki) *fakeServer {
	return &fakeServer{
		status: &adminv1.StatusResponse{
			TrustDomain: "example.org", ReservedPrefix: "/assay/", Version: "v0.1.0",
			StartedAt: at("2026-11-22T20:00:00Z"), ServerTime: at("2026-11-23T10:30:00Z"),
			Revision: 4711, BundleSequence: 5,
			Authorities: []*adminv1.Authority{
				{
					Id: "0f1e2d3c", Use: "x509", State: "active", NotAfter: at("2027-11-20T00:00:00Z"),
					CreatedAt: at("2026-11-20T00:00:00Z"), Pin: "5a5a", LiveSvids: 1204,
				},
				{Id: "a0b1c2d3", Use: "x509", State: "retired", NotAfter: at("2026-11-24T12:30:00Z"), CreatedAt: at("2025-11-24T12:30:00Z"), Pin: "6b6b"},
			},
			Issuer:  &adminv1.Issuer{Id: "77aa", AuthorityId: "0f1e2d3c", NotAfter: at("2026-11-24T09:00:00Z")},
			Entries: 12,
			Agents: []*adminv1.AgentStatus{
				{Id: "spiffe://example.org/assay/agent/join_token/01", Connected: true, AcknowledgedSequence: 5, LastSeen: at("2026-11-23T10:29:59Z"), Version: "v0.1.0", ClockOffsetMs: 4000},
				{Id: "spiffe://example.org/assay/agent/join_token/02", Connected: true, AcknowledgedSequence: 4, LastSeen: at("2026-11-23T10:29:58Z"), ClockOffsetMs: -95000},
				{Id: "spiffe://example.org/assay/agent/join_token/03", AcknowledgedSequence: 5, WaitsUntil: at("2026-11-23T11:00:00Z"), LastSeen: at("2026-11-23T09:00:00Z"), EarliestExpiry: at("2026-11-23T11:01:00Z")},
				{Id: "spiffe://example.org/assay/agent/join_token/04", Banned: true},
			},
			OutageBudget: &adminv1.OutageBudget{FirstExpiry: at("2026-11-23T11:01:00Z"), AgentId: "spiffe://example.org/assay/agent/join_token/03"},
			Warnings:     []string{"store and seal key share a directory", "clear the screen: \x1b[2J"},
		},
		entries: []*types.Entry{
			{
				Id: "e-1", SpiffeId: id("/web"), ParentId: id("/assay/agent/join_token/01"),
				Selectors: selectors("unix", "uid:1000", "unix", "path:/usr/bin/web"), X509SvidTtl: 1800,
				DnsNames: []string{"web.example.org"}, Hint: "internal", ExpiresAt: farAway.Unix(), CreatedAt: 1790000000, RevisionNumber: 2,
			},
			{
				Id: "e-22", SpiffeId: id("/db"), ParentId: id("/assay/agent/join_token/02"),
				Selectors: selectors("unix", "uid:70"), CreatedAt: 1790000001, Hint: "evil\x1b[2J\nline",
			},
			{Id: "e-3", SpiffeId: id("/job"), ParentId: id("/assay/agent/join_token/02"), Selectors: selectors("unix", "uid:71"), ExpiresAt: longAgo.Unix(), CreatedAt: 1790000002},
		},
		agents: []*types.Agent{
			{
				Id: id("/assay/agent/join_token/01"), AttestationType: "join_token", X509SvidSerialNumber: "1234",
				X509SvidExpiresAt: 1790043200, AgentVersion: "v0.1.0", Selectors: selectors("join_token", "01"),
			},
			{Id: id("/assay/agent/join_token/04"), AttestationType: "join_token", Banned: true, CanReattest: false},
		},
		token:  &types.JoinToken{Value: "FJ4Q-TEST-TOKEN", ExpiresAt: 1790000600},
		bundle: &types.Bundle{TrustDomain: "example.org", SequenceNumber: 5, X509Authorities: []*types.X509Certificate{{Asn1: p.root.Raw}}},
	}
}

func TestServerVerbsPrintGoldenTextAndJSON(t *testing.T) {
	f := populated(newPKI(t))
	f.pageSize, f.revision = 2, 4712
	vars := map[string]string{serverSocketEnv: f.start(t)}
	cases := []struct {
		name string
		args []string
		code int
	}{
		{"status", []string{"status"}, 0},
		{"entry_list", []string{"entry", "list"}, 0},
		{"entry_count", []string{"entry", "count"}, 0},
		{"entry_update", []string{"entry", "update", "e-1", "--ttl", "15m"}, 0},
		{"entry_update_unknown", []string{"entry", "update", "e-9", "--ttl", "15m"}, 69},
		{"entry_show", []string{"entry", "show", "e-1"}, 0},
		{"entry_show_expired", []string{"entry", "show", "e-3"}, 0},
		{"entry_create", []string{
			"entry", "create", "--spiffe-id", "spiffe://example.org/new", "--parent-id", "spiffe://example.org/assay/agent/join_token/01",
			"--selector", "unix:uid:5", "--ttl", "30m", "--dns", "new.example.org", "--hint", "h",
		}, 0},
		{"entry_create_exists", []string{
			"entry", "create", "--spiffe-id", "spiffe://example.org/twice", "--parent-id", "spiffe://example.org/assay/agent/join_token/01",
			"--selector", "unix:uid:5",
		}, 75},
		{"entry_create_ended", []string{
			"entry", "create", "--spiffe-id", "spiffe://example.org/ended", "--parent-id", "spiffe://example.org/assay/agent/join_token/02",
			"--selector", "unix:uid:71",
		}, 75},
		{"entry_delete_some", []string{"entry", "delete", "e-1", "x-2", "e-3", "x-4"}, 69},
		{"entry_delete", []string{"entry", "delete", "e-1"}, 0},
		{"agent_list", []string{"agent", "list"}, 0},
		{"agent_show", []string{"agent", "show", nodeID}, 0},
		{"agent_ban", []string{"agent", "ban", "--yes", nodeID}, 0},
		{"agent_evict_some", []string{"agent", "evict", "--yes", nodeID, "spiffe://example.org/assay/agent/join_token/99"}, 69},
		{"agent_purge_dry", []string{"agent", "purge", "--older", "1h", "--dry-run"}, 0},
		{"token_create", []string{"token", "create"}, 0},
	}
	for _, c := range cases {
		for form, ext := range map[string]string{"text": ".txt", "json": ".json"} {
			t.Run(c.name+ext, func(t *testing.T) {
				got := assay(t, vars, append(c.args, "-o", form)...)
				if got.code != c.code {
					t.Errorf("exit %d, want %d: %s", got.code, c.code, got.stderr)
				}
				if (got.stderr != "") != (c.code != 0) {
					t.Errorf("stderr %q with exit %d", got.stderr, got.code)
				}
				golden(t, c.name+ext, got.stdout+got.stderr)
			})
		}
	}
}

func TestSVIDFetchPrintsGoldenText(t *testing.T) {
	p := newPKI(t)
	agent := &fakeAgent{script: sends(message(
		p.svid("spiffe://example.org/web", "internal", 0xbeef), p.svid("spiffe://example.org/admin", "external", 0xcafe)))}
	got := assay(t, map[string]string{endpointEnv: agent.start(t)}, "svid", "fetch")
	if got.code != 0 || got.stderr != "" {
		t.Fatalf("exit %d: %s", got.code, got.stderr)
	}
	text := regexp.MustCompile(`\(\d+d left\)`).ReplaceAllString(got.stdout, "(N left)")
	golden(t, "svid_fetch.txt", text)
}

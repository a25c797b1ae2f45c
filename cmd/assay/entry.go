package main

import (
	"context"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// entryShape is a registration entry in JSON. Times are RFC 3339; ExpiresAt is
// null for an entry that does not expire. TTL 0 means the server's default.
// Revision counts the changes of the entry. StoreRevision is there when it was
// just written: a revision of the server's store that has it, for `assay wait`.
type entryShape struct {
	ID                 string     `json:"id"`
	SPIFFEID           string     `json:"spiffe_id"`
	ParentID           string     `json:"parent_id"`
	Selectors          []string   `json:"selectors"`
	X509SVIDTTLSeconds int32      `json:"x509_svid_ttl_seconds"`
	DNSNames           []string   `json:"dns_names"`
	Hint               string     `json:"hint"`
	StoreSVID          bool       `json:"store_svid"`
	ExpiresAt          *time.Time `json:"expires_at"`
	CreatedAt          *time.Time `json:"created_at"`
	Revision           int64      `json:"revision"`
	StoreRevision      int64      `json:"store_revision,omitempty"`
}

func entryFromProto(e *types.Entry) entryShape {
	return entryShape{
		ID: e.GetId(), SPIFFEID: idFromProto(e.GetSpiffeId()), ParentID: idFromProto(e.GetParentId()),
		Selectors: selectorTexts(e.GetSelectors()), X509SVIDTTLSeconds: e.GetX509SvidTtl(),
		DNSNames: list(e.GetDnsNames()), Hint: e.GetHint(), StoreSVID: e.GetStoreSvid(),
		ExpiresAt: fromUnix(e.GetExpiresAt()), CreatedAt: fromUnix(e.GetCreatedAt()), Revision: e.GetRevisionNumber(),
	}
}

func (e entryShape) ttl() string {
	if e.X509SVIDTTLSeconds == 0 {
		return "default"
	}
	text := (time.Duration(e.X509SVIDTTLSeconds) * time.Second).String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// ended says whether the entry gives its identity no more. The server keeps it
// until somebody deletes it.
func (e entryShape) ended(now time.Time) bool { return e.ExpiresAt != nil && !now.Before(*e.ExpiresAt) }

// expires writes the end, judged by the clock of this host.
func (e entryShape) expires(now time.Time) string {
	if e.ended(now) {
		return stampOf(e.ExpiresAt) + " (expired)"
	}
	return stampOf(e.ExpiresAt)
}

// write prints one entry as lines of name and value.
func (e entryShape) write(w io.Writer) error {
	t := table{}
	t.add("id", e.ID)
	t.add("spiffe id", e.SPIFFEID)
	t.add("parent id", e.ParentID)
	for _, s := range e.Selectors {
		t.add("selector", s)
	}
	t.add("x509 svid ttl", e.ttl())
	for _, name := range e.DNSNames {
		t.add("dns name", name)
	}
	if e.Hint != "" {
		t.add("hint", e.Hint)
	}
	if e.StoreSVID {
		t.add("store svid", "yes: no workload gets it")
	}
	if e.ExpiresAt != nil {
		t.add("expires", e.expires(time.Now()))
	}
	t.add("created", stampOf(e.CreatedAt))
	t.add("revision", strconv.FormatInt(e.Revision, 10))
	if e.StoreRevision > 0 {
		t.add("store revision", strconv.FormatInt(e.StoreRevision, 10))
	}
	return t.write(w)
}

func newEntryCommand(t *tool) *cobra.Command {
	return group("entry", "Registration entries: who gets which identity",
		newEntryCreateCommand(t), newEntryListCommand(t), newEntryCountCommand(t), newEntryShowCommand(t),
		newEntryUpdateCommand(t), newEntryDeleteCommand(t), newEntryApplyCommand(t))
}

// entryFlags are the fields of an entry as flags.
type entryFlags struct {
	id, spiffeID, parentID, hint, expiresAt string
	selectors, dnsNames                     []string
	ttl                                     time.Duration
	node                                    bool
}

// proto reads the flags into an entry, or says which flag is wrong.
func (f entryFlags) proto(now time.Time) (*types.Entry, error) {
	e := &types.Entry{Id: f.id, Hint: f.hint, DnsNames: f.dnsNames}
	if err := readID("--spiffe-id", f.spiffeID, &e.SpiffeId); err != nil {
		return nil, err
	}
	if f.node && f.parentID != "" {
		return nil, usageError("--node is instead of --parent-id: the parent is the server")
	}
	if !f.node {
		if err := readID("--parent-id", f.parentID, &e.ParentId); err != nil {
			return nil, err
		}
	}
	if len(f.selectors) == 0 {
		return nil, usageError("at least one --selector is needed, as in --selector unix:uid:1000")
	}
	var err error
	if e.Selectors, err = parseSelectors(f.selectors); err != nil {
		return nil, err
	}
	if e.X509SvidTtl, err = seconds("--ttl", f.ttl); err != nil {
		return nil, err
	}
	if f.expiresAt != "" {
		at, err := parseMoment("--expires-at", f.expiresAt, now)
		if err != nil {
			return nil, err
		}
		e.ExpiresAt = at.Unix()
	}
	return e, nil
}

func newEntryCreateCommand(t *tool) *cobra.Command {
	var f entryFlags
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create a registration entry",
		Long: `Create a registration entry: processes that have all the selectors, on the
node of the parent (an agent's SPIFFE ID, or an alias), get the SPIFFE ID. With
--node the entry is about nodes: agents that have all the selectors have the
SPIFFE ID as an alias, and with it the entries whose parent it is. No
certificate is made out to an alias.

The entry is printed, with a store revision for assay wait. If one with the same IDs and selectors exists, that one
is printed and the exit code is 75. An entry that nobody can match yet is
created all the same, with a warning on standard error: one with a unix
selector that this version does not know, or for an agent that is not on record.

  $ assay entry create --spiffe-id spiffe://example.org/web \
      --parent-id spiffe://example.org/assay/agent/join_token/6d1f... \
      --selector unix:uid:1000 --dns web.example.org --ttl 30m
  $ assay entry create --node --spiffe-id spiffe://example.org/host/1 \
      --selector spiffe_id:spiffe://example.org/assay/agent/join_token/6d1f...`,
		Args: noArgs,
		RunE: t.serverVerb(func(ctx context.Context, s *serverConn, _ []string) error { return t.createEntry(ctx, s, f) }),
	}
	fl := cmd.Flags()
	fl.StringVar(&f.spiffeID, "spiffe-id", "", "identity to give, as spiffe://example.org/web (needed)")
	fl.StringVar(&f.parentID, "parent-id", "", "SPIFFE ID or alias of the agents whose nodes it is for (needed without --node)")
	fl.BoolVar(&f.node, "node", false, "make the SPIFFE ID an alias of the agents that have the selectors")
	fl.StringArrayVar(&f.selectors, "selector", nil, "type:value that a process, or with --node a node, must have; repeat for several (needed)")
	fl.DurationVar(&f.ttl, "ttl", 0, "lifetime of the X.509-SVIDs (default: the server's)")
	fl.StringArrayVar(&f.dnsNames, "dns", nil, "DNS name for the certificate; repeat for several")
	fl.StringVar(&f.hint, "hint", "", "word by which a workload with several identities tells them apart")
	fl.StringVar(&f.expiresAt, "expires-at", "", "when the entry ends: 2026-12-31T00:00:00Z, or 720h from now")
	fl.StringVar(&f.id, "id", "", "the entry's own ID (default: made by the server)")
	return t.serverFlags(cmd)
}

func (t *tool) createEntry(ctx context.Context, s *serverConn, f entryFlags) error {
	entry, err := f.proto(time.Now())
	if err != nil {
		return err
	}
	if f.node {
		server, err := askServerID(ctx, s)
		if err != nil {
			return err
		}
		entry.ParentId = idToProto(server)
	}
	resp, err := ask(ctx, s, s.entries.BatchCreateEntry, &spireentry.BatchCreateEntryRequest{Entries: []*types.Entry{entry}})
	if err != nil {
		return err
	}
	if len(resp.GetResults()) != 1 {
		return badAnswer("one result for one entry")
	}
	result := resp.GetResults()[0]
	failed := itemError(result.GetStatus())
	if result.GetEntry() != nil { // the new one, or the similar one that exists
		shape := entryFromProto(result.GetEntry())
		shape.StoreRevision = s.revision.Load()
		if err := t.print(shape, shape.write); err != nil {
			return err
		}
		failed = shape.explain(failed, time.Now())
	} else if failed == nil {
		return badAnswer("the entry that was created")
	}
	if failed == nil {
		t.warnOfEntry(ctx, s, result.GetEntry())
	}
	return failed
}

// explain adds to "there is one" why that one may be of no use.
func (e entryShape) explain(err error, now time.Time) error {
	if fault.ReasonOf(err) != "entry_exists" || !e.ended(now) {
		return err
	}
	return fault.Newf(fault.KindOf(err), fault.ReasonOf(err), "%s; it ended at %s: delete it first (assay entry delete %s)",
		fault.SafeText(err), stampOf(e.ExpiresAt), e.ID)
}

// badAnswer is a server that breaks its own API.
func badAnswer(missing string) error {
	return fault.New(fault.Internal, "bad_answer", "the server's answer lacks "+missing+": tool and server may be of different versions")
}

// entryList is what `entry list -o json` prints.
type entryList struct {
	Entries []entryShape `json:"entries"`
}

func newEntryListCommand(t *tool) *cobra.Command {
	var f entryFilter
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List registration entries",
		Long: `List the registration entries that match all the given flags.

  $ assay entry list --selector unix:uid:1000
  $ assay entry list -o json | jq -r '.entries[].spiffe_id'`,
		Args: noArgs,
	}
	cmd.RunE = t.serverVerb(func(ctx context.Context, s *serverConn, _ []string) error {
		f.hintSet = cmd.Flags().Changed("hint")
		return t.listEntries(ctx, s, f)
	})
	f.flags(cmd)
	return t.serverFlags(cmd)
}

func (t *tool) listEntries(ctx context.Context, s *serverConn, f entryFilter) error {
	filter, err := f.proto()
	if err != nil {
		return err
	}
	doc := entryList{Entries: []entryShape{}}
	err = pages(func(token string) (string, error) {
		resp, err := ask(ctx, s, s.entries.ListEntries, &spireentry.ListEntriesRequest{Filter: filter, PageToken: token})
		for _, e := range resp.GetEntries() {
			doc.Entries = append(doc.Entries, entryFromProto(e))
		}
		return resp.GetNextPageToken(), err
	})
	if err != nil {
		return err
	}
	return t.print(doc, func(w io.Writer) error {
		rows := table{header: []string{"ID", "SPIFFE ID", "PARENT ID", "SELECTORS", "TTL", "EXPIRES", "HINT"}}
		now := time.Now()
		for _, e := range doc.Entries {
			rows.add(e.ID, e.SPIFFEID, e.ParentID, strings.Join(e.Selectors, ","), e.ttl(), e.expires(now), e.Hint)
		}
		return rows.write(w)
	})
}

// pages calls next with each page token until the server says that it was the
// last page.
func pages(next func(token string) (string, error)) error {
	for token := ""; ; {
		following, err := next(token)
		if err != nil || following == "" {
			return err
		}
		if following == token {
			return fault.New(fault.Internal, "bad_answer", "the server gives the same page again and again")
		}
		token = following
	}
}

func newEntryShowCommand(t *tool) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show one registration entry",
		Long: `Show the registration entry with this ID.

  $ assay entry show zcmjbsw6w47mjhtyow77sjgr45`,
		Args: oneArg("entry ID"),
		RunE: t.serverVerb(func(ctx context.Context, s *serverConn, args []string) error {
			entry, err := ask(ctx, s, s.entries.GetEntry, &spireentry.GetEntryRequest{Id: args[0]})
			if err != nil {
				return err
			}
			shape := entryFromProto(entry)
			return t.print(shape, shape.write)
		}),
	}
	return t.serverFlags(cmd)
}

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	spireentry "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

func newEntryUpdateCommand(t *tool) *cobra.Command {
	var f entryFlags
	cmd := &cobra.Command{
		Use:   "update ID",
		Short: "Change a registration entry",
		Long: `Change the fields of an entry that are named; all others stay as they are.
Workloads that gain or lose the identity by it learn of it at once; those that
keep it get a certificate with the new content.

An empty --dns or --hint takes the names or the hint away, --ttl 0 goes back to
the server's default, --expires-at never makes the entry stay. The changed entry
is printed.

  $ assay entry update zcmjbsw6w47mjhtyow77sjgr45 --ttl 15m --dns web.example.org`,
		Args: oneArg("entry ID"),
	}
	cmd.RunE = t.serverVerb(func(ctx context.Context, s *serverConn, args []string) error {
		entry, mask, err := f.change(cmd.Flags().Changed, time.Now())
		if err != nil {
			return err
		}
		entry.Id = args[0]
		return t.updateEntry(ctx, s, entry, mask)
	})
	fl := cmd.Flags()
	fl.StringVar(&f.spiffeID, "spiffe-id", "", "another identity")
	fl.StringVar(&f.parentID, "parent-id", "", "another agent")
	fl.StringArrayVar(&f.selectors, "selector", nil, "type:value; repeat for several: these replace all that it has")
	fl.DurationVar(&f.ttl, "ttl", 0, "lifetime of the X.509-SVIDs, 0 for the server's default")
	fl.StringArrayVar(&f.dnsNames, "dns", nil, `DNS name; repeat for several: these replace all that it has, "" for none`)
	fl.StringVar(&f.hint, "hint", "", `another hint, "" for none`)
	fl.StringVar(&f.expiresAt, "expires-at", "", "when the entry ends: 2026-12-31T00:00:00Z, 720h from now, or never")
	return t.serverFlags(cmd)
}

// change reads the flags that were given into a change: new values, and a mask
// that says which of them count.
func (f entryFlags) change(given func(flag string) bool, now time.Time) (*types.Entry, *types.EntryMask, error) {
	e, mask := &types.Entry{}, &types.EntryMask{}
	fields := []struct {
		flag  string
		named *bool
		read  func() error
	}{
		{"spiffe-id", &mask.SpiffeId, func() error { return readID("--spiffe-id", f.spiffeID, &e.SpiffeId) }},
		{"parent-id", &mask.ParentId, func() error { return readID("--parent-id", f.parentID, &e.ParentId) }},
		{"selector", &mask.Selectors, func() (err error) { e.Selectors, err = parseSelectors(f.selectors); return err }},
		{"ttl", &mask.X509SvidTtl, func() (err error) { e.X509SvidTtl, err = seconds("--ttl", f.ttl); return err }},
		{"dns", &mask.DnsNames, func() error {
			if !slices.Equal(f.dnsNames, []string{""}) {
				e.DnsNames = f.dnsNames
			}
			return nil
		}},
		{"hint", &mask.Hint, func() error { e.Hint = f.hint; return nil }},
		{"expires-at", &mask.ExpiresAt, func() error {
			if f.expiresAt == "never" {
				return nil
			}
			at, err := parseMoment("--expires-at", f.expiresAt, now)
			e.ExpiresAt = at.Unix()
			return err
		}},
	}
	some := false
	for _, field := range fields {
		if !given(field.flag) {
			continue
		}
		some, *field.named = true, true
		if err := field.read(); err != nil {
			return nil, nil, err
		}
	}
	if !some {
		return nil, nil, usageError("nothing to change: name at least one field, as in --ttl 15m")
	}
	return e, mask, nil
}

func readID(flag, text string, to **types.SPIFFEID) error {
	id, err := parseID(flag, text)
	if err != nil {
		return err
	}
	*to = idToProto(id)
	return nil
}

func (t *tool) updateEntry(ctx context.Context, s *serverConn, entry *types.Entry, mask *types.EntryMask) error {
	resp, err := ask(ctx, s, s.entries.BatchUpdateEntry, &spireentry.BatchUpdateEntryRequest{Entries: []*types.Entry{entry}, InputMask: mask})
	if err != nil {
		return err
	}
	if len(resp.GetResults()) != 1 {
		return badAnswer("one result for one entry")
	}
	result := resp.GetResults()[0]
	if err := itemError(result.GetStatus()); err != nil {
		return err
	}
	if result.GetEntry() == nil {
		return badAnswer("the entry that was changed")
	}
	shape := entryFromProto(result.GetEntry())
	shape.StoreRevision = s.revision.Load()
	if err := t.print(shape, shape.write); err != nil {
		return err
	}
	t.warnOfEntry(ctx, s, result.GetEntry())
	return nil
}

// entryCount is what `entry count -o json` prints.
type entryCount struct {
	Count int32 `json:"count"`
}

func newEntryCountCommand(t *tool) *cobra.Command {
	var f entryFilter
	cmd := &cobra.Command{
		Use:   "count",
		Short: "Count registration entries",
		Long: `Count the registration entries that match all the given flags, as entry list
would list them.

  $ assay entry count --parent-id spiffe://example.org/assay/agent/join_token/6d1f...`,
		Args: noArgs,
	}
	cmd.RunE = t.serverVerb(func(ctx context.Context, s *serverConn, _ []string) error {
		f.hintSet = cmd.Flags().Changed("hint")
		filter, err := f.proto()
		if err != nil {
			return err
		}
		resp, err := ask(ctx, s, s.entries.CountEntries, &spireentry.CountEntriesRequest{Filter: &spireentry.CountEntriesRequest_Filter{
			BySpiffeId: filter.GetBySpiffeId(), ByParentId: filter.GetByParentId(), BySelectors: filter.GetBySelectors(), ByHint: filter.GetByHint(),
		}})
		if err != nil {
			return err
		}
		doc := entryCount{Count: resp.GetCount()}
		return t.print(doc, func(w io.Writer) error {
			if _, err := fmt.Fprintln(w, doc.Count); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
			return nil
		})
	})
	f.flags(cmd)
	return t.serverFlags(cmd)
}

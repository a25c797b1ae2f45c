package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/pkg/fault"
)

func newEntryApplyCommand(t *tool) *cobra.Command {
	var path string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Make the server's entries those of a file",
		Long: `Make what is missing of the entries in a file, and change what differs; doing
it again changes nothing. Entries that the file does not name are left alone:
nothing is ever deleted.

The file is JSON or YAML, by its extension or else by how it begins; "-" is
standard input. It has what assay entry list -o json prints; people rather write

  entries:
  - spiffe_id: spiffe://example.org/web
    parent_id: spiffe://example.org/assay/agent/join_token/6d1f...
    selectors: [unix:uid:1000]
    x509_svid_ttl: 30m            # or x509_svid_ttl_seconds: 1800
    dns_names: [web.example.org]
    hint: internal
    expires_at: 2027-01-31T00:00:00Z

An entry is the one on the server that has its id or, without one, its SPIFFE
ID, parent and selectors. What an entry leaves out, it shall not have; created_at
and the revisions are the server's and ignored. A file with a mistake in it is
refused before anything is changed. Each entry succeeds or fails alone; the exit
code is that of the first failure.

  $ assay entry apply -f entries.yaml --dry-run
  $ assay entry list -o json | jq '...' | assay entry apply -f -`,
		Args: noArgs,
		RunE: t.serverVerb(func(ctx context.Context, s *serverConn, _ []string) error {
			if path == "" {
				return usageError("-f is needed: the file with the entries, or - for standard input")
			}
			return t.applyEntries(ctx, s, path, dryRun)
		}),
	}
	fl := cmd.Flags()
	fl.StringVarP(&path, "file", "f", "", "file with the entries, - for standard input (needed)")
	fl.BoolVar(&dryRun, "dry-run", false, "print what would be done, change nothing")
	return t.serverFlags(cmd)
}

func (t *tool) applyEntries(ctx context.Context, s *serverConn, path string, dryRun bool) error {
	data, called, err := t.readFile(path)
	if err != nil {
		return err
	}
	plan, stored, err := wantedAndStored(ctx, s, called, data)
	if err != nil {
		return err
	}
	compareWith(stored, plan)
	if !dryRun {
		t.carryOut(ctx, s, plan)
	}
	doc := summarise(plan, dryRun)
	doc.StoreRevision = s.revision.Load()
	if err := t.print(doc, func(w io.Writer) error { return doc.write(w, plan) }); err != nil {
		return err
	}
	if !dryRun {
		t.warnOfEntries(ctx, s, plan, stored)
	}
	return doc.failure(plan)
}

// wantedAndStored reads the file while the server is asked for what it has. An
// error of the file comes first: it has nothing to do with the server.
func wantedAndStored(ctx context.Context, s *serverConn, called string, data []byte) (plan []planned, stored []*types.Entry, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var g errgroup.Group
	g.Go(func() (err error) { stored, err = storedEntries(ctx, s); return err })
	if plan, err = parseEntryFile(called, data); err != nil {
		cancel()
	}
	listed := g.Wait()
	if err == nil {
		err = listed
	}
	return plan, stored, err
}

// applied is what `entry apply -o json` prints. With dry_run the counts are of
// what would be done. StoreRevision is a revision of the server's store that has
// all of it, for `assay wait`; zero if the server does not tell.
type applied struct {
	DryRun    bool           `json:"dry_run"`
	Created   int            `json:"created"`
	Updated   int            `json:"updated"`
	Unchanged int            `json:"unchanged"`
	Failed    int            `json:"failed"`
	Results   []applyVerdict `json:"results"`

	StoreRevision int64 `json:"store_revision"`
}

// applyVerdict is of one entry, in the order of the file. Action is create,
// update or none; where Error is not null, it was tried and not done.
type applyVerdict struct {
	ID       string          `json:"id"` // empty for one that is not made
	SPIFFEID string          `json:"spiffe_id"`
	Action   string          `json:"action"`
	Changes  []fieldChange   `json:"changes"`
	Error    *daemon.Failure `json:"error"`
}

func summarise(plan []planned, dryRun bool) *applied {
	doc := &applied{DryRun: dryRun, Results: make([]applyVerdict, len(plan))}
	for i := range plan {
		p := &plan[i]
		v := applyVerdict{ID: p.want.GetId(), SPIFFEID: idFromProto(p.want.GetSpiffeId()), Action: p.action(), Changes: list(p.changes)}
		switch {
		case p.err != nil:
			shape := daemon.Describe(p.err)
			v.Error = &shape
			doc.Failed++
		case v.Action == "create":
			doc.Created++
		case v.Action == "update":
			doc.Updated++
		default:
			doc.Unchanged++
		}
		doc.Results[i] = v
	}
	return doc
}

// write prints the difference as people read it, and what it sums up to.
func (a *applied) write(out io.Writer, plan []planned) error {
	w := bufio.NewWriterSize(out, 64<<10)
	for i, v := range a.Results {
		writeVerdict(w, v, &plan[i])
	}
	made, changed := "created", "updated"
	if a.DryRun {
		made, changed = "to create", "to update"
	}
	_, _ = fmt.Fprintf(w, "%d entries: %d %s, %d %s, %d unchanged", len(plan), a.Created, made, a.Updated, changed, a.Unchanged)
	if a.Failed > 0 {
		_, _ = fmt.Fprintf(w, ", %d failed", a.Failed)
	}
	_, _ = fmt.Fprintln(w)
	if err := w.Flush(); err != nil { // has the first error of all
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

func writeVerdict(w io.Writer, v applyVerdict, p *planned) {
	sign := map[string]string{"create": "+ ", "update": "~ "}[v.Action]
	if sign == "" {
		return
	}
	if v.Error != nil {
		sign = "! "
	}
	line := sign + v.SPIFFEID
	if v.ID != "" {
		line += " (" + v.ID + ")"
	}
	if p.have == nil {
		line += " for " + idFromProto(p.want.GetParentId()) + " with " + strings.Join(selectorTexts(p.want.GetSelectors()), ", ")
	}
	_, _ = fmt.Fprintln(w, plain(line))
	for _, c := range v.Changes {
		_, _ = fmt.Fprintln(w, plain("    "+strings.TrimSuffix(c.Field, "_seconds")+": "+c.from+" -> "+c.to))
	}
	if v.Error != nil {
		_, _ = fmt.Fprintln(w, plain("    not done: "+v.Error.Reason+": "+v.Error.Message))
	}
}

// failure is the first of the entries' errors.
func (a *applied) failure(plan []planned) error {
	for i := range plan {
		if err := plan[i].err; err != nil && len(plan) == 1 {
			return err
		} else if err != nil {
			return fault.Newf(fault.KindOf(err), fault.ReasonOf(err),
				"%d of %d entries were not applied, the first because: %s", a.Failed, len(plan), fault.SafeText(err))
		}
	}
	return nil
}

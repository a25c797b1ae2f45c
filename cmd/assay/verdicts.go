package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"

	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/pkg/fault"
)

// verdicts is what verbs print that act on several things, each of which
// succeeds or fails alone: each ID of the command line in its order.
type verdicts struct {
	Results []verdict `json:"results"`
	// StoreRevision is there after writes of entries: see entryShape.
	StoreRevision int64 `json:"store_revision,omitempty"`
	rows          table
	failed        int
	first         error
}

// verdict is of one ID. Error is null where it was done.
type verdict struct {
	ID    string          `json:"id"`
	Error *daemon.Failure `json:"error"`
}

func newVerdicts() *verdicts {
	return &verdicts{Results: []verdict{}, rows: table{header: []string{"ID", "RESULT"}}}
}

// add notes what became of id; done is the word for success.
func (v *verdicts) add(id, done string, err error) {
	result := verdict{ID: id}
	if err != nil {
		shape := daemon.Describe(err)
		result.Error, done = &shape, shape.Reason+": "+shape.Message
		if v.failed++; v.first == nil {
			v.first = err
		}
	}
	v.Results = append(v.Results, result)
	v.rows.add(id, done)
}

// finish prints the verdicts. Its error is the first of theirs; failed says
// what it means for those, as in "entries were not deleted".
func (t *tool) finish(v *verdicts, failed string) error {
	if err := t.print(v, func(w io.Writer) error { return v.rows.write(w) }); err != nil {
		return err
	}
	if v.first == nil || len(v.Results) == 1 {
		return v.first
	}
	return fault.Newf(fault.KindOf(v.first), fault.ReasonOf(v.first),
		"%d of %d %s, the first because: %s", v.failed, len(v.Results), failed, fault.SafeText(v.first))
}

// confirm asks whoever sits at the terminal before something that can't be
// undone; yes is the flag --yes, which a script has to give.
func (t *tool) confirm(yes bool, question string) error {
	if yes {
		return nil
	}
	if !t.isTTY || !t.asksTTY {
		return usageError("this can't be undone and nobody is there to be asked: add --yes")
	}
	if _, err := fmt.Fprint(t.stderr, question+" [y/N] "); err != nil {
		return fmt.Errorf("ask: %w", err)
	}
	answer, err := bufio.NewReader(t.stdin).ReadString('\n')
	if err != nil && answer == "" {
		return fault.Wrap(fault.Denied, err, "declined", "no answer, so nothing was changed")
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return fault.New(fault.Denied, "declined", "nothing was changed")
}

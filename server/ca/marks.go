package ca

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/store"
)

// class sorts end-entity certificates by how it is known whether they are
// still in use: stream, through an agent that reports what it holds; handed,
// given to somebody who never reports; own, the server's, which replaces it by
// itself when another root becomes active.
type class int

const (
	stream class = iota
	handed
	own
	numClasses
)

// marks bound the certificates under a root: none of a class ends after its
// mark. So a root whose marks are past can be taken away without looking for
// anything it signed.
type marks struct {
	Stream time.Time `json:"stream"`
	Handed time.Time `json:"handed"`
	Own    time.Time `json:"own"`
}

func (m *marks) of(c class) *time.Time {
	return [numClasses]*time.Time{&m.Stream, &m.Handed, &m.Own}[c]
}

// include moves the mark of c to t if it lies before.
func (m *marks) include(c class, t time.Time) {
	if mark := m.of(c); t.After(*mark) {
		*mark = t
	}
}

// covers says whether no mark of need lies after ours.
func (m marks) covers(need marks) bool {
	for c := range numClasses {
		if need.of(c).After(*m.of(c)) {
			return false
		}
	}
	return true
}

// ahead returns where marks are raised to at the moment now: past the longest
// certificate that can be signed in the next ten minutes.
func (a *Authority) ahead(now time.Time) marks {
	at := func(longest time.Duration) time.Time {
		return now.Add(longest + headroom).UTC().Truncate(time.Second)
	}
	return marks{
		Stream: at(a.cfg.longestStream(a.agentTTL)),
		Handed: at(a.cfg.MaxX509SVIDTTL),
		Own:    at(a.cfg.MaxX509SVIDTTL),
	}
}

// begin raises the marks of a root that becomes active, in the commit that
// makes it so: the first certificates under it need no further one. Handed
// waits for the first certificate of its class, since a mark that nothing needs
// holds up a rotation.
func (m *marks) begin(ahead marks) {
	m.include(stream, ahead.Stream)
	m.include(own, ahead.Own)
}

// raised returns m with those marks moved ahead that don't cover need. The
// others stay, so that a class that is not used runs out.
func (m marks) raised(need, ahead marks) marks {
	for c := range numClasses {
		if needed := *need.of(c); needed.After(*m.of(c)) {
			m.include(c, *ahead.of(c))
			m.include(c, needed)
		}
	}
	return m
}

// errSuperseded says that a plan was made for a root that is active no more.
var errSuperseded = errors.New("the active root has changed")

// raiseTries bounds the commits that lose against other servers. Each loss
// means that one of them has moved the same record, usually by raising the
// mark that is wanted here.
const raiseTries = 20

// coverMarks returns when the marks of the root, in the store, cover need. Of
// many callers one commits, the others find it done.
//
// Nothing depends on what comes after. If the process ends between the raise
// and the signature, the mark stands above what was signed, which keeps an old
// root in the bundle a little longer; it never stands below.
func (a *Authority) coverMarks(ctx context.Context, rootID string, need marks) error {
	root := a.current.Load().view.active
	if root.record.ID == rootID && root.record.Marks.covers(need) {
		return nil
	}
	if err := a.lock(ctx); err != nil {
		return err
	}
	defer a.unlock()
	for range raiseTries {
		root := a.current.Load().view.active
		if root.record.ID != rootID {
			return errSuperseded
		}
		if root.record.Marks.covers(need) {
			return nil
		}
		err := a.raise(ctx, root, need)
		if err == nil {
			failpoint.Hit("mark_raised")
			return nil
		}
		if !errors.Is(err, fault.Conflict) {
			return fmt.Errorf("raise marks of authority %s: %w", rootID, err)
		}
		if err := a.reloadLocked(ctx); err != nil {
			return err
		}
	}
	return fault.New(fault.NotReady, "store_busy", "the authority record changes faster than it can be updated: try again")
}

// raise commits raised marks. The precondition is the record as this server
// knows it, so a root that has been retired meanwhile is never raised.
func (a *Authority) raise(ctx context.Context, root *authority, need marks) error {
	asked := time.Now()
	changed := &authority{record: root.record, cert: root.cert}
	changed.record.Marks = root.record.Marks.raised(need, a.ahead(asked))
	key := rootPrefix + root.record.ID
	value, err := a.stamp.seal(key, changed.record)
	if err != nil {
		return err
	}
	revision, err := a.store.Commit(ctx,
		[]store.Precondition{{Key: key, Revision: root.revision}},
		[]store.Write{{Key: key, Value: value}})
	if err != nil {
		return err
	}
	a.hear(asked)
	changed.raw, changed.revision = value, revision
	cur := *a.current.Load()
	cur.view = cur.view.replace(changed)
	a.current.Store(&cur)
	return nil
}

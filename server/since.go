package server

import (
	"errors"
	"io/fs"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/store"
)

// Since is what the audit log tells of the time after a revision of the store:
// what a restore to that revision loses.
type Since struct {
	// Complete: the log tells of all the time from that revision to the end of
	// the store. If not, nobody can tell what else is lost.
	Complete bool
	Acts     []registry.Act
	// Attested are agents that attested; the others are the IDs of entries.
	Attested, Created, Updated, Deleted IDs

	first, last int64         // revisions of the store
	roots       []audit.Event // moves, of before too
	restored    bool          // another store took its place on the way
}

// history is what an audit log tells of the stores that wrote it, one after the
// other.
type history struct {
	stores  []*Since
	reached int64 // the highest revision that any of them had
}

// IDs is a list of IDs in the order in which they came, each once.
type IDs struct {
	List []string
	seen map[string]bool
}

func (l *IDs) add(id string) {
	if id == "" || l.seen[id] {
		return
	}
	if l.seen == nil {
		l.seen = map[string]bool{}
	}
	l.seen[id] = true
	l.List = append(l.List, id)
}

// readHistory reads the whole audit log, for a restore to a revision. Revisions
// only grow within a store's life: a line that names a lower one than the line
// before is of another store, begun anew.
func readHistory(path string, revision int64) (h history, err error) {
	var s *Since
	err = audit.Events(path, func(e audit.Event) error {
		if s == nil || e.StoreRevision < s.last && e.StoreRevision > 0 {
			s = &Since{first: e.StoreRevision}
			h.stores = append(h.stores, s)
		}
		s.last = max(s.last, e.StoreRevision)
		s.Complete = s.first > 0 && s.first <= revision && revision <= s.last
		h.reached = max(h.reached, s.last)
		if !e.OK {
			return nil
		}
		if e.Action == "store.restore" {
			s.restored = true
			if e.StoreRevision <= revision { // whatever moved before was given up then
				s.roots = nil
			}
		}
		s.note(e, e.StoreRevision >= revision)
		return nil
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return history{}, nil
	case fault.ReasonOf(err) == "audit_chain_broken":
		return h, fault.Wrap(fault.Precondition, err, "audit_chain_broken",
			"the audit log, which tells what is lost, has a gap or a damaged line: if the server is running, try again; else keep the log, and move it aside to restore without it")
	}
	return h, err
}

// of returns what is told of the store that has these roots: the newest one that
// did not begin with another root.
func (h history) of(states map[string]ca.State) Since {
	elsewhere := false // it may have gone on in the place of one begun later
	for _, s := range slices.Backward(h.stores) {
		if s.mayBeOf(states) {
			found := *s
			found.Complete = found.Complete && !elsewhere
			return found
		}
		elsewhere = elsewhere || s.restored
	}
	return Since{}
}

// mayBeOf says whether a store can have these roots. The lines of its beginning
// may be gone; and if it took several attempts to make its first root, all of
// them have lines.
func (s *Since) mayBeOf(states map[string]ca.State) bool {
	begun, known := false, false
	for _, e := range s.roots {
		if e.Action == "root.create" && e.StoreRevision <= store.FirstRevision {
			_, has := states[e.AuthorityID]
			begun, known = true, known || has
		}
	}
	return known || !begun
}

// note keeps what the line tells; after: it was written at the revision or later.
func (s *Since) note(e audit.Event, after bool) {
	if strings.HasPrefix(e.Action, "root.") {
		s.roots = append(s.roots, e)
	}
	if !after {
		return
	}
	switch e.Action {
	case "agent.ban", "agent.evict":
		if id, err := spiffeid.FromString(e.AgentID); err == nil {
			s.Acts = append(s.Acts, registry.Act{Agent: id, Evict: e.Action == "agent.evict"})
		}
	case "agent.attest":
		s.Attested.add(e.AgentID)
	case "entry.create":
		s.Created.add(e.EntryID)
	case "entry.update":
		s.Updated.add(e.EntryID)
	case "entry.delete":
		s.Deleted.add(e.EntryID)
	}
}

// rootsLost says which move of a root can't be gone back behind; empty if none
// was made. The states are those of the backup. A root that was made and not used
// is no loss, nor is one that was used and is gone again, nor one that had been
// replaced already when it was revoked: who trusts the roots that came after
// trusts the active one of the backup. A root that was given up before it was used
// may have been given up for a reason.
//
// Whether a move came after the backup shows in the states, not in the line's
// revision: a root's line is written before the commit that it tells of.
func (s *Since) rootsLost(states map[string]ca.State) string {
	used := "" // one that the backup does not know
	for _, e := range s.roots {
		was, known := states[e.AuthorityID]
		switch {
		case e.Action == "root.activate" && !known:
			used = e.AuthorityID
		case e.Action == "root.revoke" && used == e.AuthorityID:
			used = ""
		case e.Action == "root.taint" && known && was != ca.Tainted && was != ca.Revoked:
			return "root " + e.AuthorityID + " was tainted"
		case e.Action == "root.revoke" && was == ca.Active:
			return "root " + e.AuthorityID + " was revoked"
		case e.Action == "root.revoke" && was == ca.Prepared:
			return "root " + e.AuthorityID + ", which it has as prepared, was given up"
		}
	}
	if used != "" {
		return "root " + used + " was activated"
	}
	return ""
}

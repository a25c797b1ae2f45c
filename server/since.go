package server

import (
	"errors"
	"io/fs"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/registry"
)

// Since is what the audit log tells of the time after a revision of the store:
// what a restore to that revision loses.
type Since struct {
	// Complete: the log reaches back to that revision. If not, nobody can tell
	// what else is lost.
	Complete bool
	// Revision is the newest that the store is known to have had.
	Revision int64
	Acts     []registry.Act
	// Attested are agents that attested; the others are the IDs of entries.
	Attested, Created, Updated, Deleted IDs

	roots []audit.Event // moves, of before too
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

// readSince reads the whole audit log. Revisions only grow within a store's life:
// a line that names a lower one than the line before is of another store, begun
// anew, and what stands before it tells nothing of this one.
func readSince(path string, revision int64) (Since, error) {
	var s Since
	lines := 0
	err := audit.Events(path, func(e audit.Event) error {
		if e.StoreRevision < s.Revision {
			s, lines = Since{}, 0
		}
		if lines++; lines == 1 {
			s.Complete = e.StoreRevision <= revision
		}
		s.Revision = e.StoreRevision
		if e.OK {
			s.note(e, e.StoreRevision >= revision)
		}
		return nil
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Since{}, nil
	case fault.ReasonOf(err) == "audit_chain_broken":
		return s, fault.Wrap(fault.Precondition, err, "audit_chain_broken",
			"the audit log, which tells what is lost, has a gap or a damaged line: if the server is running, try again; else keep the log, and move it aside to restore without it")
	}
	return s, err
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
// is no loss, nor is one that had been replaced already when it was revoked: who
// trusts the roots that came after trusts the active one of the backup.
//
// Whether a move came after the backup shows in the states, not in the line's
// revision: a root's line is written before the commit that it tells of.
func (s *Since) rootsLost(states map[string]ca.State) string {
	for _, e := range s.roots {
		was, known := states[e.AuthorityID]
		switch {
		case e.Action == "root.activate" && !known:
			return "root " + e.AuthorityID + " was activated"
		case e.Action == "root.taint" && known && was != ca.Tainted && was != ca.Revoked:
			return "root " + e.AuthorityID + " was tainted"
		case e.Action == "root.revoke" && was == ca.Active:
			return "root " + e.AuthorityID + " was revoked"
		}
	}
	return ""
}

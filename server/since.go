package server

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/registry"
)

// Since is what the audit log tells of the time after a revision of the store:
// what a restore to that revision loses.
type Since struct {
	// Known: there is an audit log. Without one nobody can tell what is lost.
	Known bool
	// Revision is the newest that the store is known to have had.
	Revision int64
	Acts     []registry.Act
	// Attested are agents that attested; the others are the IDs of entries.
	Attested, Created, Updated, Deleted IDs

	roots []audit.Event
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

// readSince reads the whole audit log.
func readSince(path string, revision int64) (Since, error) {
	var s Since
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	s.Known = true
	err := audit.Events(path, func(e audit.Event) error {
		s.Revision = max(s.Revision, e.StoreRevision)
		if e.OK && e.StoreRevision >= revision {
			s.note(e)
		}
		return nil
	})
	if fault.ReasonOf(err) == "audit_chain_broken" {
		return s, fault.Wrap(fault.Precondition, err, "audit_chain_broken",
			"the audit log, which tells what is lost, is damaged: keep it, and move it aside to restore without it")
	}
	return s, err
}

func (s *Since) note(e audit.Event) {
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
	default:
		if strings.HasPrefix(e.Action, "root.") {
			s.roots = append(s.roots, e)
		}
	}
}

// rootsLost says which move of a root can't be gone back behind; empty if none
// was made. That a root was prepared, or a published one activated, does no
// harm: who trusts that root trusts the ones of the backup as well.
func (s *Since) rootsLost(published []string) string {
	for _, e := range s.roots {
		switch {
		case e.Action == "root.activate" && !slices.Contains(published, e.AuthorityID):
			return "root " + e.AuthorityID + " was activated"
		case e.Action == "root.taint" && slices.Contains(published, e.AuthorityID):
			return "root " + e.AuthorityID + " was tainted"
		case e.Action == "root.revoke" && slices.Contains(published, e.AuthorityID):
			return "root " + e.AuthorityID + " was revoked"
		}
	}
	return ""
}

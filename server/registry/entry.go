package registry

import (
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// Bounds of an entry.
const (
	MaxHint    = 1024
	MaxEntryID = 255
	// maxEntryBytes bounds one encoded entry, so that any entry fits into a
	// message to its agent and many into one commit.
	maxEntryBytes = 64 << 10
)

// Entry says: on the node of ParentID, a workload that has all Selectors is
// SPIFFEID. Entries handed out share their slices; don't change them.
//
// SPIRE's entry has more fields. Those that only add something (federates_with,
// jwt_svid_ttl, additional_attributes) are not kept, so they come back empty.
// Those whose loss would widen a right (admin, downstream) must be refused by
// whoever reads SPIRE's message: an Entry can't express them.
type Entry struct {
	ID          string
	SPIFFEID    spiffeid.ID
	ParentID    spiffeid.ID
	Selectors   selector.Set
	X509SVIDTTL time.Duration // zero: the server's default
	DNSNames    []string
	Hint        string
	StoreSVID   bool      // for a secret store: no agent and no workload has it
	ExpiresAt   time.Time // zero: never
	CreatedAt   time.Time
	Revision    int64 // how often it was updated
}

// expired says whether e gives no right any more at the moment now.
func (e *Entry) expired(now time.Time) bool {
	return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt)
}

// rules are what the configuration adds to the rules for entries.
type rules struct {
	trustDomain    spiffeid.TrustDomain
	reservedPrefix string
	maxTTL         time.Duration
}

// normalise brings e into the form in which it is stored and compared.
func normalise(e Entry) Entry {
	e.Selectors = selector.NewSet(e.Selectors...)
	e.ExpiresAt = wall(e.ExpiresAt)
	e.CreatedAt = wall(e.CreatedAt)
	if len(e.DNSNames) == 0 {
		e.DNSNames = nil
	}
	return e
}

// wall is t as records keep it: UTC, milliseconds, no monotonic reading.
func wall(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return time.UnixMilli(t.UnixMilli()).UTC()
}

// check applies every rule that does not depend on the moment.
func (r rules) check(e *Entry) error {
	if err := checkEntryID(e.ID); err != nil {
		return err
	}
	if err := r.checkIDs(e); err != nil {
		return err
	}
	if err := checkSelectors(e.Selectors); err != nil {
		return err
	}
	switch {
	case e.X509SVIDTTL < 0 || e.X509SVIDTTL > r.maxTTL:
		return fault.Newf(fault.Invalid, "ttl_out_of_range",
			"x509_svid_ttl is between 0 (the default) and %v, the cap of this server (ca.max_x509_svid_ttl)", r.maxTTL)
	case len(e.Hint) > MaxHint || !utf8.ValidString(e.Hint):
		return fault.Newf(fault.Invalid, "hint_invalid", "a hint is text of at most %d bytes", MaxHint)
	case e.ExpiresAt.UnixMilli() < 0 && !e.ExpiresAt.IsZero():
		return fault.New(fault.Invalid, "expires_at_invalid", "expires_at is a moment after 1970; leave it out for an entry that stays")
	}
	return name.CheckDNS(e.DNSNames)
}

// checkIDs holds both IDs to the standard (name.ParseID again: an ID in memory may
// have been built without it) and to this trust domain.
func (r rules) checkIDs(e *Entry) error {
	for _, id := range []spiffeid.ID{e.SPIFFEID, e.ParentID} {
		if _, err := name.ParseID(id.String()); err != nil {
			return err
		}
		if !id.MemberOf(r.trustDomain) {
			return invalidID("spiffe_id and parent_id must be in this server's trust domain, " + r.trustDomain.Name())
		}
	}
	switch path := e.SPIFFEID.Path(); {
	case path == "":
		return invalidID("the ID of a workload needs a path; without one it names the trust domain")
	case strings.HasPrefix(path, r.reservedPrefix):
		return invalidID("paths under " + r.reservedPrefix + " are reserved for the server and its agents")
	}
	return nil
}

func checkEntryID(id string) error {
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_"
	if id == "" || len(id) > MaxEntryID || strings.Trim(id, allowed) != "" {
		return fault.Newf(fault.Invalid, "entry_id_invalid",
			"an entry's id has 1 to %d characters of A-Z, a-z, 0-9, dot, dash and underscore; leave it out to have one made", MaxEntryID)
	}
	return nil
}

func checkSelectors(set selector.Set) error {
	if len(set) == 0 {
		return fault.New(fault.Invalid, "selector_missing", "an entry needs at least one selector, as in unix:uid:1000")
	}
	for _, s := range set {
		if err := s.Check(); err != nil {
			return err
		}
		if !utf8.ValidString(s.Type) || !utf8.ValidString(s.Value) {
			return fault.New(fault.Invalid, "selector_invalid", "a selector is UTF-8 text")
		}
	}
	return checkStrength(set)
}

// checkStrength refuses an entry that tells processes apart by their program
// alone: whoever can start a program can answer for it, and be handed what it
// was given (security page, "No boundary").
func checkStrength(set selector.Set) error {
	program, user := false, false
	for _, s := range set {
		if s.Type != "unix" {
			continue
		}
		program = program || strings.HasPrefix(s.Value, "path:") || strings.HasPrefix(s.Value, "sha256:")
		user = user || strings.HasPrefix(s.Value, "uid:")
	}
	if program && !user {
		return fault.New(fault.Invalid, "selector_too_weak",
			"unix:path and unix:sha256 are no boundary by themselves: anybody can run that program; add the user's unix:uid:N")
	}
	return nil
}

func invalidID(rule string) error {
	return fault.New(fault.Invalid, "spiffe_id_invalid", rule)
}

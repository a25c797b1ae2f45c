package registry

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/store"
)

// JoinToken is the attestor of agents that came with a join token.
const JoinToken = agentv1.AttestorJoinToken

// Agent is an attested node. Serials are lower-case hex, keys the hex SHA-256
// of the SubjectPublicKeyInfo.
//
// A certificate that was signed for the agent is pending until it is first
// used: then it is the active one, and the active one before it is void.
type Agent struct {
	ID        spiffeid.ID
	Attestor  string
	Selectors selector.Set

	ActiveSerial string // empty until the first SVID is used
	ActiveKey    string
	NotAfter     time.Time
	Authority    string // ID of the root that the active one chains to

	PendingSerial    string
	PendingKey       string
	PendingNotAfter  time.Time
	PendingAuthority string

	// Evidence names what the agent last attested by, where that may be used
	// with one key only; EvidenceKey is that key.
	Evidence, EvidenceKey string

	Banned      bool
	CanReattest bool
	AttestedAt  time.Time
	// Version is what the agent says that it is; not in the record.
	Version string
}

// Ends is when the last SVID ends that the agent may act under.
func (a *Agent) Ends() time.Time {
	if a.PendingNotAfter.After(a.NotAfter) {
		return a.PendingNotAfter
	}
	return a.NotAfter
}

// Agent returns the agent with this ID.
func (r *Registry) Agent(id spiffeid.ID) (Agent, bool) {
	it, ok := r.mirror.agent(id)
	if !ok {
		return Agent{}, false
	}
	a := it.Agent
	a.Version = r.fleet.version(id)
	return a, true
}

// Agents returns all agents, sorted by ID.
func (r *Registry) Agents() []Agent {
	list := r.mirror.allAgents()
	for i := range list {
		list[i].Version = r.fleet.version(list[i].ID)
	}
	return list
}

func (m *mirror) allAgents() []Agent {
	m.mu.RLock()
	list := make([]Agent, 0, len(m.agents))
	for _, a := range m.agents {
		list = append(list, a.Agent)
	}
	m.mu.RUnlock()
	slices.SortFunc(list, func(a, b Agent) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return list
}

// Shown is the certificate that an agent shows. It has been verified.
type Shown struct {
	Serial              string
	KeyHash             string // SHA-256 of the SubjectPublicKeyInfo, hex
	NotBefore, NotAfter time.Time
	Authority           string // ID of the root that it chains to
}

// CheckAgent says whether the agent that shows this certificate may be served.
// It looks into memory only. A pending serial passes, and one that is to be
// adopted; whoever serves the agent calls UseSerial.
func (r *Registry) CheckAgent(id spiffeid.ID, shown Shown) error {
	a, ok := r.mirror.agent(id)
	if !ok {
		return agentUnknown()
	}
	return r.admits(&a.Agent, shown)
}

// admits says whether the agent of a record may act under a certificate.
func (r *Registry) admits(a *Agent, shown Shown) error {
	switch {
	case a.Banned:
		return agentBanned()
	case shown.Serial == "":
		return notActive()
	case shown.Serial == a.ActiveSerial || shown.Serial == a.PendingSerial:
		return nil
	}
	return r.adoptable(a, shown)
}

// UseSerial notes that the agent used this certificate. The first use of the
// pending one, or of one that is adopted, makes it the active one; the one
// before is void when UseSerial returns. It says whether one was adopted.
func (r *Registry) UseSerial(ctx context.Context, id spiffeid.ID, shown Shown) (adopted bool, err error) {
	if err := r.CheckAgent(id, shown); err != nil {
		return false, err
	}
	if a, ok := r.mirror.agent(id); ok && shown.Serial == a.ActiveSerial {
		return false, nil
	}
	err = r.changeAgent(ctx, id, func(a *Agent) error {
		adopted = false // a try before this one may have lost
		switch err := r.admits(a, shown); {
		case err != nil:
			return err
		case shown.Serial == a.ActiveSerial:
			return errNothingToDo
		case shown.Serial == a.PendingSerial:
			a.ActiveSerial, a.ActiveKey, a.NotAfter, a.Authority = a.PendingSerial, a.PendingKey, a.PendingNotAfter, a.PendingAuthority
		default:
			adopted = true
			a.ActiveSerial, a.ActiveKey, a.NotAfter, a.Authority = shown.Serial, shown.KeyHash, wall(shown.NotAfter), shown.Authority
		}
		a.PendingSerial, a.PendingKey, a.PendingNotAfter, a.PendingAuthority = "", "", time.Time{}, ""
		return nil
	})
	return adopted && err == nil, err
}

// Issued is a certificate that was signed for an agent.
type Issued struct {
	// Under is the serial of the certificate that asked for it; empty if an
	// attestation did.
	Under    string
	Serial   string
	KeyHash  string
	NotAfter time.Time
	// Authority is the ID of the root that it chains to.
	Authority string
}

// RecordAttested makes the record of an agent that may attest any number of
// times, or brings it up to date. Which certificate is the agent's is not
// touched: the present one is void from the first use of the one that is signed
// next for the key whose hash is keyHash. A banned agent stays banned.
//
// evidence, if it is not empty, names what the agent attested by and serves one
// key only, such as a token: it is refused with another key, since it was
// copied then.
func (r *Registry) RecordAttested(ctx context.Context, id spiffeid.ID, attestor string, selectors selector.Set, keyHash, evidence string) error {
	if err := r.CheckKey(id, keyHash); err != nil {
		return err
	}
	if len(selectors) > 0 {
		if err := checkSelectors(selectors); err != nil {
			return err
		}
	}
	for range conflictRetries {
		a, stored, err := r.storedAgent(ctx, id)
		if errors.Is(err, fault.NotFound) {
			a, stored = Agent{ID: id}, 0
		} else if err != nil {
			return err
		}
		switch {
		case a.Banned:
			return agentBanned()
		case evidence != "" && evidence == a.Evidence && keyHash != a.EvidenceKey:
			return fault.New(fault.Denied, "evidence_used", "this evidence was used with another key before")
		}
		a.Attestor, a.Selectors, a.CanReattest, a.AttestedAt = attestor, selectors, true, wall(time.Now())
		a.Evidence, a.EvidenceKey = "", ""
		if evidence != "" {
			a.Evidence, a.EvidenceKey = evidence, keyHash
		}
		value, err := encodeAgent(&a)
		if err != nil {
			return err
		}
		revision, err := r.commit(ctx,
			[]store.Precondition{{Key: agentKey(id), Revision: stored}},
			[]store.Write{{Key: agentKey(id), Value: value}})
		if err == nil {
			return r.applied(ctx, revision)
		}
		if !errors.Is(err, fault.Conflict) {
			return err
		}
	}
	return agentBusy()
}

// RecordIssued notes a certificate that was signed for the agent. It becomes
// the pending one; a pending one before it, never used, is void. What was asked
// for under a certificate that has been replaced meanwhile is refused: a
// request under way does not outlive the right to it.
func (r *Registry) RecordIssued(ctx context.Context, id spiffeid.ID, cert Issued) error {
	if cert.Serial == "" || cert.KeyHash == "" {
		return errors.New("record issued: serial or key is missing")
	}
	return r.changeAgent(ctx, id, func(a *Agent) error {
		switch {
		case a.Banned:
			return agentBanned()
		case cert.Under != "" && cert.Under != a.ActiveSerial:
			return notActive()
		}
		a.PendingSerial, a.PendingKey, a.PendingNotAfter, a.PendingAuthority = cert.Serial, cert.KeyHash, wall(cert.NotAfter), cert.Authority
		return nil
	})
}

// Ban keeps the agent from everything that agents may do, on every road, until
// it is evicted. A ban of a banned agent changes nothing.
func (r *Registry) Ban(ctx context.Context, id spiffeid.ID) error {
	return toOperator(r.changeAgent(ctx, id, func(a *Agent) error {
		if a.Banned {
			return errNothingToDo
		}
		a.Banned = true
		return nil
	}))
}

// Evict removes the agent's record, and with it a ban: the agent has to attest
// anew. Its entries stay, for one that comes back under the same ID.
func (r *Registry) Evict(ctx context.Context, id spiffeid.ID) error {
	for range conflictRetries {
		_, stored, err := r.storedAgent(ctx, id)
		if errors.Is(err, fault.NotFound) {
			return toOperator(agentUnknown())
		}
		if err != nil {
			return err
		}
		revision, err := r.commit(ctx,
			[]store.Precondition{{Key: agentKey(id), Revision: stored}},
			[]store.Write{{Key: agentKey(id), Delete: true}})
		if err == nil {
			return r.applied(ctx, revision)
		}
		if !errors.Is(err, fault.Conflict) {
			return err
		}
	}
	return agentBusy()
}

// toOperator words the lack of a record for somebody who is not that agent.
func toOperator(err error) error {
	if fault.ReasonOf(err) == agentv1.ReasonAgentUnknown {
		return fault.New(fault.NotFound, agentv1.ReasonAgentUnknown, "no agent has this ID; see assay agent list")
	}
	return err
}

var errNothingToDo = errors.New("nothing to do")

// changeAgent commits what change does to the record as the store has it, and
// waits for the mirror. change may be called more than once.
func (r *Registry) changeAgent(ctx context.Context, id spiffeid.ID, change func(*Agent) error) error {
	for range conflictRetries {
		a, stored, err := r.storedAgent(ctx, id)
		if errors.Is(err, fault.NotFound) {
			return agentUnknown()
		}
		if err != nil {
			return err
		}
		if err := change(&a); errors.Is(err, errNothingToDo) {
			return r.WaitRevision(ctx, stored)
		} else if err != nil {
			return err
		}
		value, err := encodeAgent(&a)
		if err != nil {
			return err
		}
		revision, err := r.commit(ctx,
			[]store.Precondition{{Key: agentKey(id), Revision: stored}},
			[]store.Write{{Key: agentKey(id), Value: value}})
		if err == nil {
			return r.applied(ctx, revision)
		}
		if !errors.Is(err, fault.Conflict) {
			return err
		}
	}
	return agentBusy()
}

func agentBusy() error {
	return fault.New(fault.Conflict, "agent_busy", "the agent's record is being changed by others; ask again")
}

// storedAgent reads an agent from the store, with the revision of its record.
func (r *Registry) storedAgent(ctx context.Context, id spiffeid.ID) (Agent, int64, error) {
	rec, err := r.get(ctx, agentKey(id))
	if err != nil {
		return Agent{}, 0, fmt.Errorf("read agent: %w", err)
	}
	a, err := r.decodeAgent(rec)
	return a, rec.Revision, err
}

// Rejoinable says whether the agent may come back at now with the key whose
// hash is keyHash, its SVID having ended. Whoever asks has verified that the
// caller holds the key. The refusal tells nothing about the reason.
//
// The key is one that was last certified for the agent: the active one or, as
// an agent that renewed with a new key may have gone down before its first
// use, the pending one.
func (r *Registry) Rejoinable(id spiffeid.ID, keyHash string, now time.Time) error {
	a, ok := r.mirror.agent(id)
	if !ok || a.Banned || a.Attestor != JoinToken || r.rejoinWindow == 0 || keyHash == "" {
		return rejoinRefused()
	}
	until := time.Time{}
	if keyHash == a.ActiveKey {
		until = a.NotAfter
	}
	if keyHash == a.PendingKey && a.PendingNotAfter.After(until) {
		until = a.PendingNotAfter
	}
	if until.IsZero() || now.After(until.Add(r.rejoinWindow)) {
		return rejoinRefused()
	}
	return nil
}

func agentUnknown() error {
	return fault.New(fault.Denied, agentv1.ReasonAgentUnknown, "the server has no record of this agent; attest anew")
}

func agentBanned() error {
	return fault.New(fault.Denied, agentv1.ReasonAgentBanned, "this agent is banned; an operator has to evict it before it can attest anew")
}

func notActive() error {
	return fault.New(fault.Denied, agentv1.ReasonAgentSVIDNotActive,
		"this certificate was replaced by a newer one; if the agent does not have the newer one, its key may be in other hands")
}

func rejoinRefused() error {
	return fault.New(fault.Denied, "rejoin_refused", "the agent can't come back with its old key; attest with a new join token")
}

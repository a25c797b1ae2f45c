package registry

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	"github.com/seed-caa81108/assay/server/store"
)

// Lifetimes of join tokens.
const (
	DefaultTokenTTL = 10 * time.Minute
	MinTokenTTL     = time.Second
	MaxTokenTTL     = 24 * time.Hour
	// maxRetryWindow bounds how long a token answers the key that redeemed it.
	maxRetryWindow = 10 * time.Minute
	maxTokenLength = 256
	minTokenBits   = 128
)

// Token is a join token as its maker sees it, once.
type Token struct {
	Value     string
	AgentID   spiffeid.ID
	ExpiresAt time.Time
	// Alias is the entry that gives the agent the ID that was asked for; its
	// id is empty if none was.
	Alias Entry
}

// LogValue keeps the value out of logs.
func (t Token) LogValue() slog.Value {
	return slog.GroupValue(slog.String("agent_id", t.AgentID.String()), slog.Time("expires_at", t.ExpiresAt))
}

// String keeps the value out of messages.
func (t Token) String() string { return "join token of " + t.AgentID.String() }

// GoString keeps the value out of dumps.
func (t Token) GoString() string { return t.String() }

// tokenHash is all that the store and the agent's name know of a token.
type tokenHash [sha256.Size]byte

func hashToken(value string) tokenHash { return sha256.Sum256([]byte(value)) }

func (h tokenHash) key() string { return tokenPrefix + hex.EncodeToString(h[:]) }

// agentID is the ID of the agent that the token makes. It is built from a
// hash, so no text of a client gets into it.
func (r *Registry) agentID(h tokenHash) (spiffeid.ID, error) {
	id, err := spiffeid.FromPath(r.trustDomain, r.reservedPrefix+"agent/"+JoinToken+"/"+hex.EncodeToString(h[:16]))
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("build agent id: %w", err)
	}
	return id, nil
}

// CreateToken makes a token that one node can join with, within ttl (zero: 10
// minutes). An empty value has one of 260 random bits made; the caller's own
// needs at least 128 bits, by its length and alphabet, and must be new.
func (r *Registry) CreateToken(ctx context.Context, value string, ttl time.Duration) (Token, error) {
	return r.CreateTokenWithAlias(ctx, value, ttl, spiffeid.ID{})
}

// CreateTokenWithAlias is CreateToken and, unless alias is zero, makes with the
// token, in one commit, the entry that gives its agent this ID as an alias.
func (r *Registry) CreateTokenWithAlias(ctx context.Context, value string, ttl time.Duration, alias spiffeid.ID) (Token, error) {
	t, h, err := r.newToken(value, ttl)
	if err != nil {
		return Token{}, err
	}
	record, err := store.Encode(schema, tokenRecord{ExpiresAt: millis(t.ExpiresAt)})
	if err != nil {
		return Token{}, fmt.Errorf("encode token: %w", err)
	}
	ifs := []store.Precondition{{Key: h.key()}, {Key: agentKey(t.AgentID)}}
	writes := []store.Write{{Key: h.key(), Value: record}}
	if !alias.IsZero() {
		d, err := r.draft(Entry{SPIFFEID: alias, ParentID: t.AgentID, Selectors: selector.Set{ownSelector(t.AgentID)}}, time.Now(), nil)
		if err != nil {
			return Token{}, err
		}
		if err := d.commit(&ifs, &writes); err != nil {
			return Token{}, err
		}
		t.Alias = d.entry
	}
	revision, err := r.commit(ctx, ifs, writes)
	if errors.Is(err, fault.Conflict) {
		return Token{}, fault.New(fault.Exists, "token_exists",
			"this token, or the entry for its agent's alias, is there already; choose another token, or leave it out to have one made")
	}
	if err != nil {
		return Token{}, err
	}
	return t, r.applied(ctx, revision)
}

// newToken makes a token that is not in the store yet.
func (r *Registry) newToken(value string, ttl time.Duration) (Token, tokenHash, error) {
	if ttl == 0 {
		ttl = DefaultTokenTTL
	}
	if ttl < MinTokenTTL || ttl > MaxTokenTTL {
		return Token{}, tokenHash{}, fault.Newf(fault.Invalid, "token_ttl_out_of_range",
			"a join token lives between %v and %v", MinTokenTTL, MaxTokenTTL)
	}
	if value == "" {
		value = strings.ToLower(rand.Text() + rand.Text())
	} else if err := checkTokenValue(value); err != nil {
		return Token{}, tokenHash{}, err
	}
	h := hashToken(value)
	id, err := r.agentID(h)
	return Token{Value: value, AgentID: id, ExpiresAt: wall(time.Now().Add(ttl))}, h, err
}

// checkTokenValue estimates how many random bits a chosen token can hold: its
// length times the bits of its alphabet. So 32 hex digits pass (a UUID does),
// 22 characters of base64 do, 22 hex digits don't. It can't see a token that
// is long and not random, only the plainest: fewer than 8 different characters.
func checkTokenValue(value string) error {
	var lowers, uppers, digits, beyondHex, others int
	different := map[rune]bool{}
	for _, c := range value {
		different[c] = true
		switch {
		case c >= 'a' && c <= 'z':
			lowers++
			if c > 'f' {
				beyondHex++
			}
		case c >= 'A' && c <= 'Z':
			uppers++
			if c > 'F' {
				beyondHex++
			}
		case c >= '0' && c <= '9':
			digits++
		case strings.ContainsRune("-_+/=.", c):
			others++
		default:
			return fault.New(fault.Invalid, "token_malformed", "a join token has only letters, digits and -_+/=.")
		}
	}
	oneCase := lowers == 0 || uppers == 0
	bits := 0.0
	switch {
	case lowers+uppers == 0:
		bits = float64(digits) * math.Log2(10)
	case oneCase && beyondHex == 0:
		bits = float64(lowers+uppers+digits) * 4
	case oneCase:
		bits = float64(lowers+uppers+digits) * 5
	default:
		bits = float64(lowers+uppers+digits+others) * 6
	}
	if bits < minTokenBits || len(different) < 8 || len(value) > maxTokenLength {
		return fault.Newf(fault.Invalid, "token_weak",
			"a join token needs %d random bits, as in 32 hex digits or 22 characters of base64, and at most %d characters; leave it out to have one made",
			minTokenBits, maxTokenLength)
	}
	return nil
}

// RedeemToken joins the node that holds the token and the key whose hash is
// keyHash, and returns its agent ID. The token is used up in the commit that
// makes the agent's record. The key that redeemed it gets the same answer
// again, as its first answer may have been lost, until its SVID is first used
// and for at most 10 minutes or the rejoin window.
//
// Every bad token gets the same answer after the same steps, whatever is wrong
// with it: hash, look up, compare.
func (r *Registry) RedeemToken(ctx context.Context, value, keyHash string) (spiffeid.ID, error) {
	id, result, err := r.redeem(ctx, hashToken(value), keyHash)
	r.metrics.redeemed.WithLabelValues(result).Inc()
	return id, err
}

// The values of the label result.
const (
	redeemedOK      = "ok"
	redeemedAgain   = "repeated"
	redeemedInvalid = "invalid"
	redeemedBanned  = "banned"
	redeemedFailed  = "failed"
)

func (r *Registry) redeem(ctx context.Context, h tokenHash, keyHash string) (spiffeid.ID, string, error) {
	if keyHash == "" {
		return spiffeid.ID{}, redeemedFailed, errors.New("redeem token: the key is missing")
	}
	id, err := r.agentID(h)
	if err != nil {
		return spiffeid.ID{}, redeemedFailed, err
	}
	for range conflictRetries {
		state, err := r.tokenState(ctx, h, id)
		if err != nil {
			return spiffeid.ID{}, redeemedFailed, err
		}
		result := r.judge(state, keyHash, time.Now())
		switch result {
		case redeemedInvalid:
			return spiffeid.ID{}, result, tokenInvalid()
		case redeemedBanned:
			return spiffeid.ID{}, result, agentBanned()
		}
		// Before the token is used up; who has a token that is worth nothing
		// does not learn anything about keys.
		if err := r.CheckKey(id, keyHash); err != nil {
			return spiffeid.ID{}, redeemedFailed, err
		}
		switch result {
		case redeemedAgain:
			if err := r.WaitRevision(ctx, state.agentStored); err != nil {
				return spiffeid.ID{}, redeemedFailed, err
			}
			return id, result, nil
		}
		revision, err := r.commitRedemption(ctx, h, id, state, keyHash)
		if errors.Is(err, fault.Conflict) {
			continue
		}
		if err == nil {
			err = r.applied(ctx, revision)
		}
		if err != nil {
			return spiffeid.ID{}, redeemedFailed, err
		}
		return id, redeemedOK, nil
	}
	return spiffeid.ID{}, redeemedFailed, fault.New(fault.Conflict, "token_busy", "the token is being redeemed by others; ask again")
}

// tokenState is what the store has for a token and for its agent.
type tokenState struct {
	found       bool
	token       tokenRecord
	stored      int64
	agentFound  bool
	agent       Agent
	agentStored int64
}

func (r *Registry) tokenState(ctx context.Context, h tokenHash, id spiffeid.ID) (tokenState, error) {
	var s tokenState
	rec, err := r.get(ctx, h.key())
	if err != nil && !errors.Is(err, fault.NotFound) {
		return s, fmt.Errorf("read a join token: %w", err)
	}
	if s.found = err == nil; s.found {
		s.stored = rec.Revision
		if s.token, err = decodeToken(rec); err != nil {
			return s, err
		}
	}
	s.agent, s.agentStored, err = r.storedAgent(ctx, id)
	if err != nil && !errors.Is(err, fault.NotFound) {
		return s, err
	}
	s.agentFound = err == nil
	return s, nil
}

// judge decides what a token is worth to the holder of a key. It is pure.
func (r *Registry) judge(s tokenState, keyHash string, now time.Time) string {
	sameKey := subtle.ConstantTimeCompare([]byte(s.token.RedeemedBy), []byte(keyHash)) == 1
	retryUntil := fromMillis(s.token.RedeemedAt).Add(r.retryWindow())
	switch {
	case !s.found:
		return redeemedInvalid
	case s.token.RedeemedAt == 0 && !now.Before(fromMillis(s.token.ExpiresAt)):
		return redeemedInvalid
	case s.token.RedeemedAt == 0 && s.agentFound && s.agent.Banned:
		return redeemedBanned
	case s.token.RedeemedAt == 0 && s.agentFound:
		return redeemedInvalid // the agent is somebody's already
	case s.token.RedeemedAt == 0:
		return redeemedOK
	case !sameKey || !s.agentFound || now.After(retryUntil):
		return redeemedInvalid
	case s.agent.Banned:
		return redeemedBanned
	case s.agent.ActiveSerial != "":
		return redeemedInvalid
	}
	return redeemedAgain
}

func (r *Registry) retryWindow() time.Duration { return min(maxRetryWindow, r.rejoinWindow) }

// commitRedemption uses the token up and makes its agent, or does neither.
func (r *Registry) commitRedemption(ctx context.Context, h tokenHash, id spiffeid.ID, s tokenState, keyHash string) (int64, error) {
	now := wall(time.Now())
	s.token.RedeemedAt, s.token.RedeemedBy = millis(now), keyHash
	token, err := store.Encode(schema, s.token)
	if err != nil {
		return 0, fmt.Errorf("encode token: %w", err)
	}
	agent, err := encodeAgent(&Agent{ID: id, Attestor: JoinToken, AttestedAt: now})
	if err != nil {
		return 0, err
	}
	failpoint.Hit("redeem_before")
	revision, err := r.commit(ctx,
		[]store.Precondition{{Key: h.key(), Revision: s.stored}, {Key: agentKey(id)}},
		[]store.Write{{Key: h.key(), Value: token}, {Key: agentKey(id), Value: agent}})
	if err == nil {
		failpoint.Hit("redeem_after")
	}
	return revision, err
}

func tokenInvalid() error {
	return fault.New(fault.Denied, "join_token_invalid", "the join token is not valid; ask an operator for a new one")
}

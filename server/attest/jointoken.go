package attest

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// tokenRedeemer uses up the right to join that a token gives.
type tokenRedeemer interface {
	RedeemToken(ctx context.Context, value, keyHash string) (spiffeid.ID, error)
}

// JoinToken attests a node by a one-time token. The payload is the token.
type JoinToken struct{ tokens tokenRedeemer }

// NewJoinToken returns the attestor "join_token".
func NewJoinToken(tokens tokenRedeemer) *JoinToken { return &JoinToken{tokens: tokens} }

// Attest redeems the token for the key that is to be certified. Whatever the
// payload is, it goes to the records as it is, so that nothing but they can
// tell one bad token from another.
func (j *JoinToken) Attest(ctx context.Context, e Evidence, _ func(context.Context, []byte) ([]byte, error)) (Result, error) {
	key, err := KeyHash(e.PublicKey)
	if err != nil {
		return Result{}, err
	}
	id, err := j.tokens.RedeemToken(ctx, string(e.Payload), key)
	if err != nil {
		return Result{}, err
	}
	return Result{AgentID: id}, nil
}

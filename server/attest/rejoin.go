package attest

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

const (
	// Bounds of the payload's parts: an ECDSA key and signature of any curve
	// that an agent may have are far below.
	maxRejoinKey       = 256
	maxRejoinSignature = 160
	maxAgentID         = 2048
)

// rejoinRecords says whether an agent on record may come back with a key.
type rejoinRecords interface {
	Rejoinable(id spiffeid.ID, keyHash string, now time.Time) error
}

// Rejoin attests an agent whose SVID ended by the key that was last certified
// for it. The payload is an agentv1.RejoinPayload: the agent's ID, the key,
// and a signature by it over material that both ends export from the TLS
// connection, so that it is worth nothing on any other connection.
type Rejoin struct{ records rejoinRecords }

// NewRejoin returns the attestor "rejoin".
func NewRejoin(records rejoinRecords) *Rejoin { return &Rejoin{records: records} }

// Attest checks the signature under the key that was sent, then that this key
// is the one on record. Each refusal is the same; its cause is for our log.
func (r *Rejoin) Attest(ctx context.Context, e Evidence, _ func(context.Context, []byte) ([]byte, error)) (Result, error) {
	var p agentv1.RejoinPayload
	if err := decode(e.Payload, &p); err != nil {
		return Result{}, refused(err)
	}
	if len(p.GetAgentId()) > maxAgentID || len(p.GetPublicKey()) > maxRejoinKey || len(p.GetSignature()) > maxRejoinSignature {
		return Result{}, refused(errors.New("read payload: too long"))
	}
	id, err := name.ParseID(p.GetAgentId())
	if err != nil {
		return Result{}, refused(fmt.Errorf("read agent id: %w", err))
	}
	if err := verifyPossession(e, &p); err != nil {
		return Result{}, err
	}
	if err := r.records.Rejoinable(id, spkiHash(p.GetPublicKey()), time.Now()); err != nil {
		if errors.Is(err, fault.Denied) {
			return Result{}, refused(err)
		}
		return Result{}, fmt.Errorf("look up agent: %w", err)
	}
	return Result{AgentID: id, CanReattest: true}, nil
}

// verifyPossession checks that who holds this end of the connection holds the
// key: ECDSA over SHA-256 of the exported material (RFC 9266 is the model).
func verifyPossession(e Evidence, p *agentv1.RejoinPayload) error {
	parsed, err := x509.ParsePKIXPublicKey(p.GetPublicKey())
	if err != nil {
		return refused(fmt.Errorf("read public key: %w", err))
	}
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok {
		return refused(errors.New("read public key: not ECDSA"))
	}
	material, err := e.Export(agentv1.RejoinExporterLabel, []byte(p.GetAgentId()), agentv1.RejoinExporterLength)
	if err != nil {
		return fmt.Errorf("export keying material: %w", err)
	}
	digest := sha256.Sum256(material)
	if !ecdsa.VerifyASN1(key, digest[:], p.GetSignature()) {
		return refused(errors.New("verify signature: it is not by this key over this connection"))
	}
	return nil
}

func refused(cause error) error {
	return fault.Wrap(fault.Denied, cause, "rejoin_refused", "the agent can't come back with its old key; attest with a new join token")
}

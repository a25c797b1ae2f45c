package attest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// nodeRecords keeps who attested by which attestor. It refuses a banned agent.
type nodeRecords interface {
	RecordAttested(ctx context.Context, id spiffeid.ID, attestor string, selectors selector.Set, keyHash, evidence string) error
}

// X509PopConfig is what an X509Pop needs.
type X509PopConfig struct {
	TrustDomain spiffeid.TrustDomain
	// ReservedPrefix is "/assay/" or "/spire/".
	ReservedPrefix string
	// Roots are the authorities whose certificates make a node.
	Roots   []*x509.Certificate
	Records nodeRecords
}

// X509Pop attests a node by a certificate of another authority and a signature
// with its key. The payload is an agentv1.X509PopPayload.
type X509Pop struct {
	cfg   X509PopConfig
	roots *x509.CertPool
}

// NewX509Pop returns the attestor "x509pop".
func NewX509Pop(cfg X509PopConfig) *X509Pop {
	pool := x509.NewCertPool()
	for _, c := range cfg.Roots {
		pool.AddCert(c)
	}
	return &X509Pop{cfg: cfg, roots: pool}
}

// Attest does the cheap before the dear: bounds, form, chain of trust, then the
// challenge and its signature, and only then the record. The same certificate
// may attest at any time, and whoever did so last is the agent from the first
// use of what was signed for it on. All refusals look alike but two: bytes that
// can be read in two ways, and the ban of an agent that has proved to be that.
func (x *X509Pop) Attest(ctx context.Context, e Evidence, ask func(context.Context, []byte) ([]byte, error)) (Result, error) {
	var p agentv1.X509PopPayload
	if err := readOnce(e.Payload, &p); err != nil {
		return Result{}, err
	}
	chain, err := parseChain(p.GetCertificates())
	if err != nil {
		return Result{}, popRefused(err)
	}
	verified, err := verifyChain(chain, x.roots, time.Now())
	if err != nil {
		return Result{}, popRefused(err)
	}
	leaf := chain[0]
	if err := checkNoSVID(x.cfg.TrustDomain, leaf); err != nil {
		return Result{}, popRefused(err)
	}
	selectors, err := popSelectors(x.cfg.TrustDomain, leaf, verified)
	if err != nil {
		return Result{}, popRefused(err)
	}
	if err := challenge(ctx, leaf, e, ask); err != nil {
		return Result{}, err
	}
	key, err := KeyHash(e.PublicKey)
	if err != nil {
		return Result{}, err
	}
	id, err := spiffeid.FromPath(x.cfg.TrustDomain, x.cfg.ReservedPrefix+"agent/"+agentv1.AttestorX509Pop+"/"+fingerprint(leaf))
	if err != nil {
		return Result{}, fmt.Errorf("build agent id: %w", err)
	}
	// From here on the caller is that node, whatever becomes of it.
	result := Result{AgentID: id, Selectors: selectors, CanReattest: true}
	return result, x.cfg.Records.RecordAttested(ctx, id, agentv1.AttestorX509Pop, selectors, key, "")
}

// challenge has the holder of this end of the connection prove that it holds
// the leaf's key. What is signed comes from the connection, from a nonce of
// ours, from the certificate and from the key that is to be certified, so the
// signature is worth nothing anywhere else.
func challenge(ctx context.Context, leaf *x509.Certificate, e Evidence, ask func(context.Context, []byte) ([]byte, error)) error {
	nonce := make([]byte, agentv1.X509PopNonceLength)
	if _, err := rand.Read(nonce); err != nil {
		return fmt.Errorf("read random bytes: %w", err)
	}
	question, err := proto.Marshal(&agentv1.X509PopChallenge{Nonce: nonce})
	if err != nil {
		return fmt.Errorf("encode challenge: %w", err)
	}
	answer, err := ask(ctx, question)
	if err != nil {
		return err
	}
	var response agentv1.X509PopResponse
	if err := readOnce(answer, &response); err != nil {
		return err
	}
	exported, err := e.Export(agentv1.X509PopExporterLabel, nonce, agentv1.X509PopExporterLength)
	if err != nil {
		return fmt.Errorf("export keying material: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(e.PublicKey)
	if err != nil {
		return fmt.Errorf("encode public key: %w", err)
	}
	message := agentv1.X509PopMessage(exported, leaf.Raw, spki)
	if !verifySignature(leaf.PublicKey, message, response.GetSignature()) {
		return popRefused(because("possession_unproven", "the signature is not by the certificate's key over this attestation"))
	}
	return nil
}

// verifySignature is the counterpart of agentv1.X509PopResponse. The key is
// one that checkKey lets through, which bounds the length of the signature.
func verifySignature(key crypto.PublicKey, message, signature []byte) bool {
	hash := agentv1.X509PopHash(key)
	digest := message
	if hash != 0 {
		h := hash.New()
		h.Write(message)
		digest = h.Sum(nil)
	}
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, digest, signature)
	case *rsa.PublicKey:
		return rsa.VerifyPSS(key, hash, digest, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
	case ed25519.PublicKey:
		return ed25519.Verify(key, digest, signature)
	}
	return false
}

// readOnce reads a message of the node's. That its form is wrong says nothing
// that the sender does not know.
func readOnce(data []byte, into proto.Message) error {
	err := decode(data, into)
	if errors.Is(err, errAmbiguous) {
		return fault.Wrap(fault.Invalid, err, "payload_ambiguous", "the attestation has a field twice, or one that this server does not know: upgrade the server, or the agent")
	}
	if err != nil {
		return fault.Wrap(fault.Invalid, err, "payload_malformed", "the attestation can't be read")
	}
	return nil
}

func popRefused(cause error) error {
	return fault.Wrap(fault.Denied, cause, "x509pop_refused", "the server does not take this node's certificate; its log says why")
}

package node

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

const maxToken = 4 << 10

// ensureIdentity returns an identity that has not ended and that the server
// did not disown, attesting until there is one.
func (n *Node) ensureIdentity(ctx context.Context) (state.Identity, error) {
	live := func() (state.Identity, bool) {
		id, ok := n.state.Identity()
		return id, ok && !n.disowned && n.clock.Now().Before(id.NotAfter())
	}
	if id, ok := live(); ok {
		return id, nil
	}
	err := n.retry(ctx, "attest", "", n.attest)
	if err != nil {
		return state.Identity{}, err
	}
	n.disowned = false
	id, ok := live()
	if !ok {
		return state.Identity{}, fault.New(fault.NotReady, "clock_skew", "the certificate that the server just gave has ended by this machine's clock: set the clock")
	}
	return id, nil
}

// attest proves the node by its certificate or its pod's token, if it has one.
// Otherwise it tries the ways in that are open, in order: the key of the identity that ended, then
// a join token that it did not use before.
func (n *Node) attest(ctx context.Context) error {
	if n.cfg.X509Pop.isSet() {
		err := n.joinByCertificate(ctx)
		n.metrics.attempt("x509pop", err)
		return err
	}
	if n.cfg.K8SPsat.isSet() {
		err := n.joinByPod(ctx)
		n.metrics.attempt("k8s_psat", err)
		return err
	}
	id, known := n.state.Identity()
	var rejoinErr error
	if known {
		rejoinErr = n.rejoin(ctx, id)
		n.metrics.attempt("rejoin", rejoinErr)
		if rejoinErr == nil || !refused(rejoinErr) || isBan(rejoinErr) {
			return rejoinErr
		}
	}
	token, err := n.readToken()
	if err == nil && known && tokenHash(token) == id.TokenHash {
		err = fault.New(fault.Denied, "join_token_used", "the token in join_token_file is the one that this agent used before: make a new one with `assay token create`")
	}
	switch {
	case err != nil && known:
		return fmt.Errorf("%w; and no way in besides: %w", rejoinErr, err)
	case err != nil:
		return err
	case known:
		n.log.WarnContext(ctx, "the server refused to take this agent back, trying the join token", slog.String("reason", fault.ReasonOf(rejoinErr)))
	}
	err = n.join(ctx, token)
	n.metrics.attempt("join_token", err)
	return err
}

// refused tells a server's no from a server that can't be asked.
func refused(err error) bool {
	switch fault.KindOf(err) {
	case fault.Denied, fault.Unauthenticated, fault.NotFound, fault.Invalid, fault.Precondition, fault.Unimplemented:
		return true
	}
	return false
}

func (n *Node) readToken() (string, error) {
	if n.cfg.JoinTokenFile == "" {
		return "", fault.New(fault.Precondition, "join_token_missing", "no join_token_file is configured: set one and put a token from `assay token create` into it")
	}
	data, err := durable.ReadSecret(n.cfg.JoinTokenFile, maxToken)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fault.Wrap(fault.Precondition, err, "join_token_missing", "put a token from `assay token create` into "+n.cfg.JoinTokenFile)
	}
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return "", fault.New(fault.Precondition, "join_token_missing", n.cfg.JoinTokenFile+" is empty: put a token from `assay token create` into it")
	}
	return token, nil
}

func tokenHash(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

func (n *Node) join(ctx context.Context, token string) error {
	return n.attestBy(ctx, evidence{
		attestor: agentv1.AttestorJoinToken, tokenHash: tokenHash(token),
		payload: func(context.Context) ([]byte, error) { return []byte(token), nil },
	})
}

// rejoin proves possession of the key that the server certified last. If the
// reply to a renewal was lost, that is the pending key.
func (n *Node) rejoin(ctx context.Context, id state.Identity) error {
	keys := []*ecdsa.PrivateKey{id.Key}
	if pending, ok := n.state.PendingKey(); ok {
		keys = append(keys, pending)
	}
	var err error
	for _, key := range keys {
		if err = n.attestBy(ctx, evidence{
			attestor: agentv1.AttestorRejoin, tokenHash: id.TokenHash,
			payload: func(ctx context.Context) ([]byte, error) { return rejoinEvidence(ctx, id, key) },
		}); err == nil || !refused(err) || isBan(err) {
			return err
		}
	}
	return err
}

// connectionOf returns the TLS connection that ctx's stream runs over.
func connectionOf(ctx context.Context) (*tls.ConnectionState, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("find the connection of the stream: no peer")
	}
	state, ok := rpc.PeerConnectionState(p)
	if !ok {
		return nil, errors.New("find the connection of the stream: no TLS")
	}
	return &state, nil
}

// rejoinEvidence signs the keying material of the TLS connection that ctx's
// stream runs over, so that it is worth nothing on any other.
func rejoinEvidence(ctx context.Context, id state.Identity, key *ecdsa.PrivateKey) ([]byte, error) {
	tlsState, err := connectionOf(ctx)
	if err != nil {
		return nil, err
	}
	agentID := id.AgentID.String()
	material, err := tlsState.ExportKeyingMaterial(agentv1.RejoinExporterLabel, []byte(agentID), agentv1.RejoinExporterLength)
	if err != nil {
		return nil, fmt.Errorf("export keying material: %w", err)
	}
	digest := sha256.Sum256(material)
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("sign keying material: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	return proto.Marshal(&agentv1.RejoinPayload{AgentId: agentID, PublicKey: spki, Signature: signature})
}

// evidence is what one attestor asks of a node.
type evidence struct {
	attestor string
	// payload is made for the stream that ctx belongs to.
	payload func(ctx context.Context) ([]byte, error)
	// answer is to the one challenge that there may be; nil for none. key is
	// the one that is to be certified.
	answer func(state *tls.ConnectionState, key *ecdsa.PublicKey, challenge []byte) ([]byte, error)
	// tokenHash goes into the identity.
	tokenHash string
}

// attestBy goes through one attestation. The key is durable before the server
// sees it: a lost reply is asked for again with the same key.
func (n *Node) attestBy(ctx context.Context, by evidence) error {
	key, err := n.state.NextKey()
	if err != nil {
		return err
	}
	csr, err := csrFor(key)
	if err != nil {
		return err
	}
	cc, err := n.dial(n.anonymous())
	if err != nil {
		return err
	}
	defer func() { _ = cc.Close() }()
	ctx, cancel := context.WithTimeout(ctx, 2*callTimeout)
	defer cancel()
	stream, err := agentv1.NewAgentClient(cc).Attest(ctx)
	if err != nil {
		return cc.explain(err)
	}
	identity, err := by.exchange(stream, key, csr)
	if err != nil {
		return n.forgetKey(cc.explain(err))
	}
	b, err := state.BundleFrom(n.cfg.TrustDomain, identity.GetBundle())
	if err != nil {
		return err
	}
	if err := n.state.SaveBundle(b); err != nil {
		return err
	}
	id, err := n.accept(identity, key)
	if err != nil {
		return err
	}
	id.TokenHash = by.tokenHash
	if err := n.save(id); err != nil {
		return err
	}
	n.log.InfoContext(ctx, "attested", slog.String("attestor", by.attestor), slog.String("agent_id", id.AgentID.String()),
		slog.Time("not_after", id.NotAfter()))
	return nil
}

// exchange sends the evidence, answers the challenge if there is one, and
// returns what the server certified. Errors of the stream are gRPC's.
func (by evidence) exchange(stream grpc.BidiStreamingClient[agentv1.AttestRequest, agentv1.AttestResponse], key *ecdsa.PrivateKey, csr []byte) (*agentv1.Identity, error) {
	payload, err := by.payload(stream.Context())
	if err != nil {
		return nil, err
	}
	// If sending fails, receiving says why.
	_ = stream.Send(&agentv1.AttestRequest{Step: &agentv1.AttestRequest_Start_{Start: &agentv1.AttestRequest_Start{
		Attestor: by.attestor, Payload: payload, Csr: csr,
	}}})
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	if challenge, ok := resp.GetStep().(*agentv1.AttestResponse_Challenge); ok && by.answer != nil {
		conn, err := connectionOf(stream.Context())
		if err != nil {
			return nil, err
		}
		answer, err := by.answer(conn, &key.PublicKey, challenge.Challenge)
		if err != nil {
			return nil, err
		}
		_ = stream.Send(&agentv1.AttestRequest{Step: &agentv1.AttestRequest_ChallengeResponse{ChallengeResponse: answer}})
		if resp, err = stream.Recv(); err != nil {
			return nil, err
		}
	}
	if resp.GetIdentity() == nil {
		return nil, fault.Newf(fault.Precondition, "challenge_unexpected", "the server sent a challenge that attestor %s has none of: upgrade the agent", by.attestor)
	}
	return resp.GetIdentity(), nil
}

// forgetKey drops the key of the next CSR if the server knows it as another
// agent's: this data directory is a copy, and the next attempt is with a key
// of its own.
func (n *Node) forgetKey(err error) error {
	if fault.ReasonOf(err) != agentv1.ReasonBindingMismatch {
		return err
	}
	return errors.Join(err, n.state.DropNextKey())
}

// renew has a new key certified over the connection.
func (n *Node) renew(ctx context.Context, conn *Conn, old state.Identity) error {
	key, err := n.state.NextKey()
	if err != nil {
		return err
	}
	csr, err := csrFor(key)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := conn.Client.Renew(ctx, &agentv1.RenewRequest{Csr: csr})
	if err != nil {
		return n.forgetKey(conn.cc.explain(err))
	}
	// The bundle in the reply may be older than what Sync delivered in the
	// meantime; Sync is the one road for bundles of a connected agent.
	id, err := n.accept(resp.GetIdentity(), key)
	if err != nil {
		return err
	}
	if id.AgentID != old.AgentID {
		return fault.New(fault.Precondition, "identity_invalid", "the server renewed another agent's certificate")
	}
	id.TokenHash = old.TokenHash
	return n.save(id)
}

func (n *Node) save(id state.Identity) error {
	if err := n.state.SaveIdentity(id); err != nil {
		return err
	}
	n.metrics.notAfter.Set(float64(id.NotAfter().Unix()))
	return nil
}

// accept checks what the server certified before the agent takes it on.
func (n *Node) accept(from *agentv1.Identity, key *ecdsa.PrivateKey) (state.Identity, error) {
	invalid := func(rule string, cause error) (state.Identity, error) {
		return state.Identity{}, fault.Wrap(fault.Precondition, cause, "identity_invalid", "the server sent a certificate that this agent can't use: "+rule)
	}
	out := state.Identity{Key: key}
	for _, der := range from.GetChain() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return invalid("it can't be parsed", err)
		}
		out.Chain = append(out.Chain, c)
	}
	id, err := rpc.VerifyPeer(out.Chain, n.bundle().Pool(), n.cfg.TrustDomain, n.clock.Now())
	if err != nil {
		return invalid(fault.SafeText(err), err)
	}
	if !key.PublicKey.Equal(out.Chain[0].PublicKey) {
		return invalid("it is for another key", nil)
	}
	if id.String() != from.GetAgentId() || !strings.HasPrefix(id.Path(), n.cfg.ReservedPrefix+"agent/") {
		return invalid("it is not for an agent", nil)
	}
	out.AgentID = id
	return out, nil
}

// csrFor makes a CSR that names nobody: only a key and its proof.
func csrFor(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("make CSR: %w", err)
	}
	return der, nil
}

package api

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/pkg/failpoint"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/attest"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
)

const (
	// stepTimeout is how long a node may take for one message of its own.
	stepTimeout = 10 * time.Second
	// attestTimeout bounds an attestation as a whole.
	attestTimeout = time.Minute
)

// NodeAttestor proves what a node is. ask sends a challenge and returns the
// answer.
type NodeAttestor interface {
	Attest(ctx context.Context, evidence attest.Evidence, ask func(context.Context, []byte) ([]byte, error)) (attest.Result, error)
}

type attestStream = grpc.BidiStreamingServer[agentv1.AttestRequest, agentv1.AttestResponse]

// Attest implements agentv1.AgentServer. Its steps:
//
//  1. The first message names the attestor and brings evidence and a CSR.
//  2. The CSR gives a public key, after proof of possession and if it asks for
//     no name. A bad one is refused before the evidence is looked at, so it
//     can't use up a token.
//  3. The attestor decides, with challenges through the stream if it has any.
//     A right that can be used once is used, and the agent recorded, in one
//     commit of the registry. A key that is another agent's is refused first.
//  4. The authority signs the agent's certificate, which is audited first.
//  5. The registry records its serial and key as pending.
//  6. The attestation itself is audited, granted or refused.
//  7. Only now, with all of it durable, the identity is sent.
func (s *AgentService) Attest(stream attestStream) error {
	ctx, cancel := context.WithTimeout(stream.Context(), attestTimeout)
	defer cancel()
	done, err := s.addresses.begin(rpc.CallerFrom(ctx).Addr, time.Now())
	if err != nil {
		return err // not audited: what a flood is refused with must be cheap
	}
	defer done()
	node := &node{stream: stream, stopping: s.stopping}
	start, err := node.start(ctx)
	if err != nil {
		return err // nothing was presented
	}
	turn := &turn{work: s.work, job: job{kind: attestation, weight: storeWeight}}
	if err := turn.take(ctx); err != nil {
		return err
	}
	defer turn.give()
	node.turn = turn
	line := audit.Line{Origin: origin(ctx), Action: "agent.attest", Why: audit.Why{Rule: s.ruleName(start.GetAttestor())}}
	identity, err := s.attest(ctx, start, node)
	line.Target.AgentID, line.Result = identity.GetAgentId(), result(err)
	if aerr := record(ctx, s.cfg.Audit, line); aerr != nil {
		return aerr
	}
	if err != nil {
		return err
	}
	failpoint.Hit("attest_reply")
	return stream.Send(&agentv1.AttestResponse{Step: &agentv1.AttestResponse_Identity{Identity: identity}})
}

// ruleName is the attestor's name if there is one of that name: nothing that
// a stranger makes up goes into the audit log.
func (s *AgentService) ruleName(attestor string) string {
	if s.cfg.Attestors[attestor] == nil {
		return "unknown_attestor"
	}
	return attestor
}

// attest is steps 2 to 5.
func (s *AgentService) attest(ctx context.Context, start *agentv1.AttestRequest_Start, node *node) (*agentv1.Identity, error) {
	key, err := ca.ParseCSR(start.GetCsr())
	if err != nil {
		return nil, err
	}
	attestor := s.cfg.Attestors[start.GetAttestor()]
	if attestor == nil {
		return nil, fault.New(fault.Invalid, "attestor_unknown", "this server has no node attestor of that name")
	}
	state, ok := rpc.ConnectionState(ctx)
	if !ok {
		return nil, fault.New(fault.Internal, "no_tls_state", "attestation needs TLS")
	}
	granted, err := attestor.Attest(ctx, attest.Evidence{
		Payload: start.GetPayload(), PublicKey: key, Export: state.ExportKeyingMaterial,
	}, node.ask)
	if err != nil && !granted.AgentID.IsZero() {
		return &agentv1.Identity{AgentId: granted.AgentID.String()}, err // who it was is known, for the audit log
	}
	if err != nil {
		return nil, err
	}
	// An attestor is trusted with what a node is, not with which names exist.
	if granted.AgentID.TrustDomain() != s.cfg.TrustDomain || !isUnder(granted.AgentID, s.cfg.ReservedPrefix+"agent/") {
		return nil, fault.New(fault.Internal, "agent_id_invalid", "the attestor named no agent")
	}
	return s.issueAgent(ctx, granted.AgentID, key, "", start.GetAttestor())
}

// node is the other end of an attestation.
type node struct {
	stream   attestStream
	stopping <-chan struct{}
	turn     *turn // at the server's work; nil before the evidence is there
}

// turn is an attestation's place at the server's work, which it gives back while
// it waits for the node.
type turn struct {
	work  *work
	job   job
	leave func()
}

func (t *turn) take(ctx context.Context) (err error) {
	t.leave, err = t.work.enter(ctx, t.job)
	return err
}

func (t *turn) give() {
	if t.leave != nil {
		t.leave()
		t.leave = nil
	}
}

// start receives the first message.
func (n *node) start(ctx context.Context) (*agentv1.AttestRequest_Start, error) {
	msg, err := n.receive(ctx)
	if err != nil {
		return nil, err
	}
	start := msg.GetStart()
	if start == nil {
		return nil, fault.New(fault.Invalid, "attest_order", "the first message of an attestation is its start")
	}
	return start, nil
}

// ask sends a challenge and returns the answer to it.
func (n *node) ask(ctx context.Context, challenge []byte) ([]byte, error) {
	if err := n.stream.Send(&agentv1.AttestResponse{Step: &agentv1.AttestResponse_Challenge{Challenge: challenge}}); err != nil {
		return nil, err
	}
	n.turn.give()
	msg, err := n.receive(ctx)
	if err != nil {
		return nil, err
	}
	if err := n.turn.take(ctx); err != nil {
		return nil, err
	}
	answer, ok := msg.GetStep().(*agentv1.AttestRequest_ChallengeResponse)
	if !ok {
		return nil, fault.New(fault.Invalid, "attest_order", "a challenge is answered by its response")
	}
	return answer.ChallengeResponse, nil
}

// receive waits for one message, but not longer than stepTimeout. When it
// gives up the handler returns, which ends the stream and with it the
// goroutine that still waits.
func (n *node) receive(ctx context.Context) (*agentv1.AttestRequest, error) {
	type received struct {
		msg *agentv1.AttestRequest
		err error
	}
	ch := make(chan received, 1)
	go func() {
		msg, err := n.stream.Recv()
		ch <- received{msg, err}
	}()
	timer := time.NewTimer(stepTimeout)
	defer timer.Stop()
	select {
	case r := <-ch:
		if r.err != nil {
			return nil, fault.Wrap(fault.NotReady, r.err, "attest_interrupted", "the attestation was broken off")
		}
		return r.msg, nil
	case <-timer.C:
		return nil, fault.New(fault.NotReady, "attest_timeout", "the next message of the attestation did not come in time")
	case <-ctx.Done():
		return nil, fault.Wrap(fault.NotReady, ctx.Err(), "attest_timeout", "the attestation took too long or was broken off")
	case <-n.stopping:
		return nil, errStopping()
	}
}

func errStopping() error {
	return fault.New(fault.NotReady, "server_stopping", "the server is stopping: connect again, to another one if there is one")
}

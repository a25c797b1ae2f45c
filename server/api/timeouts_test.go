package api

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// silent is a node that connected and says nothing.
type silent struct {
	attestStream
	ctx context.Context
}

func (s silent) Recv() (*agentv1.AttestRequest, error) { <-s.ctx.Done(); return nil, s.ctx.Err() }

func (silent) Send(*agentv1.AttestResponse) error { return nil }

// NEG-20: half-open attestations don't stay.
func TestSilentNodeIsCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		n := &node{stream: silent{ctx: ctx}, stopping: make(chan struct{}), turn: &turn{work: newWork(), job: job{kind: attestation, weight: 1}}}
		began := time.Now()
		if _, err := n.start(ctx); fault.ReasonOf(err) != "attest_timeout" || time.Since(began) != stepTimeout {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		began = time.Now()
		if _, err := n.ask(ctx, []byte("prove it")); fault.ReasonOf(err) != "attest_timeout" || time.Since(began) != stepTimeout {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		cancel()
	})
}

func TestWaitingForANodeEndsWithTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s := NewAgentService(AgentConfig{AttestRate: 1})
		ends := make(chan error, 2)
		go func() {
			_, err := (&node{stream: silent{ctx: ctx}, stopping: s.stopping}).start(ctx)
			ends <- err
		}()
		go func() {
			_, err := s.hello(nil, nil)
			ends <- err
		}()
		synctest.Wait()
		s.Stop()
		s.Stop() // once is enough, twice is no harm
		for range 2 {
			if err := <-ends; fault.KindOf(err) != fault.NotReady || fault.ReasonOf(err) != "server_stopping" {
				t.Errorf("%v", err)
			}
		}
		cancel()
	})
}

func TestStreamWithoutHelloIsCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		_, err := NewAgentService(AgentConfig{AttestRate: 1}).hello(nil, nil)
		if fault.ReasonOf(err) != "hello_missing" || time.Since(began) != helloTimeout {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}

package api

import (
	"context"
	"crypto"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/registry"
)

// maxRefusalLines bounds what one call can write into the audit log about
// items that were refused; the calls themselves are counted and logged.
const maxRefusalLines = 8

// signing is one item on its way.
type signing struct {
	entry   registry.Entry
	rule    string
	cluster string // of the agent's node; empty: it is in none
	key     crypto.PublicKey
	sum     [16]byte // of key; on a node of a cluster
	err     error
	chain   [][]byte
}

// SignX509 implements agentv1.AgentServer. Which entry an agent may ask for is
// the registry's answer, for each item by itself; the identity is the entry's;
// the CSR gives a key and nothing else. An item that fails takes none of the
// others with it (NEG-21).
func (s *AgentService) SignX509(ctx context.Context, req *agentv1.SignX509Request) (*agentv1.SignX509Response, error) {
	items := req.GetItems()
	if len(items) > s.cfg.SignBatch {
		return nil, fault.Newf(fault.Exhausted, "limit_sign_batch", "a call may have %d items: make smaller batches", s.cfg.SignBatch)
	}
	caller, err := s.admit(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.rates.sign(caller.ID, len(items), time.Now()); err != nil {
		return nil, err
	}
	leave, err := s.work.enter(ctx, signingJob(caller.ID, req))
	if err != nil {
		return nil, err
	}
	defer leave()
	work := make([]signing, len(items))
	parallel(len(items), func(i int) {
		work[i] = s.prepare(caller.ID, items[i])
	})
	if err := s.auditRefusals(ctx, items, work); err != nil {
		return nil, err
	}
	if err := s.sign(ctx, caller.ID, work); err != nil {
		return nil, err
	}
	for _, w := range work {
		if w.err != nil {
			s.cfg.NotSigned.WithLabelValues(fault.ReasonOf(w.err)).Inc()
		}
	}
	return signed(work), nil
}

// signingJob is what a call weighs and how urgent it is.
func signingJob(agent spiffeid.ID, req *agentv1.SignX509Request) job {
	j := job{kind: newSVID, agent: agent, weight: max(1, len(req.GetItems()), proto.Size(req)/bytesPerWeight)}
	if until := moment(req.GetReplacesUntil()); !until.IsZero() {
		j.kind, j.until = svidRenewal, until
	}
	return j
}

// prepare finds the entry of an item and takes the key out of its CSR. A CSR
// that makes a parser panic fails its own item.
func (s *AgentService) prepare(agent spiffeid.ID, item *agentv1.SignX509Request_Item) (w signing) {
	defer func() {
		if p := recover(); p != nil {
			w.err = fault.Wrap(fault.Internal, fmt.Errorf("panic: %v\n%s", p, debug.Stack()), "internal", "internal error; the log of the server has the cause")
			s.cfg.Log.LogAttrs(context.Background(), slog.LevelError, "item could not be prepared", slog.String("error", w.err.Error()))
		}
	}()
	if w.err = s.find(&w, agent, item.GetEntryId()); w.err == nil {
		w.key, w.err = ca.ParseCSR(item.GetCsr())
	}
	if w.err == nil && w.cluster != "" {
		if w.sum, w.err = keySum(w.key); w.err == nil {
			w.err = s.keys.reserve(subject{agent, w.entry.ID, w.entry.Revision}, w.sum, time.Now())
		}
	}
	return w
}

// auditRefusals records who asked for what in vain: an agent that asks for
// entries of others, or for names, may not be what it seems.
func (s *AgentService) auditRefusals(ctx context.Context, items []*agentv1.SignX509Request_Item, work []signing) error {
	var lines []audit.Line
	for i, w := range work {
		if w.err == nil || len(lines) == maxRefusalLines {
			continue
		}
		line := audit.Line{Origin: origin(ctx), Action: "x509_svid.issue", Why: audit.Why{Rule: w.rule}, Result: result(w.err)}
		if w.entry.ID != "" {
			line.Target = audit.Target{SPIFFEID: w.entry.SPIFFEID.String(), EntryID: w.entry.ID, EntryRevision: w.entry.Revision}
		} else if len(items[i].GetEntryId()) <= registry.MaxEntryID {
			line.Target.EntryID = items[i].GetEntryId()
		}
		lines = append(lines, line)
	}
	if len(lines) == 0 {
		return nil
	}
	return record(ctx, s.cfg.Audit, lines...)
}

// sign has the authority sign what was prepared, in one call.
func (s *AgentService) sign(ctx context.Context, agent spiffeid.ID, work []signing) error {
	reqs := make([]ca.X509Request, 0, len(work))
	of := make([]int, 0, len(work))
	for i, w := range work {
		if w.err != nil {
			continue
		}
		of = append(of, i)
		reqs = append(reqs, ca.X509Request{
			Kind: ca.Workload, ID: w.entry.SPIFFEID, PublicKey: w.key, DNSNames: w.entry.DNSNames, TTL: w.entry.X509SVIDTTL, NotAfter: w.entry.ExpiresAt,
			EntryID: w.entry.ID, EntryRevision: w.entry.Revision, Rule: w.rule, Cluster: w.cluster,
		})
	}
	if len(reqs) == 0 {
		return nil
	}
	svids, err := s.cfg.Authority.IssueX509(ctx, origin(ctx), reqs)
	if err != nil {
		return err
	}
	for i, svid := range svids {
		w := &work[of[i]]
		if w.chain, w.err = svid.Chain, svid.Err; w.err == nil && w.cluster != "" {
			s.keys.certified(subject{agent, w.entry.ID, w.entry.Revision}, w.sum, svid.NotAfter)
		}
	}
	return nil
}

func signed(work []signing) *agentv1.SignX509Response {
	resp := &agentv1.SignX509Response{Results: make([]*agentv1.SignX509Response_Result, len(work))}
	for i, w := range work {
		if w.err != nil {
			resp.Results[i] = &agentv1.SignX509Response_Result{Outcome: &agentv1.SignX509Response_Result_Failure{
				Failure: &agentv1.SignX509Response_Failure{
					Code: int32(fault.Code(fault.KindOf(w.err))), Reason: fault.ReasonOf(w.err), Message: fault.SafeText(w.err),
				},
			}}
			continue
		}
		resp.Results[i] = &agentv1.SignX509Response_Result{Outcome: &agentv1.SignX509Response_Result_Chain{
			Chain: &agentv1.SignX509Response_Chain{Certificates: w.chain},
		}}
	}
	return resp
}

// parallel calls do for 0 to n-1 on all cores and returns when all are done.
func parallel(n int, do func(int)) {
	workers := min(n, runtime.GOMAXPROCS(0))
	if workers <= 1 {
		for i := range n {
			do(i)
		}
		return
	}
	var next atomic.Int64
	run := func() {
		for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
			do(i)
		}
	}
	var wg sync.WaitGroup
	for range workers - 1 {
		wg.Go(run)
	}
	run()
	wg.Wait()
}

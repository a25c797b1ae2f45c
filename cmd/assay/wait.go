package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/status"

	"github.com/seed-caa81108/assay/pkg/fault"
	adminv1 "github.com/seed-caa81108/assay/proto/admin/v1"
)

// reachShape is what `wait -o json` prints, also when the time is up. Agents
// counts those that it waits for, 0 without --all-agents; Waiting those of them
// that have not reached the revision, and WaitingAgents names some of these.
type reachShape struct {
	Revision       int64          `json:"revision"`
	ServerRevision int64          `json:"server_revision"`
	Reached        bool           `json:"reached"`
	Agents         uint32         `json:"agents"`
	Waiting        uint32         `json:"waiting"`
	WaitingAgents  []waitingAgent `json:"waiting_agents"`
}

// waitingAgent is one agent that has not reached the revision. LastSeen is null
// if the server has not seen it since the server started, Revision 0 if it has
// not told one.
type waitingAgent struct {
	ID        string     `json:"id"`
	Connected bool       `json:"connected"`
	LastSeen  *time.Time `json:"last_seen"`
	Revision  int64      `json:"revision"`
}

func newWaitCommand(t *tool) *cobra.Command {
	var req adminv1.WaitRequest
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "wait",
		Short: "Wait until a change has come to the server and its agents",
		Long: `Wait until the server has applied a revision of its store and, with
--all-agents, every agent has: then a workload that asks for an identity finds
the entries as they were at that revision. It is the store revision that entry
create and update print, and with -o json delete and apply, or the revision of
status; without --revision it is the newest that the server has.

All agents are those on record that are not banned and whose X.509-SVID has not
ended, connected or not: each may serve workloads. An agent that is gone for good
holds up the wait until then; evict it.

When the time is up, the exit code is 75 and the error names whom it waits for.

  $ assay wait --all-agents
  $ rev=$(assay entry apply -f entries.yaml -o json | jq .store_revision)
  $ assay wait --revision $rev --all-agents --timeout 2m`,
		Args: noArgs,
	}
	cmd.RunE = t.serverVerb(func(ctx context.Context, s *serverConn, _ []string) error {
		switch {
		case cmd.Flags().Changed("revision") && req.GetRevision() <= 0:
			return usageError("--revision must be positive; leave it out for the newest")
		case timeout <= 0:
			return usageError("--timeout must be positive")
		}
		return t.wait(ctx, s, &req, timeout)
	})
	fl := cmd.Flags()
	fl.Int64Var(&req.Revision, "revision", 0, "store revision to wait for (default: the server's newest)")
	fl.BoolVar(&req.AllAgents, "all-agents", false, "wait for the agents, too")
	fl.DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	return t.serverFlags(cmd)
}

func (t *tool) wait(ctx context.Context, s *serverConn, req *adminv1.WaitRequest, timeout time.Duration) error {
	last, err := t.follow(ctx, s, req, timeout)
	if err != nil {
		return err
	}
	doc := reachFromProto(last)
	if err := t.print(doc, doc.write); err != nil {
		return err
	}
	if !doc.Reached {
		return fault.Newf(fault.NotReady, "wait_timeout", "revision %d was not reached within %s: %s", doc.Revision, timeout, doc.whom())
	}
	return nil
}

// follow reads what the server says until it says that the revision is reached,
// or the time is up, and returns the last of it.
func (t *tool) follow(ctx context.Context, s *serverConn, req *adminv1.WaitRequest, timeout time.Duration) (last *adminv1.WaitResponse, err error) {
	// The time is ours alone: a server that knew the deadline could be the first
	// to end the call, with words of its own.
	call, end := context.WithCancel(ctx)
	defer end()
	timer := time.AfterFunc(timeout, end)
	defer timer.Stop()
	explain := func(err error) error {
		if call.Err() != nil && ctx.Err() == nil {
			err = status.FromContextError(context.DeadlineExceeded).Err()
		}
		return callError(ctx, err, s.peer)
	}
	stream, err := s.admin.Wait(call, req)
	if err != nil {
		return nil, explain(err)
	}
	for {
		next, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && last.GetReached():
			return last, nil
		case errors.Is(err, io.EOF):
			return nil, badAnswer("the end of the wait")
		case err != nil && last != nil && call.Err() != nil && ctx.Err() == nil:
			return last, nil // the time is up
		case err != nil:
			return nil, explain(err)
		}
		if last = next; t.isTTY && !next.GetReached() {
			_, _ = fmt.Fprintln(t.stderr, oneLine("waiting: "+reachFromProto(next).whom()))
		}
	}
}

func reachFromProto(r *adminv1.WaitResponse) reachShape {
	w := reachShape{
		Revision: r.GetRevision(), ServerRevision: r.GetServerRevision(), Reached: r.GetReached(),
		Agents: r.GetAgents(), Waiting: r.GetWaiting(), WaitingAgents: []waitingAgent{},
	}
	for _, a := range r.GetWaitingAgents() {
		w.WaitingAgents = append(w.WaitingAgents, waitingAgent{
			ID: a.GetId(), Connected: a.GetConnected(), LastSeen: momentOf(a.GetLastSeen()), Revision: a.GetRevision(),
		})
	}
	return w
}

// mostNamed is how many agents one line names.
const mostNamed = 5

// whom says what keeps the revision from being reached.
func (w reachShape) whom() string {
	if w.ServerRevision < w.Revision {
		return fmt.Sprintf("the server itself is at %d; is %d a store revision of this server", w.ServerRevision, w.Revision)
	}
	var names []string
	for _, a := range w.WaitingAgents[:min(len(w.WaitingAgents), mostNamed)] {
		names = append(names, a.ID+" ("+a.state()+")")
	}
	if more := int(w.Waiting) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	verb := "are"
	if w.Waiting == 1 {
		verb = "is"
	}
	return fmt.Sprintf("%d of %s %s behind: %s", w.Waiting, count(int(w.Agents), "agent"), verb, strings.Join(names, ", "))
}

func (a waitingAgent) state() string {
	switch {
	case a.Connected && a.Revision > 0:
		return "at " + strconv.FormatInt(a.Revision, 10)
	case a.Connected:
		return "connected"
	case a.LastSeen != nil:
		return "away since " + stampOf(a.LastSeen)
	}
	return "not seen since the server started"
}

func (w reachShape) write(out io.Writer) error {
	line := fmt.Sprintf("revision %d: server at %d", w.Revision, w.ServerRevision)
	if w.Agents > 0 {
		line += fmt.Sprintf(", %d of %s reached it", w.Agents-w.Waiting, count(int(w.Agents), "agent"))
	}
	if _, err := fmt.Fprintln(out, line); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

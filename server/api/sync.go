package api

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/kube"
	"github.com/seed-caa81108/assay/server/registry"
)

const (
	// helloTimeout is how long a new stream may stay silent.
	helloTimeout = 10 * time.Second
	// recheckEvery is how soon at the latest a stream ends whose agent was
	// banned, or whose certificate was replaced or has expired (NEG-13).
	recheckEvery = 500 * time.Millisecond
	// maxSyncBytes is the size at which a message is followed by another one.
	maxSyncBytes = 256 << 10
)

type syncStream = grpc.BidiStreamingServer[agentv1.SyncRequest, agentv1.SyncResponse]

// Sync implements agentv1.AgentServer. One goroutine follows the registry, one
// sends, one receives; the handler watches over the three and ends the stream
// with the first reason to do so.
func (s *AgentService) Sync(stream syncStream) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	caller, err := s.admit(ctx)
	if err != nil {
		return err
	}
	if err := s.rates.sync(caller.ID, time.Now()); err != nil {
		return err
	}
	leave, err := s.streams.enter(caller.ID)
	if err != nil {
		return err
	}
	defer leave()
	incoming := make(chan *agentv1.SyncRequest)
	ends := make(chan error, 4)
	go func() { ends <- receive(ctx, stream, incoming) }()
	hello, err := s.hello(incoming, ends)
	if err != nil {
		return err
	}
	claims := s.cfg.Registry.Connected(caller.ID, hello.GetAgentVersion())
	defer claims.Close()
	session := &syncSession{
		authority: s.cfg.Authority, bundles: &s.bundles, log: s.cfg.Log, claims: claims, caller: caller,
		newest: s.cfg.Registry.Revision, updates: make(chan registry.Update), send: stream.Send,
		clusters: s.cfg.Clusters, pods: make(chan kube.Change),
	}
	feed := s.cfg.Registry.Follow(caller.ID, hello.GetEpoch(), hello.GetRevision())
	go func() { ends <- session.follow(ctx, feed) }()
	if pods := s.podsOf(caller.ID); pods != nil {
		session.cluster = pods.Cluster()
		go func() { ends <- session.followPods(ctx, pods) }()
	}
	go func() { ends <- session.push(ctx) }()
	return s.watch(session, incoming, ends)
}

// watch handles what the agent says until the stream has to end. The
// goroutines of the stream end with the handler's context.
func (s *AgentService) watch(session *syncSession, incoming <-chan *agentv1.SyncRequest, ends <-chan error) error {
	recheck := time.NewTicker(recheckEvery)
	defer recheck.Stop()
	// An agent whose certificate was replaced may have no other call to make:
	// without this the alarm would be lost.
	rule := reporting(AgentRule(s.cfg.ReservedPrefix, s.cfg.Registry), s.cfg.Refused)
	for {
		select {
		case err := <-ends:
			return err
		case <-s.stopping:
			return errStopping()
		case <-recheck.C:
			if err := rule(session.caller); err != nil {
				return err
			}
			if err := s.checkNode(session.caller.ID); err != nil {
				return err
			}
		case msg := <-incoming:
			if err := session.heard(msg); err != nil {
				return err
			}
		}
	}
}

// hello waits for the first message.
func (s *AgentService) hello(incoming <-chan *agentv1.SyncRequest, ends <-chan error) (*agentv1.SyncRequest_Hello, error) {
	timer := time.NewTimer(helloTimeout)
	defer timer.Stop()
	select {
	case msg := <-incoming:
		if hello := msg.GetHello(); hello != nil {
			return hello, nil
		}
		return nil, errNoHello()
	case err := <-ends:
		return nil, err
	case <-timer.C:
		return nil, errNoHello()
	case <-s.stopping:
		return nil, errStopping()
	}
}

func errNoHello() error {
	return fault.New(fault.Invalid, "hello_missing", "a sync stream begins with hello")
}

// receive passes on what the agent sends.
func receive(ctx context.Context, stream syncStream, incoming chan<- *agentv1.SyncRequest) error {
	for {
		msg, err := stream.Recv()
		if err != nil {
			return fault.Wrap(fault.NotReady, err, "stream_ended", "the agent ended the stream")
		}
		select {
		case incoming <- msg:
		case <-ctx.Done():
			return fault.Wrap(fault.NotReady, ctx.Err(), "stream_ended", "the stream ended")
		}
	}
}

// syncSession is one open stream.
type syncSession struct {
	authority *ca.Authority
	bundles   *bundleCache
	log       *slog.Logger
	claims    *registry.Claims
	newest    func() int64 // revision that there is
	caller    rpc.Caller
	updates   chan registry.Update
	clusters  *kube.Clusters
	cluster   string // of the agent's node, if it is one of Kubernetes
	pods      chan kube.Change
	send      func(*agentv1.SyncResponse) error
	alarmed   bool
}

// follow owns the feed. It hands over one update at a time, so while a message
// waits for a slow agent, the changes behind it become one.
func (s *syncSession) follow(ctx context.Context, feed *registry.Feed) error {
	defer feed.Close()
	for {
		update, err := feed.Next(ctx)
		if err != nil {
			return err
		}
		select {
		case s.updates <- update:
		case <-ctx.Done():
			return fault.Wrap(fault.NotReady, ctx.Err(), "stream_ended", "the stream ended")
		}
	}
}

// push sends updates and bundles in the order in which they come. The first
// message has both.
func (s *syncSession) push(ctx context.Context) error {
	var last registry.Update
	select {
	case last = <-s.updates:
	case <-ctx.Done():
		return fault.Wrap(fault.NotReady, ctx.Err(), "stream_ended", "the stream ended")
	}
	bundle := s.authority.Bundle()
	if err := s.deliver(last, bundle); err != nil {
		return err
	}
	for {
		var err error
		select {
		case update := <-s.updates:
			last = update
			err = s.deliver(update, nil)
		case <-bundle.Replaced():
			bundle = s.authority.Bundle()
			// A delta without entries: the view is as complete as before.
			err = s.deliver(registry.Update{Epoch: last.Epoch, Revision: last.Revision}, bundle)
		case change := <-s.pods:
			err = s.deliverPods(last, change)
		case <-ctx.Done():
			err = fault.Wrap(fault.NotReady, ctx.Err(), "stream_ended", "the stream ended")
		}
		if err != nil {
			return err
		}
	}
}

// deliver sends an update, in several messages if it is long. bundle may be
// nil; it goes with the first.
func (s *syncSession) deliver(u registry.Update, bundle *ca.Bundle) error {
	for _, msg := range syncMessages(u) {
		msg.ServerTime = timestamppb.Now()
		if bundle != nil {
			msg.Bundle, bundle = s.bundles.message(bundle), nil
		}
		if err := s.send(msg); err != nil {
			return fault.Wrap(fault.NotReady, err, "stream_ended", "the agent can't be reached any more")
		}
	}
	return nil
}

// syncMessages cuts an update into messages of at most maxSyncBytes, all but
// the last marked with more.
func syncMessages(u registry.Update) []*agentv1.SyncResponse {
	next := func() *agentv1.SyncResponse {
		return &agentv1.SyncResponse{Epoch: u.Epoch, Revision: u.Revision, Snapshot: u.Snapshot}
	}
	msg := next()
	if !u.CommittedAt.IsZero() {
		msg.CommittedAt = timestamppb.New(u.CommittedAt)
	}
	msgs, size := []*agentv1.SyncResponse{msg}, 0
	grow := func(n int) {
		if size += n; size > maxSyncBytes && size > n {
			msg.More = true
			committed := msg.CommittedAt
			msg, size = next(), n
			msg.CommittedAt = committed
			msgs = append(msgs, msg)
		}
	}
	for i := range u.Entries {
		e := syncEntry(&u.Entries[i])
		grow(proto.Size(e) + 8) // tag and length in front of it
		msg.Entries = append(msg.Entries, e)
	}
	for _, id := range u.Removed {
		grow(len(id) + 8)
		msg.RemovedEntryIds = append(msg.RemovedEntryIds, id)
	}
	return msgs
}

func syncEntry(e *registry.Entry) *agentv1.Entry {
	out := &agentv1.Entry{
		Id: e.ID, Revision: e.Revision, SpiffeId: e.SPIFFEID.String(), Hint: e.Hint, DnsNames: e.DNSNames,
		Selectors: selectorMessages(e.Selectors), CreatedAt: timestamppb.New(e.CreatedAt),
	}
	if e.X509SVIDTTL > 0 {
		out.X509SvidTtl = durationpb.New(e.X509SVIDTTL)
	}
	return out
}

func selectorMessages(set selector.Set) []*agentv1.Selector {
	out := make([]*agentv1.Selector, len(set))
	for i, one := range set {
		out[i] = &agentv1.Selector{Type: one.Type, Value: one.Value}
	}
	return out
}

// heard takes note of what the agent claims. What can't be true is left out
// and raises an alarm; it never stops the server.
func (s *syncSession) heard(msg *agentv1.SyncRequest) error {
	switch m := msg.GetMessage().(type) {
	case *agentv1.SyncRequest_Ack_:
		if newest := s.authority.Bundle().Sequence; m.Ack.GetBundleSequence() > newest {
			s.alarm("ack_of_unknown_bundle")
			return nil
		}
		s.claims.Ack(m.Ack.GetBundleSequence(), moment(m.Ack.GetWaitsUntil()))
	case *agentv1.SyncRequest_Report_:
		s.claims.Report(s.report(m.Report))
	case *agentv1.SyncRequest_Hello_:
		return fault.New(fault.Invalid, "hello_repeated", "hello is the first message of a stream and comes once")
	default:
		return fault.New(fault.Invalid, "sync_message_unknown", "this server does not know that message")
	}
	return nil
}

func (s *syncSession) report(p *agentv1.SyncRequest_Report) registry.Report {
	known := s.authority.Authorities()
	r := registry.Report{EarliestExpiry: moment(p.GetEarliestExpiry()), AgentTime: moment(p.GetAgentTime()), Revision: p.GetRevision()}
	if r.Revision > s.newest() {
		s.alarm("revision_of_the_future")
		r.Revision = 0
	}
	for _, live := range p.GetLive() {
		if !slices.ContainsFunc(known, func(root ca.Root) bool { return root.ID == live.GetAuthorityId() }) {
			s.alarm("svids_of_unknown_authority")
			continue
		}
		r.Live = append(r.Live, registry.LiveSVIDs{
			AuthorityID: live.GetAuthorityId(), Count: live.GetCount(), LatestExpiry: moment(live.GetLatestExpiry()),
		})
	}
	return r
}

// alarm logs once per stream: an agent can repeat itself as fast as it likes.
func (s *syncSession) alarm(claim string) {
	if s.alarmed {
		return
	}
	s.alarmed = true
	s.log.LogAttrs(context.Background(), slog.LevelWarn, "agent claims what can't be true", slog.String("claim", claim),
		slog.String("agent_id", s.caller.ID.String()), slog.String("serial", s.caller.Serial))
}

// moment reads a timestamp that may be missing or nonsense.
func moment(t *timestamppb.Timestamp) time.Time {
	if t == nil || t.CheckValid() != nil {
		return time.Time{}
	}
	return t.AsTime()
}

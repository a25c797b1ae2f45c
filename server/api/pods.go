package api

import (
	"context"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/kube"
	"github.com/seed-caa81108/assay/server/registry"
)

const (
	// podPrefix begins the IDs of identities that pods have without an entry; no
	// entry's ID has a slash.
	podPrefix = "pod/"
	// hostSelector is that of processes on a Kubernetes node that are in no pod.
	hostSelector = "host:true"
)

// place says on which node of which cluster an agent is.
func (s *AgentService) place(agent spiffeid.ID) (kube.Place, bool) {
	if s.cfg.Clusters == nil {
		return kube.Place{}, false
	}
	rest, ok := strings.CutPrefix(agent.Path(), s.cfg.ReservedPrefix+"agent/"+agentv1.AttestorK8SPsat+"/")
	cluster, uid, split := strings.Cut(rest, "/")
	return kube.Place{Cluster: cluster, NodeUID: uid}, ok && split
}

// checkNode refuses an agent whose node was made anew, under its name and with
// another UID: for the cluster nothing runs on the one that the agent is named
// for. Attested anew it is that of the node that there is.
func (s *AgentService) checkNode(agent spiffeid.ID) error {
	at, ok := s.place(agent)
	if !ok {
		return nil
	}
	a, _ := s.cfg.Registry.Agent(agent)
	for _, one := range a.Selectors {
		if name, ok := strings.CutPrefix(one.Value, "agent_node_name:"); ok && s.cfg.Clusters.Replaced(at, name) {
			return fault.New(fault.Unauthenticated, "agent_node_replaced", "the agent's node was made anew in its cluster: attest again")
		}
	}
	return nil
}

// podsOf returns a feed of the pods on the agent's node, nil if it has none.
func (s *AgentService) podsOf(agent spiffeid.ID) *kube.Feed {
	at, ok := s.place(agent)
	if !ok {
		return nil
	}
	return s.cfg.Clusters.Follow(at)
}

// find finds what an item of an agent asks for. On a node of Kubernetes a pod to
// which it applies has to run there, whatever the agent says.
func (s *AgentService) find(w *signing, agent spiffeid.ID, entryID string) (err error) {
	at, inCluster := s.place(agent)
	w.rule, w.cluster = "entry", at.Cluster
	if uid, isPod := strings.CutPrefix(entryID, podPrefix); isPod {
		w.rule = "template"
		if !inCluster {
			return fault.New(fault.NotFound, "entry_unknown", "this agent has no entry of that ID")
		}
		return s.findPod(w, at, uid)
	}
	if w.entry, err = s.cfg.Registry.EntryFor(agent, entryID); err != nil || !inCluster {
		return err
	}
	if err := s.cfg.Clusters.CheckEntry(w.entry.SPIFFEID, w.entry.Selectors); err != nil {
		return err
	}
	return s.checkRuns(at, w.entry.Selectors)
}

func (s *AgentService) findPod(w *signing, at kube.Place, uid string) error {
	pod, err := s.cfg.Clusters.PodOn(at, uid)
	if err != nil {
		return err
	}
	id, ttl, ok := s.cfg.Clusters.Identity(at.Cluster, pod)
	if !ok {
		return fault.New(fault.Denied, "no_identity_from_template", "that pod gets no identity from the template, by kubernetes.rules")
	}
	w.entry = registry.Entry{ID: podPrefix + uid, SPIFFEID: id, X509SVIDTTL: ttl}
	return nil
}

// checkRuns says whether somebody to whom an entry applies can be on the node.
func (s *AgentService) checkRuns(at kube.Place, selectors selector.Set) error {
	var wanted []selector.Selector
	for _, one := range selectors {
		if one.Type == "k8s" {
			wanted = append(wanted, one)
		}
	}
	if len(wanted) == 1 && wanted[0].Value == hostSelector {
		return nil
	}
	if len(wanted) == 0 {
		return fault.New(fault.Denied, "entry_without_pod",
			"the entry says nothing about pods, and this agent is a Kubernetes node's: add selectors such as k8s:ns and k8s:sa, or k8s:"+hostSelector+" for processes in no pod")
	}
	return s.cfg.Clusters.Runs(at, selector.NewSet(wanted...))
}

// followPods hands over what becomes of the pods, like follow.
func (s *syncSession) followPods(ctx context.Context, feed *kube.Feed) error {
	defer feed.Close()
	for {
		change, err := feed.Next(ctx)
		if err != nil {
			return err
		}
		select {
		case s.pods <- change:
		case <-ctx.Done():
			return fault.Wrap(fault.NotReady, ctx.Err(), "stream_ended", "the stream ended")
		}
	}
}

// deliverPods sends a change, in several messages if it is long. The agent's
// view of its entries stays what last made it.
func (s *syncSession) deliverPods(last registry.Update, change kube.Change) error {
	next := func() *agentv1.SyncResponse {
		return &agentv1.SyncResponse{Epoch: last.Epoch, Revision: last.Revision, ServerTime: timestamppb.Now(), Pods: &agentv1.PodChanges{Snapshot: change.Snapshot}}
	}
	msg := next()
	msg.Pods.RemovedUids = change.Removed
	msgs, size := []*agentv1.SyncResponse{msg}, proto.Size(msg)
	for _, pod := range change.Pods {
		p := s.podMessage(pod)
		if size += proto.Size(p) + 8; size > maxSyncBytes && len(msg.Pods.GetPods()) > 0 {
			msg.More = true
			msg = next()
			msgs, size = append(msgs, msg), proto.Size(p)
		}
		msg.Pods.Pods = append(msg.Pods.Pods, p)
	}
	for _, msg := range msgs {
		if err := s.send(msg); err != nil {
			return fault.Wrap(fault.NotReady, err, "stream_ended", "the agent can't be reached any more")
		}
	}
	return nil
}

func (s *syncSession) podMessage(pod *kube.Pod) *agentv1.Pod {
	out := &agentv1.Pod{Uid: pod.UID, Selectors: selectorMessages(pod.Selectors(s.cluster))}
	for _, c := range pod.Containers {
		out.Containers = append(out.Containers, &agentv1.Container{Id: c.ID, Selectors: selectorMessages(c.Selectors())})
	}
	id, ttl, ok := s.clusters.Identity(s.cluster, pod)
	if !ok {
		return out
	}
	out.Identity = &agentv1.Entry{
		Id: podPrefix + pod.UID, SpiffeId: id.String(),
		Selectors: []*agentv1.Selector{{Type: "k8s", Value: "pod-uid:" + pod.UID}},
	}
	if ttl > 0 {
		out.Identity.X509SvidTtl = durationpb.New(ttl)
	}
	return out
}

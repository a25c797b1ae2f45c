package cache

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

const (
	// podPrefix begins the IDs of identities that pods have without an entry.
	podPrefix = "pod/"
	// podWait is how long a caller waits for its pod to be known: the server
	// may hear of it a moment after its process runs.
	podWait = 5 * time.Second
)

// pod is what the server says about one.
type pod struct {
	selectors selector.Set
	// containers has those that are known to run in it, by ID: what is true of
	// their processes, the pod's selectors included.
	containers map[string]selector.Set
	wire       []byte // for the sealed file, without the identity
}

// has says whether something to which all of these selectors apply can run in
// the pod.
func (p *pod) has(wanted selector.Set) bool {
	if p.selectors.Contains(wanted) {
		return true
	}
	for _, set := range p.containers {
		if set.Contains(wanted) {
			return true
		}
	}
	return false
}

// AwaitPod returns when the server lists the pod with this UID on this node. It
// waits a moment for that.
func (c *Cache) AwaitPod(ctx context.Context, uid string) error {
	timer := time.NewTimer(podWait)
	defer timer.Stop()
	for {
		c.mu.Lock()
		p, changed := c.pods[uid], c.podsChanged
		c.mu.Unlock()
		if p != nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errPodUnknown()
		case <-timer.C:
			return errPodUnknown()
		}
	}
}

func errPodUnknown() error {
	return fault.New(fault.NotReady, "pod_unknown", "the server does not list the caller's pod on this node; retry")
}

// parsePod checks what the server says about a pod. Its identity is for its own
// processes, whatever the server says.
func (c *Cache) parsePod(from *agentv1.Pod) (*pod, *facts, error) {
	invalid := func(rule string) (*pod, *facts, error) {
		return nil, nil, fault.New(fault.Precondition, "pod_invalid", "the server sent a pod that can't be served: "+rule)
	}
	if from.GetUid() == "" {
		return invalid("no UID")
	}
	own := selector.NewSet(podSelector(from.GetUid()))
	p := &pod{containers: make(map[string]selector.Set, len(from.GetContainers()))}
	var ok bool
	if p.selectors, ok = podSelectors(from.GetSelectors()); !ok || !p.selectors.Contains(own) {
		return invalid("its selectors are none of a pod, or of another")
	}
	for _, container := range from.GetContainers() {
		set, ok := podSelectors(container.GetSelectors())
		if !ok {
			return invalid("selectors of a container are none")
		}
		p.containers[container.GetId()] = union(p.selectors, set)
	}
	bare := &agentv1.Pod{Uid: from.GetUid(), Selectors: from.GetSelectors(), Containers: from.GetContainers()}
	var err error
	if p.wire, err = (proto.MarshalOptions{Deterministic: true}).Marshal(bare); err != nil {
		return invalid("it can't be encoded")
	}
	if from.GetIdentity() == nil {
		return p, nil, nil
	}
	f, err := parseEntry(from.GetIdentity(), time.Time{}, c.td, c.reserved)
	if err != nil {
		return nil, nil, err
	}
	if f.id != podPrefix+from.GetUid() || f.selectors.Key() != own.Key() {
		return invalid("its identity is for others")
	}
	return p, &f, nil
}

// podSelectors are selectors of pods from the server, unless one is not.
func podSelectors(from []*agentv1.Selector) (selector.Set, bool) {
	list := make([]selector.Selector, len(from))
	for i, s := range from {
		list[i] = selector.Selector{Type: s.GetType(), Value: s.GetValue()}
		if err := list[i].Check(); err != nil || list[i].Type != "k8s" {
			return nil, false
		}
	}
	return selector.NewSet(list...), true
}

func union(a, b selector.Set) selector.Set { return selector.NewSet(slices.Concat(a, b)...) }

// changePods takes in what became of the pods of this node.
func (c *Cache) changePods(ctx context.Context, chunks []*agentv1.SyncResponse) {
	news, snapshot := false, false
	keep := map[string]bool{}
	for _, chunk := range chunks {
		changes := chunk.GetPods()
		if changes == nil {
			continue
		}
		news, snapshot = true, snapshot || changes.GetSnapshot()
		for _, from := range changes.GetPods() {
			keep[from.GetUid()] = true
			c.putPod(ctx, from)
		}
		for _, uid := range changes.GetRemovedUids() {
			c.dropPod(uid)
		}
	}
	if !news {
		return
	}
	if snapshot {
		for uid := range c.pods {
			if !keep[uid] {
				c.dropPod(uid)
			}
		}
	}
	close(c.podsChanged)
	c.podsChanged = make(chan struct{})
}

func (c *Cache) putPod(ctx context.Context, from *agentv1.Pod) {
	p, identity, err := c.parsePod(from)
	if err != nil {
		c.log.WarnContext(ctx, "pod left out", slog.String("pod_uid", from.GetUid()), slog.String("error", err.Error()))
		c.dropPod(from.GetUid())
		return
	}
	if was := c.pods[from.GetUid()]; was == nil || !bytes.Equal(was.wire, p.wire) {
		c.pods[from.GetUid()] = p
		// The index that says which they are changes with each.
		for _, g := range slices.Collect(maps.Keys(c.groupsBy[podSelector(from.GetUid())])) {
			c.rejudge(g)
		}
		for e := range c.parked {
			if p.has(e.ofPods) {
				e.attempted = false // who comes now waits for it
				c.enqueue(e)
			}
		}
	}
	if identity != nil {
		c.upsert(*identity)
	} else if e := c.entries[podPrefix+from.GetUid()]; e != nil {
		c.removeEntry(e)
	}
}

// dropPod forgets a pod. Its processes get nothing any more, whatever else is
// true of them.
func (c *Cache) dropPod(uid string) {
	delete(c.pods, uid)
	for g := range c.groupsBy[podSelector(uid)] {
		c.dirty[g] = struct{}{}
	}
	if e := c.entries[podPrefix+uid]; e != nil {
		c.removeEntry(e)
	}
}

// runs says whether somebody for whom an entry is can be here. The server signs
// nothing for pods that it does not list.
func (c *Cache) runs(e *entry) bool {
	if len(e.ofPods) == 0 || isPod(e.id) {
		return true
	}
	for _, p := range c.pods {
		if p.has(e.ofPods) {
			return true
		}
	}
	return false
}

// park leaves an entry unsigned until its pod comes. What it has serves nobody,
// so it is not kept: a rotation would wait for it.
func (c *Cache) park(e *entry) {
	c.parked[e] = struct{}{}
	if e.svid != nil || !e.attempted {
		e.svid, e.attempted = nil, true
		c.touch(e)
	}
}

// What the attestor says of a process in a pod; the rest, the server says.
const (
	podUID      = "pod-uid:"
	containerID = "container-id:"
	// ofContainer begins the facts that a container has by itself.
	ofContainer = "container-"
)

func podSelector(uid string) selector.Selector {
	return selector.Selector{Type: "k8s", Value: podUID + uid}
}

// valueOf returns the value of the one selector of a process that begins so, or
// nothing.
func valueOf(process selector.Set, begins string) string {
	for _, s := range process {
		if value, ok := strings.CutPrefix(s.Value, begins); ok && s.Type == "k8s" {
			return value
		}
	}
	return ""
}

// expand returns all that is true of the processes of a group, and whether
// that is all: facts of the container come after it has begun.
func (c *Cache) expand(g *group) (set selector.Set, complete bool) {
	p := c.pods[g.pod]
	if p == nil { // of no pod, or of one that is gone
		return g.process, true
	}
	if container, ok := p.containers[g.container]; ok {
		return union(g.process, container), true
	}
	return union(g.process, p.selectors), false
}

// awaitsContainer says whether an entry might be for a group when more is known of
// its container, and callers still wait for that.
func (c *Cache) awaitsContainer(g *group) bool {
	if g.known || g.hasty {
		return false
	}
	for e := range c.ofContainers {
		rest := slices.DeleteFunc(slices.Clone(e.selectors), isOfContainer)
		if g.set.Contains(rest) {
			return true
		}
	}
	return false
}

func isOfContainer(s selector.Selector) bool {
	return s.Type == "k8s" && strings.HasPrefix(s.Value, ofContainer)
}

// ofPods are the selectors of pods among all.
func ofPods(all selector.Set) selector.Set {
	var list []selector.Selector
	for _, s := range all {
		if s.Type == "k8s" && s.Value != hostValue {
			list = append(list, s)
		}
	}
	return selector.NewSet(list...)
}

// hostValue is the selector of processes that are in no pod.
const hostValue = "host:true"

// isPod says whether an entry is the identity of a pod.
func isPod(entryID string) bool { return strings.HasPrefix(entryID, podPrefix) }

// restorePods takes back what the sealed file has. The identities are among its
// entries.
func (c *Cache) restorePods(wires [][]byte) {
	for _, wire := range wires {
		var from agentv1.Pod
		if proto.Unmarshal(wire, &from) != nil {
			continue
		}
		if p, _, err := c.parsePod(&from); err == nil {
			c.pods[from.GetUid()] = p
		}
	}
}

package cache

import (
	"context"
	"log/slog"
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
	wire      []byte // for the sealed file, without the identity
}

// PodSelectors returns what the server says of every process in the pod with
// this UID. If it does not list that pod, it waits a moment for it.
func (c *Cache) PodSelectors(ctx context.Context, uid string) (selector.Set, error) {
	timer := time.NewTimer(podWait)
	defer timer.Stop()
	for {
		c.mu.Lock()
		p, changed := c.pods[uid], c.podsChanged
		c.mu.Unlock()
		if p != nil {
			return p.selectors, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errPodUnknown()
		case <-timer.C:
			return nil, errPodUnknown()
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
	list := make([]selector.Selector, len(from.GetSelectors()))
	for i, s := range from.GetSelectors() {
		list[i] = selector.Selector{Type: s.GetType(), Value: s.GetValue()}
		if err := list[i].Check(); err != nil || list[i].Type != "k8s" {
			return invalid("a selector that is none of pods")
		}
	}
	own := selector.NewSet(podSelector(from.GetUid()))
	p := &pod{selectors: selector.NewSet(list...)}
	if !p.selectors.Contains(own) {
		return invalid("its selectors are of another pod")
	}
	bare := &agentv1.Pod{Uid: from.GetUid(), Selectors: from.GetSelectors()}
	var err error
	if p.wire, err = proto.Marshal(bare); err != nil {
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
	if was := c.pods[from.GetUid()]; was == nil || was.selectors.Key() != p.selectors.Key() {
		c.pods[from.GetUid()] = p
		c.touchPod(from.GetUid())
		for e := range c.parked {
			if p.selectors.Contains(e.ofPods) {
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

func (c *Cache) dropPod(uid string) {
	delete(c.pods, uid)
	c.touchPod(uid)
	if e := c.entries[podPrefix+uid]; e != nil {
		c.removeEntry(e)
	}
}

// touchPod has those who are served as processes of a pod looked at again.
func (c *Cache) touchPod(uid string) {
	for g := range c.groupsBy[podSelector(uid)] {
		c.dirty[g] = struct{}{}
	}
}

// runs says whether somebody for whom an entry is can be here. The server signs
// nothing for pods that it does not list.
func (c *Cache) runs(e *entry) bool {
	if len(e.ofPods) == 0 || isPod(e.id) {
		return true
	}
	for _, p := range c.pods {
		if p.selectors.Contains(e.ofPods) {
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

const podUID = "pod-uid:"

func podSelector(uid string) selector.Selector {
	return selector.Selector{Type: "k8s", Value: podUID + uid}
}

// podOf is the pod whose processes have these selectors.
func podOf(set selector.Set) string {
	for _, s := range set {
		if uid, ok := strings.CutPrefix(s.Value, podUID); ok && s.Type == "k8s" {
			return uid
		}
	}
	return ""
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

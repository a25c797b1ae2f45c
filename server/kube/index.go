package kube

import (
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// index is a cluster's pods by their nodes, kept current by two watches.
type index struct {
	cluster string

	mu    sync.Mutex
	nodes map[string]string // UID by name
	names map[string]string // and the other way round
	pods  map[string]*Pod   // by namespace/name, which the API makes unique
	by    map[string]map[string]*Pod
	feeds map[string]map[*Feed]struct{} // by node UID
	watch [2]watchState                 // of nodes and of pods
}

const (
	watchNodes = iota
	watchPods
)

// watchState is how current one of the watches is.
type watchState struct {
	synced bool
	open   int       // watches: an old one may end after the next has begun
	until  time.Time // when it was last open
}

// maxStale is how long the server goes by what it knew of a cluster's pods when
// its watch broke.
const maxStale = 60 * time.Second

func newIndex(cluster string) *index {
	return &index{
		cluster: cluster, nodes: map[string]string{}, names: map[string]string{}, pods: map[string]*Pod{},
		by: map[string]map[string]*Pod{}, feeds: map[string]map[*Feed]struct{}{},
	}
}

// usable says whether the index may be gone by: nil, or why not.
func (x *index) usable(now time.Time) error {
	for _, w := range x.watch {
		if !w.synced || w.open == 0 && now.Sub(w.until) > maxStale {
			return fault.New(fault.NotReady, "pod_index_not_synced",
				"the server does not know at present which pods run in cluster "+x.cluster+": retry; its API server gives no answer, or not yet")
		}
	}
	return nil
}

func (x *index) setNode(n *corev1.Node) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.putNode(n.Name, string(n.UID))
}

// putNode notes which node has this name now; an empty UID is none.
func (x *index) putNode(name, uid string) {
	was := x.nodes[name]
	if was == uid {
		return
	}
	delete(x.names, was)
	delete(x.nodes, name)
	if uid != "" {
		x.nodes[name], x.names[uid] = uid, name
	}
	x.tell(was)
	x.tell(uid)
}

func (x *index) dropNode(name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.putNode(name, "")
}

func (x *index) replaceNodes(all []*corev1.Node) {
	x.mu.Lock()
	defer x.mu.Unlock()
	seen := make(map[string]bool, len(all))
	for _, n := range all {
		seen[n.Name] = true
		x.putNode(n.Name, string(n.UID))
	}
	for _, name := range slices.Collect(maps.Keys(x.nodes)) {
		if !seen[name] {
			x.putNode(name, "")
		}
	}
	x.watch[watchNodes].synced = true
	x.tellAll()
}

// place puts a pod where it belongs, or takes it out if p is nil.
func (x *index) place(key string, p *Pod) {
	was := x.pods[key]
	if was != nil && p != nil && samePod(was, p) {
		return
	}
	if was != nil {
		if x.by[was.Node][was.UID] == was {
			delete(x.by[was.Node], was.UID)
		}
		if len(x.by[was.Node]) == 0 {
			delete(x.by, was.Node)
		}
		x.tell(x.nodes[was.Node])
	}
	delete(x.pods, key)
	if p == nil {
		return
	}
	x.pods[key] = p
	if p.Node == "" {
		return
	}
	if x.by[p.Node] == nil {
		x.by[p.Node] = map[string]*Pod{}
	}
	if x.by[p.Node][p.UID] == nil { // no pod takes the place of another
		x.by[p.Node][p.UID] = p
	}
	x.tell(x.nodes[p.Node])
}

func podKey(p *corev1.Pod) string { return p.Namespace + "/" + p.Name }

func (x *index) setPod(p *corev1.Pod) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.place(podKey(p), newPod(p))
}

func (x *index) dropPod(key string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.place(key, nil)
}

func (x *index) replacePods(all []*corev1.Pod) {
	x.mu.Lock()
	defer x.mu.Unlock()
	seen := make(map[string]bool, len(all))
	for _, p := range all {
		seen[podKey(p)] = true
		x.place(podKey(p), newPod(p))
	}
	for _, key := range slices.Collect(maps.Keys(x.pods)) {
		if !seen[key] {
			x.place(key, nil)
		}
	}
	x.watch[watchPods].synced = true
	x.tellAll()
}

// setOpen notes that a watch is open, or that it has ended.
func (x *index) setOpen(which int, open bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	w := &x.watch[which]
	w.until = time.Now()
	if open {
		w.open++
	} else {
		w.open--
	}
}

// tell wakes the feeds of a node.
func (x *index) tell(uid string) {
	for f := range x.feeds[uid] {
		f.signal()
	}
}

func (x *index) tellAll() {
	for uid := range x.feeds {
		x.tell(uid)
	}
}

// podsOn are the pods of a node in which something may run.
func (x *index) podsOn(nodeUID string, now time.Time) []*Pod {
	var pods []*Pod
	for _, p := range x.by[x.names[nodeUID]] {
		if p.lives(now) {
			pods = append(pods, p)
		}
	}
	byUID(pods)
	return pods
}

// usablePods is podsOn, or why the index can't be gone by.
func (x *index) usablePods(nodeUID string, now time.Time) ([]*Pod, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.usable(now); err != nil {
		return nil, err
	}
	return x.podsOn(nodeUID, now), nil
}

// podOn is one of them, or why there is none.
func (x *index) podOn(nodeUID, podUID string, now time.Time) (*Pod, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.usable(now); err != nil {
		return nil, err
	}
	p := x.by[x.names[nodeUID]][podUID]
	if p == nil || !p.lives(now) {
		return nil, fault.New(fault.Denied, "no_such_workload_on_node", "no such pod runs on this agent's node, by the cluster's API server")
	}
	return p, nil
}

package kube

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
)

// Where the proxies and the control plane of an Istio mesh look for the roots by
// which they know their CA: a ConfigMap in their own namespace.
const (
	rootMapName  = "istio-ca-root-cert"
	rootMapKey   = "root-cert.pem"
	rootMapLabel = "istio.io/config"
)

const (
	// rootMapRate is how many of them a second are written, and rootMapBurst how
	// many at once. New roots are spread over time, rootMapSpread a second: there is
	// room beside them, so that a new namespace needs not wait for all others.
	rootMapRate, rootMapBurst = 100, 100
	rootMapSpread             = 50
	rootMapWorkers            = 4
	// rootMapPause is how soon one is written again: somebody may undo it at once.
	rootMapPause = 2 * time.Second
)

// rootMaps keeps the trust bundle in a ConfigMap of each namespace of a cluster.
// What is there it knows by watching.
type rootMaps struct {
	cluster string
	api     *api
	queue   workqueue.TypedRateLimitingInterface[string] // namespaces; while it runs
	limit   *rate.Limiter

	mu         sync.Mutex
	roots      string
	sum        [sha256.Size]byte // of roots
	namespaces map[string]bool   // of which there are, true those that are going
	held       map[string]rootMap
	wrote      map[string]lastWrite // both by namespace
	synced     [2]bool              // namespaces and ConfigMaps
	open       [2]int               // watches of either

	writes uint64 // that the API server took

	// What was told.
	published string               // the roots that were in all namespaces
	told      map[string]time.Time // when a warning was, by what it is about
	contested string               // a namespace in which somebody else writes
}

const (
	watchNamespaces = iota
	watchRootMaps
)

// rootMap is what matters of a ConfigMap.
type rootMap struct {
	sum     [sha256.Size]byte // of what it has for roots
	labeled bool
}

// lastWrite is what was written last to one.
type lastWrite struct {
	at     time.Time
	sum    [sha256.Size]byte
	undone int // how many times in a row somebody took that back at once
}

func newRootMaps(cluster string, a *api) *rootMaps {
	return &rootMaps{
		cluster: cluster, api: a, limit: rate.NewLimiter(rootMapRate, rootMapBurst),
		namespaces: map[string]bool{}, held: map[string]rootMap{}, wrote: map[string]lastWrite{}, told: map[string]time.Time{},
	}
}

// run keeps them until ctx ends.
func (m *rootMaps) run(ctx context.Context, roots Roots, log *slog.Logger) {
	log = log.With(slog.String("config_map", rootMapName))
	m.queue = workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](time.Second/4, time.Minute))
	tell := &teller{log: log, cluster: m.cluster, lost: func(attrs ...slog.Attr) {
		log.LogAttrs(ctx, slog.LevelWarn, "namespaces can't be watched: new ones don't get the roots of the mesh", attrs...)
	}}
	pem, replaced := roots()
	m.publish(string(pem))
	var all sync.WaitGroup
	all.Go(func() {
		source{
			api: m.api, tell: tell, resource: "namespaces", list: &corev1.NamespaceList{}, object: &corev1.Namespace{},
			setOpen: func(is bool) { m.setOpen(watchNamespaces, is) },
		}.follow(ctx, sink[*corev1.Namespace]{set: m.setNamespace, drop: m.dropNamespace, replace: m.replaceNamespaces})
	})
	all.Go(func() {
		source{
			api: m.api, tell: tell, resource: "configmaps", name: rootMapName, list: &corev1.ConfigMapList{}, object: &corev1.ConfigMap{},
			setOpen: func(is bool) { m.setOpen(watchRootMaps, is) },
		}.follow(ctx, sink[*corev1.ConfigMap]{set: m.setMap, drop: m.dropMap, replace: m.replaceMaps})
	})
	for range rootMapWorkers {
		all.Go(func() { m.work(ctx, log) })
	}
	report := time.NewTicker(time.Second)
	defer report.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-replaced:
			pem, replaced = roots()
			m.publish(string(pem))
		case <-report.C:
			m.report(ctx, log)
		}
	}
	m.queue.ShutDown()
	all.Wait()
}

// publish has all namespaces get other roots.
func (m *rootMaps) publish(roots string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.roots, m.sum = roots, sha256.Sum256([]byte(roots))
	m.lookAtAll()
}

// lookAtAll has what is behind written, by and by.
func (m *rootMaps) lookAtAll() {
	if !m.synced[watchNamespaces] || !m.synced[watchRootMaps] {
		return
	}
	n := 0
	for namespace := range m.namespaces {
		if m.need(namespace) != upToDate {
			m.queue.AddAfter(namespace, time.Duration(n)*time.Second/rootMapSpread)
			n++
		}
	}
}

// look has a namespace written that is behind.
func (m *rootMaps) look(namespace string) {
	if m.need(namespace) != upToDate {
		m.queue.Add(namespace)
	}
}

// need is what a namespace needs.
type need int

const (
	upToDate need = iota
	create
	amend
)

func (m *rootMaps) need(namespace string) need {
	going, there := m.namespaces[namespace]
	if !there || going || !m.synced[watchNamespaces] || !m.synced[watchRootMaps] {
		return upToDate
	}
	held, there := m.held[namespace]
	switch {
	case !there:
		return create
	case !m.good(held):
		return amend
	}
	return upToDate
}

func (m *rootMaps) good(held rootMap) bool { return held.labeled && held.sum == m.sum }

// work writes what is in the queue.
func (m *rootMaps) work(ctx context.Context, log *slog.Logger) {
	for {
		namespace, down := m.queue.Get()
		if down {
			return
		}
		if ctx.Err() == nil {
			m.keep(ctx, namespace, log)
		}
		m.queue.Done(namespace)
	}
}

func (m *rootMaps) keep(ctx context.Context, namespace string, log *slog.Logger) {
	m.mu.Lock()
	what, pause := m.need(namespace), time.Until(m.wrote[namespace].at.Add(rootMapPause))
	m.mu.Unlock()
	switch {
	case what == upToDate:
		m.queue.Forget(namespace)
		return
	case pause > 0:
		m.queue.AddAfter(namespace, pause)
		return
	case m.limit.Wait(ctx) != nil:
		return
	}
	m.mu.Lock()
	roots, sum := m.roots, m.sum // others may have come meanwhile
	m.mu.Unlock()
	err := m.write(ctx, what, namespace, roots)
	switch {
	case ctx.Err() != nil:
	case err == nil:
		m.queue.Forget(namespace)
		m.mu.Lock()
		m.wrote[namespace] = lastWrite{at: time.Now(), sum: sum, undone: m.wrote[namespace].undone}
		m.writes++
		m.mu.Unlock()
	case apierrors.IsNotFound(err) || apierrors.IsAlreadyExists(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		// Something has happened of which the watch will tell.
		m.queue.AddRateLimited(namespace)
	default:
		if apierrors.IsInvalid(err) {
			err = fmt.Errorf("the API server does not take the change: if the ConfigMap is immutable, delete it: %w", err)
		} else {
			err = m.api.unavailable(err, what.String())
		}
		if m.due("failed") {
			_, behind := m.count()
			log.LogAttrs(ctx, slog.LevelWarn, "namespaces can't have the roots of the mesh: proxies there may not recognise the CA",
				slog.String("cluster", m.cluster), slog.String("namespace", namespace), slog.Int("behind", behind), slog.String("error", err.Error()))
		}
		m.queue.AddRateLimited(namespace)
	}
}

func (t need) String() string {
	if t == create {
		return "create configmaps"
	}
	return "patch configmaps"
}

// write makes the ConfigMap, or changes what is ours in it: whatever else it
// holds stays.
func (m *rootMaps) write(ctx context.Context, what need, namespace, roots string) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if what == create {
		return m.api.core.Post().Namespace(namespace).Resource("configmaps").Body(&corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: rootMapName, Labels: map[string]string{rootMapLabel: "true"}},
			Data:       map[string]string{rootMapKey: roots},
		}).Do(ctx).Error()
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"labels": map[string]string{rootMapLabel: "true"}},
		"data":     map[string]string{rootMapKey: roots},
	})
	if err != nil {
		return fmt.Errorf("encode patch: %w", err)
	}
	return m.api.core.Patch(types.MergePatchType).Namespace(namespace).Resource("configmaps").Name(rootMapName).Body(patch).Do(ctx).Error()
}

// due says whether to warn of something: at once, then once a minute, however many
// namespaces it is about.
func (m *rootMaps) due(about string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if at, told := m.told[about]; told && time.Since(at) < tellEvery {
		return false
	}
	m.told[about] = time.Now()
	return true
}

// report logs that all namespaces have the roots, once for each set of roots and
// after each failure, and that somebody else keeps taking them back.
func (m *rootMaps) report(ctx context.Context, log *slog.Logger) {
	m.mu.Lock()
	_, failed := m.told["failed"]
	news, contested := failed || m.published != m.roots, m.contested
	m.contested = ""
	m.mu.Unlock()
	if contested != "" && m.due("contested") {
		log.LogAttrs(ctx, slog.LevelWarn, "somebody else keeps changing or deleting the roots of the mesh: set ENABLE_CA_SERVER=false of istiod, and keep what prunes or sets labels away from that ConfigMap",
			slog.String("cluster", m.cluster), slog.String("namespace", contested))
	}
	if !news {
		return
	}
	current, behind := m.count()
	if behind > 0 {
		return
	}
	m.mu.Lock()
	delete(m.told, "failed")
	m.published = m.roots
	m.mu.Unlock()
	log.LogAttrs(ctx, slog.LevelInfo, "all namespaces have the roots of the mesh", slog.String("cluster", m.cluster), slog.Int("namespaces", current))
}

// count says how many namespaces have the roots and how many do not. While that
// can't be watched there is one at least that may not.
func (m *rootMaps) count() (current, behind int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for namespace, going := range m.namespaces {
		if going {
			continue
		}
		if held, there := m.held[namespace]; there && m.good(held) {
			current++
		} else {
			behind++
		}
	}
	if m.open[watchNamespaces] == 0 || m.open[watchRootMaps] == 0 {
		behind = max(behind, 1)
	}
	return current, behind
}

func (m *rootMaps) written() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.writes
}

func (m *rootMaps) setOpen(which int, is bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if is {
		m.open[which]++
	} else {
		m.open[which]--
	}
}

func isGoing(n *corev1.Namespace) bool {
	return !n.DeletionTimestamp.IsZero() || n.Status.Phase == corev1.NamespaceTerminating
}

func (m *rootMaps) setNamespace(n *corev1.Namespace) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.namespaces[n.Name] = isGoing(n)
	m.look(n.Name)
}

func (m *rootMaps) dropNamespace(n *corev1.Namespace) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.namespaces, n.Name)
	delete(m.wrote, n.Name)
}

func (m *rootMaps) replaceNamespaces(all []*corev1.Namespace) {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.namespaces)
	for _, n := range all {
		m.namespaces[n.Name] = isGoing(n)
	}
	for name := range m.wrote {
		if _, there := m.namespaces[name]; !there {
			delete(m.wrote, name)
		}
	}
	m.synced[watchNamespaces] = true
	m.lookAtAll()
}

func rootMapOf(c *corev1.ConfigMap) rootMap {
	return rootMap{sum: sha256.Sum256([]byte(c.Data[rootMapKey])), labeled: c.Labels[rootMapLabel] == "true"}
}

func (m *rootMaps) setMap(c *corev1.ConfigMap) {
	m.mu.Lock()
	defer m.mu.Unlock()
	held := rootMapOf(c)
	m.held[c.Namespace] = held
	m.look(c.Namespace)
	if !m.good(held) && (held.sum != m.wrote[c.Namespace].sum || !held.labeled) {
		m.undone(c.Namespace)
	}
}

const (
	undoneWithin = 10 * time.Second
	undoneTimes  = 3
)

// undone counts what is taken back soon after it was written: changed, unlabeled or
// deleted.
func (m *rootMaps) undone(namespace string) {
	last, ours := m.wrote[namespace]
	switch {
	case !ours || m.namespaces[namespace]: // one that is going takes it along
		return
	case time.Since(last.at) > undoneWithin:
		last.undone = 0
	default:
		if last.undone++; last.undone >= undoneTimes {
			m.contested = namespace
		}
	}
	m.wrote[namespace] = last
}

func (m *rootMaps) dropMap(c *corev1.ConfigMap) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.held, c.Namespace)
	m.look(c.Namespace)
	m.undone(c.Namespace)
}

func (m *rootMaps) replaceMaps(all []*corev1.ConfigMap) {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.held)
	for _, c := range all {
		m.held[c.Namespace] = rootMapOf(c)
	}
	m.synced[watchRootMaps] = true
	m.lookAtAll()
}

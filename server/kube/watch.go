package kube

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// sink is the part of the index that one watch feeds: client-go's reflector
// hands over objects, and only what is needed of them is kept.
type sink[T runtime.Object] struct {
	set     func(T)
	drop    func(T)
	replace func([]T)
}

func (s sink[T]) Add(o any) error    { s.set(o.(T)); return nil }
func (s sink[T]) Update(o any) error { s.set(o.(T)); return nil }
func (s sink[T]) Delete(o any) error { s.drop(o.(T)); return nil }
func (s sink[T]) Resync() error      { return nil }

func (s sink[T]) Replace(list []any, _ string) error {
	all := make([]T, len(list))
	for i, o := range list {
		all[i] = o.(T)
	}
	s.replace(all)
	return nil
}

// run keeps the index current until ctx ends.
func (c *cluster) run(ctx context.Context, log *slog.Logger) {
	x := c.index
	tell := &teller{log: log, cluster: c.name, lost: func(attrs ...slog.Attr) {
		log.LogAttrs(ctx, slog.LevelWarn, "the cluster can't be watched: after a minute nothing is signed for its pods", attrs...)
	}}
	nodes := sink[*corev1.Node]{set: x.setNode, drop: func(n *corev1.Node) { x.dropNode(n.Name) }, replace: x.replaceNodes}
	pods := sink[*corev1.Pod]{set: x.setPod, drop: func(p *corev1.Pod) { x.dropPod(podKey(p)) }, replace: x.replacePods}
	done := make(chan struct{})
	go func() {
		defer close(done)
		source{
			api: c.api, tell: tell, resource: "nodes", list: &corev1.NodeList{}, object: &corev1.Node{},
			setOpen: func(is bool) { x.setOpen(watchNodes, is) },
		}.follow(ctx, nodes)
	}()
	source{
		api: c.api, tell: tell, resource: "pods", list: &corev1.PodList{}, object: &corev1.Pod{},
		setOpen: func(is bool) { x.setOpen(watchPods, is) },
	}.follow(ctx, pods)
	<-done
}

// source is all objects of a resource, or those that have a name.
type source struct {
	api          *api
	tell         *teller
	resource     string
	name         string // empty: all
	list, object runtime.Object
	setOpen      func(bool) // one more watch is open, or one less
}

// follow keeps a sink current until ctx ends. A watch that first tells all that
// there is counts as open once that is in the sink: until then the sink has what
// there was when the watch before broke.
func (s source) follow(ctx context.Context, into cache.ReflectorStore) {
	var listing *opening // the last watch of that kind
	into = replacing{into, func() {
		if listing != nil {
			listing.done()
		}
	}}
	watched := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			out := s.list.DeepCopyObject()
			return out, s.tell.result(ctx, s.resource, s.get(o).Do(ctx).Into(out))
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.Watch, o.AllowWatchBookmarks = true, true
			w, err := s.get(o).Watch(ctx)
			if err := s.tell.result(ctx, s.resource, err); err != nil {
				return nil, err
			}
			one := &opening{set: s.setOpen}
			if o.SendInitialEvents != nil && *o.SendInitialEvents {
				listing = one
			} else {
				one.done()
			}
			return notice(w, one.end), nil
		},
	}
	quiet := logr.Discard()
	r := cache.NewReflectorWithOptions(watched, s.object, into, cache.ReflectorOptions{
		Name: s.api.cluster + "/" + s.resource, Logger: &quiet,
		// A server is one client of each API server, and what it does not know keeps
		// pods waiting: its pauses are shorter than client-go's, which grow to a minute.
		Backoff: &wait.Backoff{Duration: time.Second / 2, Cap: 5 * time.Second, Steps: 10, Factor: 2, Jitter: 1},
	})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.RunWithContext(logr.NewContext(ctx, quiet))
	}()
	// Between attempts to reach an API server that is away the reflector sleeps,
	// whatever becomes of ctx.
	select {
	case <-ended:
	case <-ctx.Done():
	}
}

// replacing tells when a sink has been given all that there is.
type replacing struct {
	cache.ReflectorStore
	replaced func()
}

func (r replacing) Replace(list []any, version string) error {
	err := r.ReflectorStore.Replace(list, version)
	if err == nil {
		r.replaced()
	}
	return err
}

// opening is a watch on its way to be open, and to its end, which may come first.
type opening struct {
	set func(open bool)

	mu          sync.Mutex
	open, ended bool
}

func (o *opening) done() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.open && !o.ended {
		o.open = true
		o.set(true)
	}
}

func (o *opening) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open && !o.ended {
		o.set(false)
	}
	o.ended = true
}

func (s source) get(o metav1.ListOptions) *rest.Request {
	if s.name != "" {
		o.FieldSelector = "metadata.name=" + s.name // for which a right to that name is enough
	}
	r := s.api.core.Get().Resource(s.resource).VersionedParams(&o, metav1.ParameterCodec)
	if o.TimeoutSeconds != nil {
		r = r.Timeout(time.Duration(*o.TimeoutSeconds) * time.Second)
	}
	return r
}

// teller logs why a cluster can't be watched: at once, then once a minute, and
// that it can be again.
type teller struct {
	log     *slog.Logger
	cluster string
	lost    func(...slog.Attr) // logs what it means

	mu   sync.Mutex
	told map[string]time.Time // by resource; only while it can't be watched
}

const tellEvery = time.Minute

func (t *teller) result(ctx context.Context, resource string, err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	last, failing := t.told[resource]
	attrs := []slog.Attr{slog.String("cluster", t.cluster), slog.String("resource", resource)}
	switch {
	case err == nil && failing:
		delete(t.told, resource)
		t.log.LogAttrs(ctx, slog.LevelInfo, "the cluster can be watched again", attrs...)
	case err != nil && ctx.Err() == nil && (!failing || time.Since(last) >= tellEvery):
		if t.told == nil {
			t.told = map[string]time.Time{}
		}
		t.told[resource] = time.Now()
		t.lost(append(attrs, slog.String("error", err.Error()))...)
	}
	return err
}

// noticed is a watch whose end is noticed, whoever ends it.
type noticed struct {
	watch.Interface
	events chan watch.Event
	stop   context.CancelFunc
}

func notice(w watch.Interface, ended func()) *noticed {
	ctx, stop := context.WithCancel(context.Background())
	n := &noticed{Interface: w, events: make(chan watch.Event), stop: stop}
	go func() {
		defer ended()
		defer close(n.events)
		for e := range w.ResultChan() {
			select {
			case n.events <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return n
}

func (n *noticed) ResultChan() <-chan watch.Event { return n.events }

func (n *noticed) Stop() {
	n.Interface.Stop()
	n.stop()
}

package kube

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

func node(name, uid string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(uid)}}
}

func pod(name, uid, on string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(uid)},
		Spec:       corev1.PodSpec{NodeName: on, ServiceAccountName: "web"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
}

// watched is an index of two nodes, as it is when both watches are open.
func watched(pods ...*corev1.Pod) *index {
	x := newIndex("prod")
	x.replaceNodes([]*corev1.Node{node("a", "uid-a"), node("b", "uid-b")})
	x.replacePods(pods)
	x.setOpen(watchNodes, true)
	x.setOpen(watchPods, true)
	return x
}

func clustersOf(t *testing.T, cfg Config, indexes ...*index) *Clusters {
	t.Helper()
	cfg = cfg.WithDefaults()
	template, err := NewTemplate(example, "/assay/", cfg.Template)
	if err != nil {
		t.Fatal(err)
	}
	c := &Clusters{cfg: cfg, template: template, byName: map[string]*cluster{}}
	for _, x := range indexes {
		c.byName[x.cluster] = &cluster{name: x.cluster, index: x}
	}
	return c
}

// NEG-22, NEG-23: what runs on a node is what the API server says that runs
// there, and nothing that has ended or is gone.
func TestAPodIsOnItsNodeAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended, failed, pending, waiting := pod("e", "p-e", "a"), pod("f", "p-f", "a"), pod("p", "p-p", "a"), pod("w", "p-w", "")
		ended.Status.Phase, failed.Status.Phase, pending.Status.Phase = corev1.PodSucceeded, corev1.PodFailed, corev1.PodPending
		stopping := pod("s", "p-s", "a")
		soon := metav1.NewTime(time.Now().Add(time.Minute))
		stopping.DeletionTimestamp = &soon
		static := pod("k", "mirror", "a")
		static.Spec.ServiceAccountName = ""
		static.Annotations = map[string]string{configHash: "0123456789abcdef0123456789abcdef", configMirror: "0123456789abcdef0123456789abcdef"}
		// A pod that says that it is another one, or a static one.
		thief := pod("t", "p-t", "a")
		thief.Annotations = map[string]string{configHash: "p-1", configMirror: "p-1"}
		false1 := pod("u", "p-u", "a")
		false1.Annotations = static.Annotations
		x := watched(pod("1", "p-1", "a"), pod("2", "p-2", "b"), ended, failed, pending, waiting, stopping, static, thief, false1)
		c := clustersOf(t, Config{}, x)
		on := func(nodeUID, podUID, reason string) {
			t.Helper()
			_, err := c.PodOn(Place{"prod", nodeUID}, podUID)
			if err == nil && reason != "" || err != nil && fault.ReasonOf(err) != reason {
				t.Errorf("pod %s on %s: %v, want %q", podUID, nodeUID, err, reason)
			}
		}
		const none = "no_such_workload_on_node"
		for uid, reason := range map[string]string{
			"p-1": "", "p-2": none, "p-e": none, "p-f": none, "p-p": "", "p-w": none, "p-s": "", "": none, "mirror": none, "p-t": "", "p-u": "",
			"0123456789abcdef0123456789abcdef": "",
		} {
			on("uid-a", uid, reason)
		}
		on("uid-b", "p-2", "")
		on("uid-c", "p-1", none)
		if _, err := c.PodOn(Place{"other", "uid-a"}, "p-1"); fault.ReasonOf(err) != none {
			t.Error(err)
		}
		<-time.After(time.Minute + grace + time.Second)
		on("uid-a", "p-s", none) // its time to stop is over

		x.dropPod("shop/1")
		on("uid-a", "p-1", none)
		x.setPod(pod("1", "p-1b", "b")) // made anew elsewhere under its name
		on("uid-a", "p-1b", none)
		on("uid-b", "p-1b", "")
		x.setNode(node("b", "uid-b2")) // a node made anew under its name has none of the old one's
		on("uid-b", "p-1b", none)
		on("uid-b2", "p-1b", "")
		x.dropNode("b")
		on("uid-b2", "p-1b", none)

		wants := func(at Place, reason string, texts ...string) {
			t.Helper()
			var list []selector.Selector
			for _, text := range texts {
				list = append(list, selector.Selector{Type: "k8s", Value: text})
			}
			if err := c.Runs(at, selector.NewSet(list...)); err == nil && reason != "" || err != nil && fault.ReasonOf(err) != reason {
				t.Errorf("%v: %v, want %q", texts, err, reason)
			}
		}
		x.replacePods([]*corev1.Pod{pod("1", "p-1", "a")})
		wants(Place{"prod", "uid-a"}, "", "ns:shop", "sa:web")
		wants(Place{"prod", "uid-a"}, "", "cluster:prod", "pod-name:1", "pod-uid:p-1", "node-name:a")
		wants(Place{"prod", "uid-a"}, none, "ns:shop", "sa:other")
		wants(Place{"prod", "uid-b"}, none, "ns:shop", "sa:web")
		wants(Place{"other", "uid-a"}, none, "ns:shop", "sa:web")
	})
}

// NEG-23: what the server does not know for sure it does not go by; a watch that
// breaks for a moment changes nothing.
func TestAnIndexThatIsNotCurrentIsNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newIndex("prod")
		c := clustersOf(t, Config{}, x)
		usable := func(want bool) {
			t.Helper()
			_, err := c.PodOn(Place{"prod", "uid-a"}, "p-1")
			if want && err != nil || !want && fault.ReasonOf(err) != "pod_index_not_synced" {
				t.Errorf("%v, want usable %v", err, want)
			}
			if rerr := c.Runs(Place{"prod", "uid-a"}, nil); (rerr == nil) != want {
				t.Errorf("Runs: %v", rerr)
			}
		}
		usable(false)
		x.replaceNodes([]*corev1.Node{node("a", "uid-a")})
		x.setOpen(watchNodes, true)
		usable(false)
		x.replacePods([]*corev1.Pod{pod("1", "p-1", "a")})
		x.setOpen(watchPods, true)
		usable(true)
		<-time.After(time.Hour)
		usable(true)
		x.setOpen(watchPods, false)
		<-time.After(maxStale)
		usable(true)
		<-time.After(time.Second)
		usable(false)
		x.setOpen(watchPods, true)
		usable(true)
		x.setOpen(watchPods, true) // the next one begins before the last is seen to end
		x.setOpen(watchPods, false)
		<-time.After(time.Hour)
		usable(true)
	})
}

func texts(c Change) string {
	var got []string
	for _, p := range c.Pods {
		got = append(got, p.Name)
	}
	slices.Sort(c.Removed)
	return fmt.Sprint(c.Snapshot, got, c.Removed)
}

func TestAFeedTellsWhatChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newIndex("prod")
		c := clustersOf(t, Config{}, x)
		f := c.Follow(Place{"prod", "uid-a"})
		defer f.Close()
		got := make(chan Change)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			for {
				change, err := f.Next(ctx)
				if err != nil {
					done <- err
					return
				}
				got <- change
			}
		}()
		expect := func(want string) {
			t.Helper()
			synctest.Wait()
			select {
			case change := <-got:
				if texts(change) != want {
					t.Errorf("got %s, want %s", texts(change), want)
				}
			default:
				if want != "" {
					t.Errorf("got nothing, want %s", want)
				}
			}
		}
		expect("") // nothing is known yet
		x.replaceNodes([]*corev1.Node{node("a", "uid-a"), node("b", "uid-b")})
		expect("")
		x.replacePods([]*corev1.Pod{pod("1", "p-1", "a"), pod("2", "p-2", "b")})
		expect("true [1] []")
		x.setPod(pod("1", "p-1", "a")) // as it was
		x.setPod(pod("3", "p-3", "b")) // another node's
		expect("")
		x.setPod(pod("4", "p-4", "a"))
		expect("false [4] []")
		x.dropPod("shop/1")
		expect("false [] [p-1]")
		ended := pod("4", "p-4", "a")
		ended.Status.Phase = corev1.PodSucceeded
		x.setPod(ended)
		expect("false [] [p-4]")
		stopping := pod("5", "p-5", "a")
		soon := metav1.NewTime(time.Now().Add(time.Minute))
		stopping.DeletionTimestamp = &soon
		x.setPod(stopping)
		expect("false [5] []")
		<-time.After(time.Minute + grace + lingering + time.Second) // nobody tells that its time is over
		expect("false [] [p-5]")
		x.replacePods([]*corev1.Pod{pod("6", "p-6", "a")}) // the watch began anew
		expect("false [6] []")
		cancel()
		if err := <-done; fault.ReasonOf(err) != "stream_ended" {
			t.Error(err)
		}
		if c.Follow(Place{"other", "x"}) != nil {
			t.Error("an unknown cluster has a feed")
		}
	})
}

func TestTemplates(t *testing.T) {
	for text, ok := range map[string]bool{
		"/ns/{namespace}/sa/{service_account}":                   true,
		"/cluster/{cluster}/ns/{namespace}/sa/{service_account}": true,
		"/{namespace}/{service_account}":                         true,
		"/ns/{namespace}":                                        false, // two pods of a namespace would be one
		"/sa/{service_account}":                                  false,
		"/{namespace}/{namespace}/{service_account}":             false,
		"/ns-{namespace}/{service_account}":                      false,
		"/{pod}/{namespace}/{service_account}":                   false,
		"ns/{namespace}/{service_account}":                       false,
		"/a b/{namespace}/{service_account}":                     false,
		"/../{namespace}/{service_account}":                      false,
		"/{namespace}/{service_account}/":                        false,
		"":                                                       false,
	} {
		if _, err := NewTemplate(example, "/assay/", text); (err == nil) != ok || err != nil && fault.ReasonOf(err) != "config_kubernetes" {
			t.Errorf("%q: %v", text, err)
		}
	}
	two := map[string]ClusterConfig{"a": {AgentServiceAccounts: []string{"x/y"}}, "b": {AgentServiceAccounts: []string{"x/y"}}}
	for name, tc := range map[string]struct {
		cfg Config
		ok  bool
	}{
		"two clusters that collide": {Config{Clusters: two}, false},
		"that mean the same":        {Config{Clusters: two, NamespaceSameness: true}, true},
		"told apart":                {Config{Clusters: two, Template: "/{cluster}/ns/{namespace}/sa/{service_account}"}, true},
		"a reserved template":       {Config{Template: "/assay/{namespace}/{service_account}"}, false},
		"a negative life":           {Config{Rules: []Rule{{ServiceAccounts: []string{"a/b"}, X509SVIDTTL: -1}}}, false},
		"a life of no identity":     {Config{Rules: []Rule{{ServiceAccounts: []string{"a/b"}, NoIdentity: true, X509SVIDTTL: 1}}}, false},
		"a rule for nobody":         {Config{Rules: []Rule{{NoIdentity: true}}}, false},
		"a rule for half a name":    {Config{Rules: []Rule{{ServiceAccounts: []string{"kube-system"}}}}, false},
		"a rule of a pattern":       {Config{Rules: []Rule{{ServiceAccounts: []string{"[a-z]/x"}}}}, false},
		"rules":                     {Config{Rules: []Rule{{ServiceAccounts: []string{"kube-*/*", "*/default", "shop/web.1"}}}}, true},
		"none":                      {Config{}, true},
	} {
		if err := tc.cfg.WithDefaults().Check(example, "/assay/"); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestIdentitiesFromTheTemplate(t *testing.T) {
	c := clustersOf(t, Config{Template: "/{namespace}/{cluster}/{service_account}", Rules: []Rule{
		{ServiceAccounts: []string{"kube-*/*"}, NoIdentity: true},
		{ServiceAccounts: []string{"bank/x", "bank/w*"}, X509SVIDTTL: time.Minute},
		{ServiceAccounts: []string{"shop/web", "assay/*", "bank/*"}},
		{ServiceAccounts: []string{"*/*"}, NoIdentity: true},
	}})
	for namespace, want := range map[string]string{
		"shop": "spiffe://example.org/shop/prod/web", "bank": "spiffe://example.org/bank/prod/web", "kube-system": "", "assay": "", "else": "",
	} {
		p := newPod(pod("1", "u", "a"))
		p.Namespace = namespace
		id, ttl, ok := c.Identity("prod", p)
		if ok != (want != "") || ok && id.String() != want || (ttl == time.Minute) != (namespace == "bank") {
			t.Errorf("%s: %v %v %v, want %q", namespace, id, ttl, ok, want)
		}
	}
	for id, want := range map[string]Fields{"/shop/prod/web": {"prod", "shop", "web"}, "/shop/web": {}, "/a/b/c/d": {}} {
		if got, ok := c.template.Fields(spiffeid.RequireFromPath(example, id)); ok != (want != Fields{}) || got != want {
			t.Errorf("%s: %+v", id, got)
		}
	}
	id := spiffeid.RequireFromPath(example, "/shop/prod/web")
	set := selector.NewSet(selector.Selector{Type: "k8s", Value: "ns:shop"}, selector.Selector{Type: "k8s", Value: "sa:web"})
	if err := c.CheckEntry(id, set); fault.ReasonOf(err) != "entry_in_template_range" {
		t.Errorf("an entry for another cluster's pods: %v", err)
	}
	if err := c.CheckEntry(id, selector.NewSet(append(set, selector.Selector{Type: "k8s", Value: "cluster:prod"})...)); err != nil {
		t.Error(err)
	}
}

func TestEntriesInTheTemplatesRange(t *testing.T) {
	c := clustersOf(t, Config{})
	var none *Clusters
	for name, tc := range map[string]struct {
		path  string
		texts []string
		ok    bool
	}{
		"agreeing":            {"/ns/shop/sa/web", []string{"ns:shop", "sa:web"}, true},
		"narrower":            {"/ns/shop/sa/web", []string{"ns:shop", "sa:web", "pod-name:x"}, true},
		"without an account":  {"/ns/shop/sa/web", []string{"ns:shop"}, false},
		"of another":          {"/ns/shop/sa/web", []string{"ns:shop", "sa:other"}, false},
		"of no pod":           {"/ns/shop/sa/web", nil, false},
		"outside":             {"/ns/shop/web", nil, true},
		"outside, other word": {"/namespace/shop/sa/web", nil, true},
	} {
		var list []selector.Selector
		for _, text := range tc.texts {
			list = append(list, selector.Selector{Type: "k8s", Value: text})
		}
		list = append(list, selector.Selector{Type: "unix", Value: "uid:0"})
		id := spiffeid.RequireFromPath(example, tc.path)
		if err := c.CheckEntry(id, selector.NewSet(list...)); (err == nil) != tc.ok || err != nil && fault.ReasonOf(err) != "entry_in_template_range" {
			t.Errorf("%s: %v", name, err)
		}
		if err := none.CheckEntry(id, nil); err != nil {
			t.Error(err)
		}
	}
}

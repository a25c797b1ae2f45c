package kube

import (
	"errors"
	"net/http"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// ZT-7: what is not known yet is looked for where it is known at once; nobody
// hears no because the server was behind.
func TestAPodThatIsNotKnownYetIsLookedFor(t *testing.T) {
	f := newFake(t)
	c := f.clusters()
	x := c.byName["prod"].index
	runs := func() error { return c.RunsOn(t.Context(), "prod", "node-1", "assay", "web") }
	if err := runs(); fault.KindOf(err) != fault.NotReady {
		t.Errorf("before anything is known: %v", err)
	}
	x.replaceNodes(nil)
	x.replacePods(nil)
	x.setOpen(watchNodes, true)
	x.setOpen(watchPods, true)
	web := func(change func(*corev1.Pod)) corev1.Pod {
		p := corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "assay", Name: "web-1", UID: "web-uid"},
			Spec:       corev1.PodSpec{ServiceAccountName: "web", NodeName: "node-1"},
		}
		if change != nil {
			change(&p)
		}
		return p
	}
	now := metav1.NewTime(time.Now().Add(time.Minute))
	for name, tc := range map[string]struct {
		pods []corev1.Pod
		ok   bool
	}{
		"a pod that is being started": {[]corev1.Pod{web(nil)}, true},
		"none":                        {nil, false},
		"another account":             {[]corev1.Pod{web(func(p *corev1.Pod) { p.Spec.ServiceAccountName = "web2" })}, false},
		"another node":                {[]corev1.Pod{web(func(p *corev1.Pod) { p.Spec.NodeName = "node-2" })}, false},
		"one that has ended":          {[]corev1.Pod{web(func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })}, false},
		"one that failed":             {[]corev1.Pod{web(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })}, false},
		"one that is being deleted":   {[]corev1.Pod{web(func(p *corev1.Pod) { p.DeletionTimestamp = &now })}, false},
		"beside others":               {[]corev1.Pod{web(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }), web(nil)}, true},
	} {
		f.list = tc.pods
		err := runs()
		if (err == nil) != tc.ok || err != nil && fault.ReasonOf(err) != "no_such_workload_on_node" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !slices.Contains(f.asked, "GET /api/v1/namespaces/assay/pods") {
		t.Errorf("asked for %v", f.asked)
	}
	f.code = http.StatusInternalServerError
	if err := runs(); !errors.Is(err, fault.NotReady) {
		t.Errorf("without an answer: %v", err)
	}
	asked := len(f.asked)
	pod := web(nil)
	x.setPod(&pod)
	if err := runs(); err != nil || len(f.asked) != asked {
		t.Errorf("a pod that is known: %v, asked for %v", err, f.asked[asked:])
	}
}

// Whose a token is has a node while its pod runs, by what is known or by the API
// server.
func TestWhereTheHolderOfATokenIs(t *testing.T) {
	account := Account{Cluster: "prod", Namespace: "assay", Name: "assay-agent", PodName: "agent-x", PodUID: "pod-uid", NodeName: "node-1"}
	with := func(change func(*Account)) Account { a := account; change(&a); return a }
	for name, tc := range map[string]struct {
		account Account
		spoil   func(*fakeAPI)
		reason  string
	}{
		"runs":            {account, nil, ""},
		"gone":            {account, func(f *fakeAPI) { f.pod = nil }, "pod_gone"},
		"replaced":        {account, func(f *fakeAPI) { f.pod.UID = "new" }, "pod_replaced"},
		"another account": {account, func(f *fakeAPI) { f.pod.Spec.ServiceAccountName = "x" }, "service_account"},
		"on another node": {account, func(f *fakeAPI) { f.pod.Spec.NodeName = "node-2" }, "node_mismatch"},
		"on no node":      {with(func(a *Account) { a.NodeName = "" }), func(f *fakeAPI) { f.pod.Spec.NodeName = "" }, "node_mismatch"},
		"ended":           {account, func(f *fakeAPI) { f.pod.Status.Phase = corev1.PodSucceeded }, "pod_ended"},
		"no pod":          {with(func(a *Account) { a.PodName, a.PodUID = "", "" }), nil, "not_bound"},
		"no cluster":      {with(func(a *Account) { a.Cluster = "other" }), nil, "cluster_unknown"},
		"no answer":       {account, func(f *fakeAPI) { f.code = http.StatusInternalServerError }, "kubernetes_unavailable"},
	} {
		for _, known := range []bool{false, true} { // an index that has it says the same, and asks nobody
			f := newFake(t)
			if tc.spoil != nil {
				tc.spoil(f)
			}
			c := f.clusters()
			if known {
				if f.pod == nil || f.code != 0 {
					continue
				}
				c.byName["prod"].index.setPod(f.pod)
			}
			node, err := c.NodeOf(t.Context(), tc.account)
			if tc.reason == "" && (err != nil || node != "node-1") || tc.reason != "" && fault.ReasonOf(err) != tc.reason {
				t.Errorf("%s, known %v: %q, %v", name, known, node, err)
			}
			if known && tc.reason == "" && len(f.asked) > 0 {
				t.Errorf("%s: asked for %v", name, f.asked)
			}
		}
	}
}

// A token whose pod is over proves nothing: by what is known, and where the API
// server has not judged the token itself, by asking for the pod.
func TestATokenWhosePodIsOver(t *testing.T) {
	account := Account{Cluster: "prod", Namespace: "assay", Name: "assay-agent", PodName: "agent-x", PodUID: "pod-uid"}
	past := metav1.NewTime(time.Now().Add(-time.Hour))
	for name, tc := range map[string]struct {
		known   func(*corev1.Pod) // nil: the index does not have it
		now     func(*fakeAPI)    // what the API server has meanwhile; nil: the same
		reason  string            // for a token that was reviewed
		byClaim string            // for one that was not
	}{
		"runs":            {func(*corev1.Pod) {}, nil, "", ""},
		"ended":           {func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, nil, "pod_ended", "pod_ended"},
		"deleted":         {func(p *corev1.Pod) { p.DeletionTimestamp = &past }, nil, "pod_deleted", "pod_deleted"},
		"another account": {func(p *corev1.Pod) { p.Spec.ServiceAccountName = "x" }, nil, "service_account", "service_account"},
		"replaced":        {func(p *corev1.Pod) { p.UID = "new" }, nil, "", "pod_replaced"},
		"new":             {nil, nil, "", ""},
		"gone":            {nil, func(f *fakeAPI) { f.pod = nil }, "", "pod_gone"},
		"no answer":       {nil, func(f *fakeAPI) { f.code = http.StatusInternalServerError }, "", "kubernetes_unavailable"},
	} {
		for _, reviewed := range []bool{true, false} {
			f := newFake(t)
			c := f.clusters()
			x := c.byName["prod"].index
			x.replaceNodes(nil)
			x.replacePods(nil)
			x.setOpen(watchNodes, true)
			x.setOpen(watchPods, true)
			if tc.known != nil {
				tc.known(f.pod)
				x.setPod(f.pod)
			}
			if tc.now != nil {
				tc.now(f)
			}
			a, want := account, tc.byClaim
			if a.Reviewed = reviewed; reviewed {
				want = tc.reason
			}
			err := c.CheckBound(t.Context(), a)
			if (err == nil) != (want == "") || err != nil && fault.ReasonOf(err) != want {
				t.Errorf("%s, reviewed %v: %v, want %q", name, reviewed, err, want)
			}
			if reviewed && len(f.asked) > 0 {
				t.Errorf("%s: asked for %v", name, f.asked)
			}
		}
	}
	f := newFake(t)
	c := f.clusters()
	c.byName["prod"].index.setPod(f.pod)
	f.pod = nil
	if err := c.CheckBound(t.Context(), account); fault.ReasonOf(err) != "pod_gone" {
		t.Errorf("by an index that is not current: %v", err)
	}
	account.Cluster = "other"
	if err := c.CheckBound(t.Context(), account); err != nil {
		t.Errorf("of a cluster that is not watched: %v", err)
	}
}

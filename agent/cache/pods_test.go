package cache_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// pod makes a pod with the identity that the template gives it.
func pod(uid, ns, sa string) *agentv1.Pod {
	p := &agentv1.Pod{Uid: uid, Identity: &agentv1.Entry{
		Id: "pod/" + uid, SpiffeId: "spiffe://example.org/ns/" + ns + "/sa/" + sa,
		Selectors: []*agentv1.Selector{{Type: "k8s", Value: "pod-uid:" + uid}},
	}}
	for _, value := range []string{"ns:" + ns, "sa:" + sa, "pod-uid:" + uid} {
		p.Selectors = append(p.Selectors, &agentv1.Selector{Type: "k8s", Value: value})
	}
	return p
}

// in is what the attestor says of a process of a pod, if need be of one
// container of it.
func in(uid string, container ...string) selector.Set {
	list := sel("unix:uid:1", "k8s:pod-uid:"+uid)
	for _, id := range container {
		list = append(list, sel("k8s:container-id:"+id)...)
	}
	return selector.NewSet(list...)
}

// inCluster is inBubble on a node of Kubernetes.
func inCluster(t *testing.T, do func(t *testing.T, f *fake, a *agent)) {
	t.Helper()
	inBubble(t, func(t *testing.T, f *fake, a *agent) {
		f.pods = map[string]*agentv1.Pod{}
		do(t, f, a)
	})
}

// A pod's SVID is there before its process asks, comes before those of entries,
// and ends with the pod, for all that is served to its processes.
func TestAPodIsServedForAsLongAsItIsThere(t *testing.T) {
	inCluster(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("e", "extra", "k8s:ns:shop"), entry("other", "other", "k8s:ns:bank"), entry("tool", "tool", "k8s:host:true"))
		a.start()
		f.run(pod("1", "shop", "web"), pod("2", "shop", "web"))
		synctest.Wait()
		if got := f.seen().signed; len(got) != 4 || slices.Contains(got, "other") {
			t.Errorf("signed %v", got) // one for each pod, none for a namespace that is not here
		}
		one, two := a.cache.Subscribe(in("1")), a.cache.Subscribe(in("2"))
		defer one.Close()
		defer two.Close()
		if set := one.Selectors(); !set.Contains(sel("k8s:ns:shop", "k8s:sa:web", "k8s:pod-uid:1", "unix:uid:1")) {
			t.Errorf("selectors %v", set)
		}
		wantPaths(t, one, "ns/shop/sa/web", "extra")
		wantPaths(t, two, "ns/shop/sa/web", "extra")
		first, second := must(one.Snapshot()), must(two.Snapshot())
		if first.SVIDs[0] == second.SVIDs[0] {
			t.Error("two pods share a key")
		}
		f.end("1")
		synctest.Wait()
		wantPaths(t, one, "!no_identity")
		wantPaths(t, two, "ns/shop/sa/web", "extra")

		// An entry whose pod comes later is signed then.
		f.run(pod("3", "bank", "db"))
		synctest.Wait()
		three := a.cache.Subscribe(in("3"))
		defer three.Close()
		wantPaths(t, three, "ns/bank/sa/db", "other")
		// Snapshots of entries leave pods alone, and the other way round.
		f.judge(fault.New(fault.NotReady, "x", "x"))
		f.judge(nil)
		f.with(func() { f.epoch = "epoch-2"; delete(f.pods, "2") })
		<-time.After(time.Minute)
		wantPaths(t, three, "ns/bank/sa/db", "other")
		wantPaths(t, two, "!no_identity")
	})
}

// What was signed for pods that are gone is held no longer than until somebody
// has to replace it, and holds up no rotation; when such a pod comes, it is
// signed anew.
func TestNothingIsHeldForPodsThatAreGone(t *testing.T) {
	inCluster(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("e", "extra", "k8s:ns:shop"))
		a.start()
		f.run(pod("1", "shop", "web"))
		synctest.Wait()
		if st := a.cache.Status(); st.SVIDs != 2 {
			t.Errorf("%d SVIDs", st.SVIDs)
		}
		f.end("1")
		old, next := f.signer, newAuthority("root 2")
		f.with(func() { f.signer = next })
		f.changeBundle(func() { f.bundled = append(f.bundled, next); old.tainted = true })
		synctest.Wait()
		if st := a.cache.Status(); st.SVIDs != 0 || len(f.seen().signed) != 2 {
			t.Errorf("%d SVIDs, signed %v", st.SVIDs, f.seen().signed)
		}
		f.run(pod("2", "shop", "web"))
		synctest.Wait()
		s := a.cache.Subscribe(in("2"))
		defer s.Close()
		wantPaths(t, s, "ns/shop/sa/web", "extra")
	})
}

// A caller whose pod is not known yet waits a moment for it.
func TestACallerWaitsForItsPod(t *testing.T) {
	inCluster(t, func(t *testing.T, f *fake, a *agent) {
		a.start()
		synctest.Wait()
		got := make(chan error, 1)
		ask := func(ctx context.Context) {
			go func() { got <- a.cache.AwaitPod(ctx, "1") }()
			synctest.Wait()
		}
		ask(t.Context())
		began := time.Now()
		if err := <-got; fault.ReasonOf(err) != "pod_unknown" || time.Since(began) != 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		ask(t.Context())
		f.run(pod("0", "shop", "web")) // another one
		synctest.Wait()
		f.run(pod("1", "shop", "web"))
		if err := <-got; err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		f.end("1")
		synctest.Wait()
		ask(ctx)
		cancel()
		if err := <-got; fault.ReasonOf(err) != "pod_unknown" {
			t.Error(err)
		}
	})
}

// A server that lies about a pod gives nobody the identity of another.
func TestPodsThatCannotBeServedAreLeftOut(t *testing.T) {
	inCluster(t, func(t *testing.T, f *fake, a *agent) {
		bad := map[string]func(*agentv1.Pod){
			"no-uid":         func(p *agentv1.Pod) { p.Uid = "" },
			"no-selectors":   func(p *agentv1.Pod) { p.Selectors = nil },
			"anothers":       func(p *agentv1.Pod) { p.Selectors[2].Value = "pod-uid:good" },
			"unix":           func(p *agentv1.Pod) { p.Selectors[0].Type = "unix" },
			"id-of-another":  func(p *agentv1.Pod) { p.Identity.Id = "pod/good" },
			"id-of-an-entry": func(p *agentv1.Pod) { p.Identity.Id = "e" },
			"for-a-whole-ns": func(p *agentv1.Pod) { p.Identity.Selectors[0].Value = "ns:shop" },
			"an-agent":       func(p *agentv1.Pod) { p.Identity.SpiffeId = "spiffe://example.org/assay/agent/x" },
		}
		f.set(entry("e", "e", "unix:uid:1"))
		a.start()
		f.run(pod("good", "shop", "web"))
		for uid, spoil := range bad {
			p := pod(uid, "shop", "web")
			spoil(p)
			f.mu.Lock()
			f.push(f.podsMessage(false, []*agentv1.Pod{p}))
			f.mu.Unlock()
		}
		synctest.Wait()
		good := a.cache.Subscribe(in("good"))
		defer good.Close()
		wantPaths(t, good, "ns/shop/sa/web", "e")
		if st := a.cache.Status(); st.Entries != 2 {
			t.Errorf("%d entries", st.Entries)
		}
		// One that was good and is not any more goes.
		p := pod("good", "shop", "web")
		p.Selectors = nil
		f.run(p)
		synctest.Wait()
		wantPaths(t, good, "!no_identity")
	})
}

// Pods outlast a restart of the agent while the server is away.
func TestPodsAreKeptOverARestart(t *testing.T) {
	inCluster(t, func(t *testing.T, f *fake, a *agent) {
		a.start()
		f.run(pod("1", "shop", "web"))
		<-time.After(10 * time.Second)
		f.judge(fault.New(fault.NotReady, "x", "x"))
		a.restart()
		synctest.Wait()
		if err := a.cache.AwaitPod(t.Context(), "1"); err != nil {
			t.Error(err)
		}
		s := a.cache.Subscribe(in("1"))
		defer s.Close()
		wantPaths(t, s, "ns/shop/sa/web")
		// What ended meanwhile is gone with the first word of the server.
		f.with(func() { clear(f.pods) })
		f.judge(nil)
		<-time.After(time.Minute)
		wantPaths(t, s, "!no_identity")
		if data := f.seen().signed; strings.Join(data, " ") != "pod/1" {
			t.Errorf("signed %v", data)
		}
	})
}

// An entry that waits for its pods is signed once they are known, however that
// comes about.
func TestAnEntryIsNotLeftWaitingForPodsThatAreHere(t *testing.T) {
	inCluster(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("typo", "typo", "k8s:ns:shp"), entry("late", "late", "k8s:ns:shop"))
		f.with(func() { f.refuse["late"] = fault.New(fault.NotReady, "pod_index_not_synced", "x") })
		a.start()
		f.run(pod("1", "shop", "web"))
		synctest.Wait()
		s := a.cache.Subscribe(in("1"))
		wantPaths(t, s, "ns/shop/sa/web")
		f.set(entry("typo", "typo", "k8s:ns:shop"))
		synctest.Wait()
		wantPaths(t, s, "ns/shop/sa/web", "typo")
		s.Close()
		<-time.After(10 * time.Second) // until it is sealed
		a.stop()
		f.with(func() { clear(f.refuse) })
		<-time.After(2 * time.Hour) // all that it has has ended
		a.start()
		<-time.After(time.Minute)
		s = a.cache.Subscribe(in("1"))
		defer s.Close()
		wantPaths(t, s, "ns/shop/sa/web", "late", "typo")
	})
}

// withContainer is a pod in which a container is known to run.
func withContainer(p *agentv1.Pod, id string, facts ...string) *agentv1.Pod {
	c := &agentv1.Container{Id: id}
	for _, value := range facts {
		c.Selectors = append(c.Selectors, &agentv1.Selector{Type: "k8s", Value: value})
	}
	p.Containers = append(p.Containers, c)
	return p
}

// What is true of a pod may change while its streams are open: they get what it
// is entitled to then, and nothing else changes for them.
func TestAChangedLabelChangesWhatAPodGets(t *testing.T) {
	inCluster(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("e", "blue", "k8s:ns:shop", "k8s:pod-label:color:blue"), entry("g", "green", "k8s:pod-label:color:green"))
		labelled := func(color string) *agentv1.Pod {
			p := pod("1", "shop", "web")
			p.Selectors = append(p.Selectors, &agentv1.Selector{Type: "k8s", Value: "pod-label:color:" + color})
			return p
		}
		a.start()
		f.run(labelled("blue"), pod("2", "shop", "web"))
		synctest.Wait()
		one, two := a.cache.Subscribe(in("1", "c")), a.cache.Subscribe(in("2", "d"))
		defer one.Close()
		defer two.Close()
		wantPaths(t, one, "ns/shop/sa/web", "blue")
		wantPaths(t, two, "ns/shop/sa/web")
		own := must(one.Snapshot()).SVIDs[0]
		f.run(labelled("green"))
		synctest.Wait()
		<-one.Changed()
		wantPaths(t, one, "ns/shop/sa/web", "green")
		if must(one.Snapshot()).SVIDs[0] != own {
			t.Error("the pod's own SVID was made anew")
		}
		select {
		case <-two.Changed():
			t.Error("another pod was told")
		default:
		}
		f.run(pod("1", "shop", "web"))
		synctest.Wait()
		wantPaths(t, one, "ns/shop/sa/web")
	})
}

// What a container is becomes known after its first process asks. Who may need
// that waits for it, nobody else does; and the facts of one container are not
// those of another in the same pod.
func TestACallerWaitsForItsContainerIfAnEntryGoesByIt(t *testing.T) {
	inCluster(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("proxy", "proxy", "k8s:ns:shop", "k8s:container-name:proxy"))
		a.start()
		f.run(pod("1", "shop", "web"), pod("2", "bank", "db"))
		synctest.Wait()
		proxy, app, other := a.cache.Subscribe(in("1", "aa")), a.cache.Subscribe(in("1", "bb")), a.cache.Subscribe(in("2", "cc"))
		defer proxy.Close()
		defer app.Close()
		defer other.Close()
		wantPaths(t, other, "ns/bank/sa/db")
		wantPaths(t, proxy, "!container_unknown")
		wantPaths(t, app, "!container_unknown")
		// What it gets first is all that it may have.
		hold := make(chan struct{})
		f.with(func() { f.hold = hold })
		f.run(withContainer(pod("1", "shop", "web"), "aa", "container-name:proxy", "container-image:proxy:1"))
		synctest.Wait()
		wantPaths(t, proxy, "!svid_pending")
		f.with(func() { f.hold = nil })
		close(hold)
		<-proxy.Changed()
		wantPaths(t, proxy, "ns/shop/sa/web", "proxy")
		// It waits no longer: what it is may come later, or never.
		wantPaths(t, app, "!container_unknown")
		app.Hurry()
		app.Hurry() // twice is once
		wantPaths(t, app, "ns/shop/sa/web")
		f.run(withContainer(withContainer(pod("1", "shop", "web"), "aa", "container-name:proxy"), "bb", "container-name:app"))
		synctest.Wait()
		wantPaths(t, app, "ns/shop/sa/web")
		wantPaths(t, proxy, "ns/shop/sa/web", "proxy")
		proxy.Hurry()
		wantPaths(t, proxy, "ns/shop/sa/web", "proxy")

		// One that is served waits for nothing when such an entry comes, and gets
		// it when it can be told.
		f.set(entry("db", "late", "k8s:ns:bank", "k8s:container-name:db"))
		synctest.Wait()
		wantPaths(t, other, "ns/bank/sa/db")
		f.run(withContainer(pod("2", "bank", "db"), "cc", "container-name:db"))
		synctest.Wait()
		wantPaths(t, other, "ns/bank/sa/db", "late")
		// And it is kept over a restart.
		<-time.After(10 * time.Second)
		f.judge(fault.New(fault.NotReady, "x", "x"))
		a.restart()
		synctest.Wait()
		again := a.cache.Subscribe(in("2", "cc"))
		defer again.Close()
		wantPaths(t, again, "ns/bank/sa/db", "late")
	})
}

// A stream hears of what is withdrawn and what is renewed, whatever is not known
// of its container, and whoever was served before it.
func TestAnUnknownContainerHidesNothingFromAStreamThatIsServed(t *testing.T) {
	inCluster(t, func(t *testing.T, f *fake, a *agent) {
		f.set(entry("e", "extra", "k8s:ns:shop"))
		a.start()
		f.run(pod("1", "shop", "web"))
		synctest.Wait()
		before := a.cache.Subscribe(in("1", "aa"))
		wantPaths(t, before, "ns/shop/sa/web", "extra")
		before.Close()
		s := a.cache.Subscribe(in("1", "aa"))
		defer s.Close()
		wantPaths(t, s, "ns/shop/sa/web", "extra")
		first := must(s.Snapshot()).SVIDs[0]
		f.set(entry("proxy", "proxy", "k8s:ns:shop", "k8s:container-name:proxy"))
		f.remove("e")
		synctest.Wait()
		if !notified(s) {
			t.Error("not told that an identity was withdrawn")
		}
		wantPaths(t, s, "ns/shop/sa/web")
		<-time.After(50 * time.Minute)
		if !notified(s) {
			t.Error("not told of a renewal")
		}
		wantPaths(t, s, "ns/shop/sa/web")
		if snap, err := s.Snapshot(); err == nil && snap.SVIDs[0] == first {
			t.Error("not renewed")
		}
	})
}

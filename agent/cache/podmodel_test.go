package cache_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// node is a world of pods, of which some run.
type node struct {
	*rand.Rand
	f    *fake
	a    *agent
	subs map[*cache.Subscription]where
}

// where is in which container of which pod a process is; none: in no pod.
type where struct{ pod, container string }

func (w where) process() selector.Set {
	if w.pod == "" {
		return sel("unix:uid:1", "k8s:host:true")
	}
	return in(w.pod, w.container)
}

func (n *node) pod() *agentv1.Pod {
	uid := n.IntN(4)
	p := pod(fmt.Sprint(uid), fmt.Sprint("ns", uid%2), "sa")
	if n.IntN(3) > 0 {
		p.Selectors = append(p.Selectors, &agentv1.Selector{Type: "k8s", Value: fmt.Sprint("pod-label:v:", n.IntN(3))})
	}
	for c := range n.IntN(3) {
		withContainer(p, fmt.Sprint("c", c), fmt.Sprint("container-name:", n.IntN(2)))
	}
	return p
}

func (n *node) entry() *agentv1.Entry {
	facts := []string{"k8s:ns:ns0", "k8s:ns:ns1", "k8s:pod-label:v:0", "k8s:pod-label:v:1", "k8s:container-name:0", "k8s:container-name:1", "unix:uid:1", "k8s:host:true"}
	list := []string{facts[n.IntN(len(facts))]}
	if n.IntN(2) == 0 {
		list = append(list, facts[n.IntN(len(facts))])
	}
	id := n.IntN(8)
	e := entry(fmt.Sprint("entry-", id), fmt.Sprint("path-", id, "-", n.IntN(2)), list...)
	e.CreatedAt = timestamppb.New(born.Add(time.Duration(id) * time.Second))
	return e
}

func (n *node) step() string {
	switch n.IntN(9) {
	case 0:
		id := fmt.Sprint("entry-", n.IntN(8))
		n.f.remove(id)
		return "remove " + id
	case 1, 2:
		e := n.entry()
		n.f.set(e)
		return fmt.Sprint("set ", e)
	case 3:
		w := where{}
		if n.IntN(5) > 0 {
			w = where{fmt.Sprint(n.IntN(4)), fmt.Sprint("c", n.IntN(2))}
		}
		n.subs[n.a.cache.Subscribe(w.process())] = w
		return fmt.Sprint("subscribe ", w)
	case 4:
		for s, w := range n.subs {
			s.Close()
			delete(n.subs, s)
			return fmt.Sprint("close ", w)
		}
	case 5:
		uid := fmt.Sprint(n.IntN(4))
		n.f.end(uid)
		return "end " + uid
	case 6:
		if n.IntN(4) == 0 {
			n.f.stop()
			n.f.set(n.entry())
			n.f.end(fmt.Sprint(n.IntN(4)))
			n.f.run(n.pod())
			n.f.start()
			time.Sleep(30 * time.Second)
			return "reconnect"
		}
		if n.IntN(8) == 0 {
			time.Sleep(40 * time.Minute)
			return "renew"
		}
	case 7:
		for s, w := range n.subs {
			s.Hurry()
			return fmt.Sprint("hurry ", w)
		}
	}
	p := n.pod()
	n.f.run(p)
	return fmt.Sprint("run ", p)
}

// want is what a process should have, and whether its container is known.
func (n *node) want(w where) ([]string, bool) {
	set := w.process()
	entries := map[string]*agentv1.Entry{}
	for id, e := range n.f.entries {
		entries[id] = e
	}
	known := true
	if w.pod != "" {
		p := n.f.pods[w.pod]
		if p == nil {
			return []string{"!no_identity"}, true
		}
		entries[p.GetIdentity().GetId()] = p.GetIdentity()
		lists := [][]*agentv1.Selector{p.GetSelectors()}
		known = false
		for _, c := range p.GetContainers() {
			if c.GetId() == w.container {
				known = true
				lists = append(lists, c.GetSelectors())
			}
		}
		for _, list := range lists {
			for _, s := range list {
				set = append(set, selector.Selector{Type: s.GetType(), Value: s.GetValue()})
			}
		}
	}
	return model(entries, set), known
}

// Whatever becomes of pods, their containers and entries, each process has what a
// look at all of them gives, and is told of all that changes for it. Who has nothing
// yet may wait for what its container is.
func TestProcessesOfPodsEqualTheNaiveModel(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			inCluster(t, func(t *testing.T, f *fake, a *agent) {
				n := &node{Rand: rand.New(rand.NewPCG(seed, 2)), f: f, a: a, subs: map[*cache.Subscription]where{}}
				served := map[*cache.Subscription]string{}
				a.start()
				synctest.Wait()
				for i := range 200 {
					before := map[*cache.Subscription]string{}
					for s := range n.subs {
						before[s] = content(s)
						notified(s)
					}
					what := n.step()
					synctest.Wait()
					for s, w := range n.subs {
						told, got, now := notified(s), paths(s), content(s)
						want, known := n.want(w)
						old, had := before[s]
						if got[0] == "!container_unknown" && !known && (!had || served[s] == "") {
							continue
						}
						if !slices.Equal(got, want) {
							t.Fatalf("step %d, %s: %v has %v, want %v", i, what, w, got, want)
						}
						if had && now != old && !told {
							t.Fatalf("step %d, %s: %v was not told; before %s, after %s", i, what, w, old, now)
						}
						if served[s] = now; got[0][0] == '!' { // its stream ends, or waits for a first message
							served[s] = ""
						}
					}
				}
			})
		})
	}
}

package cache_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// model says what a subscription should have by looking at every entry.
func model(entries map[string]*agentv1.Entry, set selector.Set) []string {
	var matching []*agentv1.Entry
	for _, e := range entries {
		all := true
		for _, s := range e.GetSelectors() {
			all = all && slices.Contains(set, selector.Selector{Type: s.GetType(), Value: s.GetValue()})
		}
		if all {
			matching = append(matching, e)
		}
	}
	if len(matching) == 0 {
		return []string{"!no_identity"}
	}
	slices.SortFunc(matching, func(a, b *agentv1.Entry) int {
		if c := a.GetCreatedAt().AsTime().Compare(b.GetCreatedAt().AsTime()); c != 0 {
			return c
		}
		return strings.Compare(a.GetId(), b.GetId())
	})
	var list []string
	taken := map[string]bool{}
	for _, e := range matching {
		if strings.HasPrefix(e.GetId(), "refused") || e.GetHint() != "" && taken[e.GetHint()] {
			continue
		}
		taken[e.GetHint()] = true
		list = append(list, strings.TrimPrefix(e.GetSpiffeId(), "spiffe://example.org/"))
	}
	if len(list) == 0 {
		return []string{"!svid_pending"}
	}
	return list
}

// content tells two answers apart as a workload would.
func content(s *cache.Subscription) string {
	snap, err := s.Snapshot()
	if err != nil {
		return fault.ReasonOf(err)
	}
	text := fmt.Sprint(snap.BundleSequence)
	for _, svid := range snap.SVIDs {
		text += fmt.Sprintf(" %p", svid) // SVIDs don't change
	}
	return text
}

type world struct {
	*rand.Rand
	f    *fake
	a    *agent
	ids  []string
	subs map[*cache.Subscription]selector.Set
}

func (w *world) selectors(n int) []string {
	var list []string
	for range n {
		list = append(list, fmt.Sprintf("unix:v:%d", w.IntN(5)))
	}
	return list
}

func (w *world) entry() *agentv1.Entry {
	e := entry(w.ids[w.IntN(len(w.ids))], fmt.Sprintf("p/%d", w.IntN(4)), w.selectors(1+w.IntN(3))...)
	e.CreatedAt = timestamppb.New(born.Add(time.Duration(w.IntN(3)) * time.Hour))
	if w.IntN(3) == 0 {
		e.Hint = fmt.Sprintf("h%d", w.IntN(2))
	}
	if w.IntN(4) == 0 {
		ttl(time.Duration(1+w.IntN(2)) * time.Hour)(e)
	}
	return e
}

// step changes something. It returns what, for the message of a failure.
func (w *world) step() string {
	switch w.IntN(8) {
	case 0:
		id := w.ids[w.IntN(len(w.ids))]
		w.f.remove(id)
		return "remove " + id
	case 1:
		list := []*agentv1.Entry{w.entry(), w.entry()}
		if list[0].GetId() == list[1].GetId() {
			list = list[:1]
		}
		w.f.set(list...)
		return fmt.Sprint("set ", list)
	case 2:
		set := sel(w.selectors(1 + w.IntN(5))...)
		w.subs[w.a.cache.Subscribe(set)] = set
		return fmt.Sprint("subscribe ", set)
	case 3:
		for s := range w.subs {
			s.Close()
			delete(w.subs, s)
			return "close"
		}
	case 4:
		old, next := w.f.signer, newAuthority("root")
		w.f.changeBundle(func() { w.f.bundled, w.f.signer, old.tainted = append(w.f.bundled, next), next, true })
		return "bundle"
	case 5:
		if w.IntN(4) == 0 {
			w.f.stop()
			w.f.set(w.entry())
			w.f.remove(w.ids[w.IntN(len(w.ids))])
			w.f.start()
			time.Sleep(30 * time.Second)
			return "reconnect"
		}
	}
	e := w.entry()
	w.f.set(e)
	return fmt.Sprint("set ", e)
}

// Whatever changes in whatever order, each subscription has what a look at all
// entries gives, and is told exactly when that is something else than before.
func TestSubscriptionsEqualTheNaiveModel(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, a *agent) {
				w := &world{Rand: rand.New(rand.NewPCG(seed, 1)), f: f, a: a, subs: map[*cache.Subscription]selector.Set{}}
				for i := range 12 {
					w.ids = append(w.ids, fmt.Sprint("entry-", i))
				}
				for i := range 3 {
					id := fmt.Sprint("refused-", i)
					w.ids = append(w.ids, id)
					f.refuse[id] = fault.New(fault.Denied, "no_such_workload_on_node", "x")
				}
				a.start()
				synctest.Wait()
				for n := range 150 {
					before := map[*cache.Subscription]string{}
					for s := range w.subs {
						before[s] = content(s)
						notified(s)
					}
					what := w.step()
					synctest.Wait()
					for s, set := range w.subs {
						told := notified(s)
						if got, want := paths(s), model(f.entries, set); !slices.Equal(got, want) {
							t.Fatalf("step %d, %s: %v has %v, want %v", n, what, set, got, want)
						}
						if old, ok := before[s]; ok && told != (content(s) != old) {
							t.Fatalf("step %d, %s: %v was told: %v; before %s, after %s", n, what, set, told, old, content(s))
						}
					}
				}
			})
		})
	}
}

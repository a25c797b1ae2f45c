package ca

import (
	"context"
	mathrand "math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
)

func order(operation string) Order {
	return Order{By: audit.Origin{RequestID: operation}, Who: "uid 0", Operation: operation, Reason: "friday"}
}

func (w *world) states(a *Authority) map[string]State {
	all := map[string]State{}
	for _, root := range a.Authorities() {
		all[root.ID] = root.State
	}
	return all
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// A rotation, step by step, with a second server that only watches: what was
// signed at any step verifies at both, at every later step until its root is
// revoked. // X509-34, BUN-4, FED-4
func TestARootIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, b := w.open(), w.open()
		start(t, a)
		start(t, b)
		first := a.Issuer().AuthorityID
		type held struct {
			req  X509Request
			svid X509SVID
		}
		var all []held
		verify := func() {
			t.Helper()
			synctest.Wait()
			for _, one := range []*Authority{a, b} {
				req := workload("/w")
				svids, err := one.IssueX509(t.Context(), w.origin(), []X509Request{req})
				w.must(err)
				w.must(svids[0].Err)
				all = append(all, held{req, svids[0]})
			}
			for _, h := range all {
				inspect(t, a, h.req, h.svid)
				inspect(t, b, h.req, h.svid)
			}
		}
		verify()

		next, err := a.Prepare(t.Context(), order("op"))
		w.must(err)
		if next.State != Prepared || next.Published != 2 || a.Issuer().AuthorityID != first {
			t.Errorf("prepared: %+v, signing under %s", next, a.Issuer().AuthorityID)
		}
		verify()

		w.must(a.Activate(t.Context(), next.ID, order("op")))
		if a.Issuer().AuthorityID != next.ID {
			t.Error("Activate returned and this server signs under the old root")
		}
		verify()
		if b.Issuer().AuthorityID != next.ID {
			t.Error("the other server signs under the old root")
		}
		w.must(a.Taint(t.Context(), first, order("op")))
		verify()

		all = slices.DeleteFunc(all, func(h held) bool { return h.svid.AuthorityID == first })
		w.must(b.Revoke(t.Context(), first, order("op")))
		verify()
		if roots := a.Bundle().Roots; len(roots) != 1 || roots[0].ID != next.ID {
			t.Errorf("the bundle after it: %+v", roots)
		}
		old := a.current.Load().view.find(first)
		if old.record.KeyRef != nil {
			t.Error("the key of a revoked root is still in the store")
		}
		var history []State
		for _, m := range old.root().Moves {
			history = append(history, m.To)
			if m.Who != "uid 0" || m.Reason != "friday" || m.Operation != "op" || m.At.IsZero() {
				t.Errorf("a move does not say who, when and why: %+v", m)
			}
		}
		if !slices.Equal(history, []State{Retired, Tainted, Revoked}) || a.Bundle().Sequence != 5 {
			t.Errorf("history %v, sequence %d", history, a.Bundle().Sequence)
		}
		for _, action := range []string{"root.prepare", "root.activate", "root.taint", "root.revoke"} {
			lines := w.audit.taken(action)
			if len(lines) != 1 || lines[0].Result.Code != "ok" || lines[0].Why.Reason != "friday" || lines[0].Target.AuthorityID == "" {
				t.Errorf("audit lines of %s: %+v", action, lines)
			}
		}
		w.open() // all of it verifies from the store
	})
}

// Every step may be asked for again by the same operation, after a crash or a
// lost answer.
func TestMovesAreIdempotent(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	first := a.Issuer().AuthorityID
	next, err := a.Prepare(t.Context(), order("op"))
	w.must(err)
	again, err := a.Prepare(t.Context(), order("op"))
	w.must(err)
	if again.ID != next.ID {
		t.Error("the same operation prepared two roots")
	}
	for _, step := range []func() error{
		func() error { return a.Activate(t.Context(), next.ID, order("op")) },
		func() error { return a.Taint(t.Context(), first, order("op")) },
		func() error { return a.Revoke(t.Context(), first, order("op")) },
	} {
		w.must(step())
		sequence := a.Bundle().Sequence
		w.must(step())
		if a.Bundle().Sequence != sequence {
			t.Error("a repeated step changed the bundle")
		}
	}
	again, err = a.Prepare(t.Context(), order("op"))
	w.must(err)
	if again.ID != next.ID || again.State != Active {
		t.Errorf("after the rotation its prepare gives %+v", again)
	}
}

func TestRefusedMovesChangeNothing(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	first := a.Issuer().AuthorityID
	check := func(name string, kind fault.Kind, reason string, err error) {
		t.Helper()
		wantReason(t, err, kind, reason)
		if t.Failed() {
			t.Fatal(name)
		}
	}
	refusals := func(moves map[string]func() error, kind fault.Kind, reason string) {
		t.Helper()
		for name, move := range moves {
			before, states := a.Bundle().Sequence, w.states(a)
			check(name, kind, reason, move())
			if a.Bundle().Sequence != before || len(w.states(a)) != len(states) {
				t.Errorf("%s: refused, and something changed", name)
			}
		}
	}
	ctx, o := t.Context(), order("op")
	refusals(map[string]func() error{
		"taint active":  func() error { return a.Taint(ctx, first, o) },
		"revoke active": func() error { return a.Revoke(ctx, first, o) },
	}, fault.Precondition, "authority_state")
	refusals(map[string]func() error{
		"activate": func() error { return a.Activate(ctx, "00", o) },
		"taint":    func() error { return a.Taint(ctx, "", o) },
		"revoke":   func() error { return a.Revoke(ctx, "00", o) },
	}, fault.NotFound, "authority_unknown")
	next, err := a.Prepare(ctx, o)
	w.must(err)
	refusals(map[string]func() error{
		"taint prepared": func() error { return a.Taint(ctx, next.ID, o) },
	}, fault.Precondition, "authority_state")
	refusals(map[string]func() error{
		"third root": func() error { _, err := a.Prepare(ctx, order("other")); return err },
	}, fault.Precondition, "rotation_in_progress")
	w.must(a.Activate(ctx, next.ID, o))
	w.must(a.Taint(ctx, first, o))
	refusals(map[string]func() error{
		"back to a tainted root": func() error { return a.Activate(ctx, first, o) },
	}, fault.Precondition, "authority_state")
	w.must(a.Revoke(ctx, first, o))
	refusals(map[string]func() error{
		"activate revoked": func() error { return a.Activate(ctx, first, o) },
		"taint revoked":    func() error { return a.Taint(ctx, first, o) },
	}, fault.Precondition, "authority_state")
	refused := 0
	for _, action := range []string{"root.prepare", "root.activate", "root.taint", "root.revoke"} {
		for _, line := range w.audit.taken(action) {
			if line.Result.Code != "ok" {
				refused++
			}
		}
	}
	if refused != 10 {
		t.Errorf("%d refusals are in the audit log, want 10", refused)
	}
}

// Both ways back: before anything was signed under the new root, and after.
func TestARotationIsTakenBack(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	first := a.Issuer().AuthorityID
	next, err := a.Prepare(t.Context(), order("1"))
	w.must(err)
	w.must(a.Revoke(t.Context(), next.ID, order("1")))
	if len(a.Bundle().Roots) != 1 || a.Issuer().AuthorityID != first {
		t.Error("the prepared root did not go")
	}
	next, err = a.Prepare(t.Context(), order("2"))
	w.must(err)
	w.must(a.Activate(t.Context(), next.ID, order("2")))
	issue(t, a, workload("/under/next"))
	w.must(a.Activate(t.Context(), first, order("2")))
	if a.Issuer().AuthorityID != first || w.states(a)[next.ID] != Retired {
		t.Error("the first root does not sign again")
	}
	issue(t, a, workload("/w"))
	w.must(a.Revoke(t.Context(), next.ID, order("2")))
}

// NEG-52: of two operators at two servers one prepares, and is told so.
func TestTwoOperatorsPrepareOneRoot(t *testing.T) {
	w := newWorld(t)
	servers := []*Authority{w.open(), w.open()}
	errs := make([]error, 8)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			_, errs[i] = servers[i%2].Prepare(context.Background(), order(string(rune('a'+i))))
		})
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
			continue
		}
		wantReason(t, err, fault.Precondition, "rotation_in_progress")
	}
	if won != 1 || len(w.open().Bundle().Roots) != 2 {
		t.Errorf("%d operators prepared a root", won)
	}
}

// Whatever is asked for in whatever order at two servers that also sign: one
// root is active, at most two are published, and every certificate ends before
// the mark of its class in the root's record. // BUN-4, PLAN-5
func TestAnyOrderOfMovesKeepsTheInvariants(t *testing.T) {
	for seed := range uint64(8) {
		synctest.Test(t, func(t *testing.T) {
			rng := mathrand.New(mathrand.NewPCG(seed, 1))
			w := newWorld(t)
			servers := []*Authority{w.open(), w.open()}
			for _, a := range servers {
				start(t, a)
			}
			last := uint64(1)
			for range 60 {
				a := servers[rng.IntN(2)]
				all := a.Authorities()
				id := all[rng.IntN(len(all))].ID
				o := order(string(rune('a' + rng.IntN(26))))
				switch rng.IntN(5) {
				case 0:
					_, _ = a.Prepare(t.Context(), o)
				case 1:
					_ = a.Activate(t.Context(), id, o)
				case 2:
					_ = a.Taint(t.Context(), id, o)
				case 3:
					_ = a.Revoke(t.Context(), id, o)
				case 4:
					advance(time.Duration(rng.IntN(600)) * time.Second)
				}
				synctest.Wait()
				svids, err := a.IssueX509(t.Context(), w.origin(), []X509Request{workload("/w"), serverRequest()})
				w.must(err)
				synctest.Wait()
				v := servers[0].current.Load().view
				active, published := 0, v.published()
				for _, one := range v.authorities {
					if one.record.State == Active {
						active++
					}
				}
				if active != 1 || published > maxPublished || v.sequence < last {
					t.Fatalf("%d active, %d published, sequence %d after %d", active, published, v.sequence, last)
				}
				last = v.sequence
				for i, svid := range svids {
					w.must(svid.Err)
					mark := v.find(svid.AuthorityID).record.Marks.of([]class{stream, own}[i])
					if svid.NotAfter.After(*mark) {
						t.Fatalf("a certificate ends at %v, its mark is %v", svid.NotAfter, mark)
					}
				}
			}
		})
	}
}

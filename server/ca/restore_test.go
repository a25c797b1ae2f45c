package ca

import (
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/keys"
	"github.com/seed-caa81108/assay/server/store"
)

// back takes the world's store to an earlier content, as a backup would.
func (w *world) back(to []store.Record) {
	w.t.Helper()
	var writes []store.Write
	for _, now := range w.raw() {
		writes = append(writes, store.Write{Key: now.Key, Delete: true})
	}
	for _, old := range to {
		writes = slices.DeleteFunc(writes, func(d store.Write) bool { return d.Key == old.Key })
		writes = append(writes, store.Write{Key: old.Key, Value: old.Value})
	}
	w.put(writes...)
}

func (w *world) restoring() RestoreOptions {
	return RestoreOptions{TrustDomain: w.opts.TrustDomain, AgentSVIDTTL: w.opts.AgentSVIDTTL, Store: w.opts.Store, Keys: w.opts.Keys, MAC: w.opts.MAC}
}

// After a restore every certificate that was signed since the backup is still
// covered, and the bundle is one that agents take.
func TestRestoredAuthoritiesCoverWhatWasSignedSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.open()
		saved := w.raw()
		first := a.Issuer().AuthorityID
		advance(48 * time.Hour)
		a = w.open() // nobody kept the first one awake
		agent, mesh := issue(t, a, agentRequest()), issue(t, a, workload("/w"))
		second, err := a.Prepare(t.Context(), order("op"))
		w.must(err)
		w.must(a.Activate(t.Context(), second.ID, order("op")))
		highest := a.Bundle().Sequence

		w.back(saved)
		got, err := Restore(t.Context(), w.restoring())
		w.must(err)
		if got.Sequence <= highest || got.Sequence != uint64(time.Now().Unix()) {
			t.Errorf("sequence %d after %d", got.Sequence, highest)
		}
		if got.Active.ID != first || !maps.Equal(got.States, map[string]State{first: Active}) {
			t.Errorf("restored %+v", got)
		}
		again, err := Restore(t.Context(), w.restoring()) // in the same second
		w.must(err)
		if again.Sequence != got.Sequence+1 {
			t.Errorf("sequence %d after %d", again.Sequence, got.Sequence)
		}

		b := w.open()
		marks := b.current.Load().view.active.record.Marks
		if agent.NotAfter.After(marks.Stream) || mesh.NotAfter.After(marks.Handed) || mesh.NotAfter.After(marks.Own) {
			t.Errorf("certificates until %v and %v under marks %+v", agent.NotAfter, mesh.NotAfter, marks)
		}
		if b.Bundle().Sequence != again.Sequence {
			t.Errorf("the bundle has sequence %d", b.Bundle().Sequence)
		}
		issue(t, b, workload("/w"))
	})
}

func TestRestoreRefusesWhatCannotSign(t *testing.T) {
	w := newWorld(t)
	if _, err := Restore(t.Context(), w.restoring()); fault.ReasonOf(err) != "authority_missing" {
		t.Errorf("empty: %v", err)
	}
	w.open()
	before := w.raw()
	other, err := keys.NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	o := w.restoring()
	o.MAC = other.MAC
	_, err = Restore(t.Context(), o)
	wantReason(t, err, fault.Precondition, "store_corrupt")
	o = w.restoring()
	o.Keys = keys.NewSealed(other, example)
	_, err = Restore(t.Context(), o)
	wantReason(t, err, fault.Precondition, "store_corrupt")
	if after := w.raw(); !slices.EqualFunc(before, after, func(x, y store.Record) bool { return x.Key == y.Key && x.Revision == y.Revision }) {
		t.Error("the records were changed")
	}
}

package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"go.etcd.io/bbolt"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// turns counts the transactions of b. Each waits until it may begin.
func turns(b *Bolt) (begun *int, begin chan struct{}) {
	update := b.update
	begun, begin = new(int), make(chan struct{})
	b.update = func(f func(*bbolt.Tx) error) error {
		<-begin
		*begun++
		return update(f)
	}
	return begun, begin
}

type answer struct {
	revision int64
	err      error
}

// commit calls Commit and returns when it waits for its turn.
func commit(ctx context.Context, b *Bolt, ifs []Precondition, writes ...Write) <-chan answer {
	c := make(chan answer, 1)
	go func() {
		revision, err := b.Commit(ctx, ifs, writes)
		c <- answer{revision, err}
	}()
	synctest.Wait()
	return c
}

// What waits for the disk goes to the disk together; each commit keeps its
// revision, its preconditions and its batch.
func TestWaitingCommitsShareATransaction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := openStore(t, t.TempDir())
		start := set(t, b, "a", "0")
		begun, begin := turns(b)
		first := commit(t.Context(), b, nil, Write{Key: "first"})
		one := commit(t.Context(), b, []Precondition{{Key: "a", Revision: start}}, Write{Key: "a", Value: []byte("1")}, Write{Key: "b"})
		other := commit(t.Context(), b, []Precondition{{Key: "a", Revision: start}}, Write{Key: "a", Value: []byte("2")})
		ctx, cancel := context.WithCancel(t.Context())
		gone := commit(ctx, b, nil, Write{Key: "gone"})
		last := commit(t.Context(), b, []Precondition{{Key: "b", Revision: start + 2}}, Write{Key: "b", Delete: true})
		cancel()
		wantReason(t, (<-gone).err, fault.NotReady, "store_busy")
		begin <- struct{}{}
		begin <- struct{}{}
		for i, got := range []answer{<-first, <-one, <-last} {
			if got.err != nil || got.revision != start+1+int64(i) {
				t.Errorf("%d: revision %d, %v", i, got.revision, got.err)
			}
		}
		wantReason(t, (<-other).err, fault.Conflict, "store_conflict")
		if *begun != 2 {
			t.Errorf("%d transactions", *begun)
		}
		var events []string
		for batch, err := range b.Watch(t.Context(), "", start) {
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range batch.Events {
				events = append(events, fmt.Sprint(batch.Revision-start, e.Key, string(e.Value), e.Deleted))
			}
			if batch.Revision == start+3 {
				break
			}
		}
		if want := []string{"1firstfalse", "2a1false", "2bfalse", "3btrue"}; !slices.Equal(events, want) {
			t.Errorf("watched %q, want %q", events, want)
		}
		if rec, err := b.Get(t.Context(), "a"); err != nil || string(rec.Value) != "1" || rec.Revision != start+2 {
			t.Errorf("%q of %d, %v", rec.Value, rec.Revision, err)
		}
	})
}

func TestAGroupHasBounds(t *testing.T) {
	for name, tc := range map[string]struct {
		value string
		n     int
	}{
		"many":  {"", maxGroup},
		"large": {strings.Repeat("x", 1<<20-100), maxGroupBytes / (1 << 20)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := openStore(t, t.TempDir())
				begun, begin := turns(b)
				answers := []<-chan answer{commit(t.Context(), b, nil, Write{Key: "first"})}
				for i := range 2*tc.n + 1 {
					answers = append(answers, commit(t.Context(), b, nil, Write{Key: fmt.Sprint(i), Value: []byte(tc.value)}))
				}
				close(begin)
				for _, c := range answers {
					if got := <-c; got.err != nil {
						t.Fatal(got.err)
					}
				}
				if *begun != 4 {
					t.Errorf("%d transactions", *begun)
				}
			})
		})
	}
}

// A group that was certainly not written is taken apart: each commit gets the
// answer that it would have got alone.
func TestAGroupThatFailsIsTakenApart(t *testing.T) {
	t.Run("all refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := openStore(t, t.TempDir())
			begun, begin := turns(b)
			first := commit(t.Context(), b, nil, Write{Key: "first"})
			wrong := []Precondition{{Key: "a", Revision: 7}}
			answers := []<-chan answer{commit(t.Context(), b, wrong, Write{Key: "a"}), commit(t.Context(), b, wrong, Write{Key: "a"})}
			close(begin)
			before := <-first
			for _, c := range answers {
				wantReason(t, (<-c).err, fault.Conflict, "store_conflict")
			}
			if got := set(t, b, "b", ""); got != before.revision+1 || *begun != 3 {
				t.Errorf("revision %d after %d, %d transactions", got, before.revision, *begun)
			}
		})
	})
	t.Run("no space for all", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := openStore(t, t.TempDir())
			begun, begin := turns(b)
			update := b.update
			b.update = func(f func(*bbolt.Tx) error) error {
				return update(func(tx *bbolt.Tx) error {
					err := f(tx)
					if err == nil && tx.Bucket([]byte(recordsBucket)).Get([]byte("large")) != nil {
						err = syscall.ENOSPC
					}
					return err
				})
			}
			first := commit(t.Context(), b, nil, Write{Key: "first"})
			large := commit(t.Context(), b, nil, Write{Key: "large"})
			// In the way of each other as long as both are there.
			small := commit(t.Context(), b, []Precondition{{Key: "large"}}, Write{Key: "small"})
			close(begin)
			if got := <-first; got.err != nil {
				t.Fatal(got.err)
			}
			wantReason(t, (<-large).err, fault.Exhausted, "store_full")
			if got := <-small; got.err != nil || got.revision != 3 {
				t.Errorf("revision %d, %v", got.revision, got.err)
			}
			if *begun != 4 {
				t.Errorf("%d transactions", *begun)
			}
		})
	})
	t.Run("a bad record", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := openStore(t, t.TempDir())
			set(t, b, "bad", "1")
			if err := b.db.Update(func(tx *bbolt.Tx) error {
				return tx.Bucket([]byte(recordsBucket)).Put([]byte("bad"), []byte("no checksum"))
			}); err != nil {
				t.Fatal(err)
			}
			_, begin := turns(b)
			first := commit(t.Context(), b, nil, Write{Key: "first"})
			good := commit(t.Context(), b, nil, Write{Key: "good"})
			over := commit(t.Context(), b, nil, Write{Key: "half"}, Write{Key: "bad"})
			late := commit(t.Context(), b, nil, Write{Key: "late"})
			close(begin)
			for i, got := range []answer{<-first, <-good, <-late} {
				if got.err != nil || got.revision != int64(3+i) {
					t.Errorf("revision %d, %v", got.revision, got.err)
				}
			}
			wantReason(t, (<-over).err, fault.Precondition, "store_corrupt")
			if _, err := b.Get(t.Context(), "half"); !errors.Is(err, fault.NotFound) {
				t.Errorf("half of a commit was written: %v", err)
			}
		})
	})
}

// Nobody of a group can know more than that nothing is known.
func TestAGroupOfUnknownOutcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := openStore(t, t.TempDir())
		update, begin := b.update, make(chan error)
		b.update = func(f func(*bbolt.Tx) error) error { return errors.Join(update(f), <-begin) }
		answers := []<-chan answer{commit(t.Context(), b, nil, Write{Key: "first"})}
		for i := range 3 {
			answers = append(answers, commit(t.Context(), b, []Precondition{{Key: "same"}}, Write{Key: "same", Value: []byte{byte(i)}}))
		}
		begin <- nil
		begin <- syscall.EIO
		if got := <-answers[0]; got.err != nil {
			t.Fatal(got.err)
		}
		for _, c := range answers[1:] {
			got := <-c
			wantReason(t, got.err, fault.NotReady, "store_commit_unknown")
			if !errors.Is(got.err, ErrUnknown) {
				t.Errorf("does not wrap ErrUnknown: %v", got.err)
			}
		}
		wantStopped(t, b)
	})
}

package api

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func TestLiveKeysAreBoundedByIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLiveKeys(3)
		one := subject{spiffeid.RequireFromString("spiffe://example.org/assay/agent/k8s_psat/prod/1"), "pod/a", 0}
		want := func(s subject, key byte, reason string) {
			t.Helper()
			if err := l.reserve(s, [16]byte{key}, time.Now()); err == nil && reason != "" || err != nil && fault.ReasonOf(err) != reason {
				t.Errorf("key %d: %v, want %q", key, err, reason)
			}
		}
		end := time.Now().Add(time.Hour)
		want(one, 1, "")
		l.certified(one, [16]byte{1}, end)
		want(one, 1, "") // the same once more
		want(one, 2, "")
		want(one, 3, "") // never certified
		want(one, 4, "limit_live_keys")
		l.certified(one, [16]byte{2}, end.Add(time.Hour))
		other := one
		other.item = "pod/b"
		want(other, 4, "")
		changed := one
		changed.revision++
		want(changed, 4, "")
		<-time.After(reserved)
		want(one, 5, "")
		l.certified(one, [16]byte{5}, end)
		want(one, 6, "limit_live_keys")
		<-time.After(time.Until(end))
		want(one, 6, "")
		want(one, 7, "")
		want(one, 8, "limit_live_keys")

		// One call with many keys gets no more, and who is gone is forgotten.
		<-time.After(3 * time.Hour)
		l.sweepAt = 0
		var all sync.WaitGroup
		var got sync.Map
		for i := range 50 {
			all.Go(func() {
				if l.reserve(one, [16]byte{byte(i + 20)}, time.Now()) == nil {
					got.Store(i, true)
				}
			})
		}
		all.Wait()
		n := 0
		got.Range(func(any, any) bool { n++; return true })
		if n != 3 || len(l.of) != 1 {
			t.Errorf("%d keys for %d identities: %s", n, len(l.of), fmt.Sprint(l.of))
		}
	})
}

// A key counts as long as a certificate for it lives, also one that was asked for
// in the moment in which another one of its ended, or that took long to sign.
func TestAKeyCountsWhileItIsCertifiedAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLiveKeys(3)
		one := subject{spiffeid.RequireFromString("spiffe://example.org/assay/agent/k8s_psat/prod/1"), "pod/a", 0}
		reserve := func(keys ...byte) (refused int) {
			t.Helper()
			for _, key := range keys {
				if l.reserve(one, [16]byte{key}, time.Now()) != nil {
					refused++
				}
			}
			return refused
		}
		certified := func(keys ...byte) {
			for _, key := range keys {
				l.certified(one, [16]byte{key}, time.Now().Add(time.Hour))
			}
		}
		if n := reserve(1, 2, 3); n != 0 {
			t.Fatal(n, "were refused")
		}
		certified(1, 2, 3)
		<-time.After(time.Hour - time.Millisecond)
		if n := reserve(1, 2, 3); n != 0 {
			t.Fatal(n, "were refused")
		}
		<-time.After(time.Millisecond) // signing takes a moment
		if n := reserve(4, 5, 6); n != 3 {
			t.Errorf("%d of 3 keys were refused while 3 others are being certified anew", n)
		}
		<-time.After(reserved) // or a long one
		l.sweep(time.Now())
		certified(1, 2, 3)
		if n := reserve(4, 5, 6); n != 3 {
			t.Errorf("%d of 3 keys were refused although 3 others have certificates", n)
		}
	})
}

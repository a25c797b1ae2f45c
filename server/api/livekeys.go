package api

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	// reserved is how long a key counts that is about to be certified.
	reserved = time.Minute
	// fewSubjects are kept without looking which of them have no live key.
	fewSubjects = 1024
)

// liveKeys bounds for how many keys one agent has certificates of one identity at
// a time. A pod's identity needs one key, and two while it is renewed; more come
// of restarts that lost keys, or of somebody who collects them.
type liveKeys struct {
	most int

	mu      sync.Mutex
	of      map[subject][]liveKey
	sweepAt int
}

// subject is an entry, or a pod's identity, as one agent has it. An entry that was
// changed needs new certificates, and is another subject.
type subject struct {
	agent    spiffeid.ID
	item     string
	revision int64
}

type liveKey struct {
	sum   [16]byte // of its SubjectPublicKeyInfo
	until time.Time
}

func (k *liveKey) raise(until time.Time) {
	if until.After(k.until) {
		k.until = until
	}
}

func newLiveKeys(most int) *liveKeys {
	return &liveKeys{most: most, of: map[subject][]liveKey{}, sweepAt: fewSubjects}
}

// reserve says whether a key may be certified. It counts for a moment, or until
// its certificate ends if certified is called.
func (l *liveKeys) reserve(s subject, sum [16]byte, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.of) >= l.sweepAt {
		l.sweep(now)
	}
	keys := live(l.of[s], now)
	l.of[s] = keys
	if i := slices.IndexFunc(keys, func(k liveKey) bool { return k.sum == sum }); i >= 0 {
		// Its certificate may end while the next one is signed.
		keys[i].raise(now.Add(reserved))
		return nil
	}
	if len(keys) >= l.most {
		soonest := slices.MinFunc(keys, func(a, b liveKey) int { return a.until.Compare(b.until) })
		return fault.Newf(fault.Exhausted, "limit_live_keys",
			"this agent has certificates for %d keys of that identity, more than renewals and restarts need: see who else uses the node, or raise limits.live_keys_per_identity; the first of them ends at %s",
			len(keys), soonest.until.UTC().Format(time.RFC3339))
	}
	l.of[s] = append(keys, liveKey{sum, now.Add(reserved)})
	return nil
}

// certified notes how long the certificate for a key that was reserved lives. If
// signing took longer than the key was reserved for, it counts all the same.
func (l *liveKeys) certified(s subject, sum [16]byte, until time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	keys := l.of[s]
	if i := slices.IndexFunc(keys, func(k liveKey) bool { return k.sum == sum }); i >= 0 {
		keys[i].raise(until)
		return
	}
	l.of[s] = append(keys, liveKey{sum, until})
}

func live(keys []liveKey, now time.Time) []liveKey {
	return slices.DeleteFunc(keys, func(k liveKey) bool { return !now.Before(k.until) })
}

// sweep forgets who has no live key; the next one is due when there are twice as
// many as are left.
func (l *liveKeys) sweep(now time.Time) {
	for s, keys := range l.of {
		if l.of[s] = live(keys, now); len(l.of[s]) == 0 {
			delete(l.of, s)
		}
	}
	l.sweepAt = max(fewSubjects, 2*len(l.of))
}

func keySum(key crypto.PublicKey) (sum [16]byte, err error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return sum, fault.Wrap(fault.Invalid, err, "csr_invalid", "the CSR's key can't be encoded: make another")
	}
	whole := sha256.Sum256(der)
	return [16]byte(whole[:16]), nil
}

package node_test

import (
	"testing"
	"time"

	"github.com/seed-caa81108/assay/agent/state"
)

// The agent's own certificate leaves a root that signs no more: within minutes
// when that is planned, at once when the root is tainted. It renews once, and
// goes on with a certificate that is half a day from its end.
func TestOwnCertificateLeavesItsRoot(t *testing.T) {
	for name, c := range map[string]struct {
		leave  func(*authority)
		within time.Duration
	}{
		"retired": {func(a *authority) { a.retired = true }, 5*time.Minute + 16*time.Second},
		"tainted": {func(a *authority) { a.tainted = true }, 16 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fake, h *host) {
				h.start()
				old := h.conn()
				before := h.identity()
				first, next := f.root, newAuthority()
				publish := func(change func()) {
					f.with(func() { change(); f.sequence++ })
					b, err := state.BundleFrom(td, f.bundle())
					if err != nil {
						t.Fatal(err)
					}
					if err := h.state.SaveBundle(b); err != nil {
						t.Fatal(err)
					}
				}
				publish(func() { f.bundled = append(f.bundled, next) })
				time.Sleep(10 * time.Minute)
				if h.identity().AuthorityID() != before.AuthorityID() || f.count("Renew") != 0 {
					t.Fatal("renewed because of a root that only was prepared")
				}
				publish(func() { f.root, f.tls = next, next; c.leave(first) })
				select {
				case <-old.Replaced():
				case <-time.After(c.within):
					t.Fatalf("not renewed within %v", c.within)
				}
				old.Release()
				h.conn().Release()
				if h.identity().AuthorityID() == before.AuthorityID() {
					t.Error("the new certificate is under the old root")
				}
				// Then the old root goes, and nobody notices.
				publish(func() { f.bundled = []*authority{next} })
				time.Sleep(10 * time.Minute)
				c := h.conn()
				if err := ping(t, c); err != nil {
					t.Error(err)
				}
				c.Release()
				if n := f.count("Renew"); n != 1 {
					t.Errorf("%d renewals", n)
				}
				if err := h.stop(); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

package rotation_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/keys"
	"github.com/seed-caa81108/assay/server/registry"
	"github.com/seed-caa81108/assay/server/rotation"
	"github.com/seed-caa81108/assay/server/store"
)

// years is a server on a real store whose agents live in real time: each takes
// every bundle after a while of its own, renews what it holds at half of its
// life and whenever the root of it signs no more, and reports. All certificates
// in use are kept, so that they can be verified.
type years struct {
	t         *testing.T
	authority *ca.Authority
	registry  *registry.Registry
	rotator   *rotation.Rotator
	audit     *decisions

	mu       sync.Mutex
	nodes    []*node
	minted   []held // used until they end: nobody replaces them
	sequence uint64
	issuers  map[string]bool
	issued   int
}

// decisions keeps the lines that are not about a certificate.
type decisions struct{ ledger }

func (d *decisions) Record(ctx context.Context, lines ...audit.Line) error {
	return d.ledger.Record(ctx, slices.DeleteFunc(slices.Clone(lines), func(l audit.Line) bool { return l.Cert != nil })...)
}

// mint hands out a certificate without an agent.
func (y *years) mint(key *ecdsa.PrivateKey) {
	y.t.Helper()
	h, ok := y.issue(y.t.Context(), ca.X509Request{Kind: ca.Minted, ID: spiffeid.RequireFromPath(td, "/minted"), PublicKey: key.Public(), Rule: "mint"})
	y.mu.Lock()
	defer y.mu.Unlock()
	now := time.Now()
	y.minted = slices.DeleteFunc(y.minted, func(old held) bool { return !old.leaf.NotAfter.After(now) })
	if ok {
		y.minted = append(y.minted, h)
	}
}

// check looks at what has to hold at every moment. With thorough, signatures are
// verified, too.
func (y *years) check(thorough bool) error {
	now, info := time.Now(), y.authority.Issuer()
	if err := y.authority.Ready(); err != nil {
		return fmt.Errorf("%v: %w", now, err)
	}
	if info.NotAfter.Sub(now) < 12*time.Hour {
		return fmt.Errorf("%v: the issuer ends at %v", now, info.NotAfter)
	}
	y.mu.Lock()
	defer y.mu.Unlock()
	y.issuers[info.ID] = true
	served := []*ca.Bundle{y.authority.Bundle()}
	if served[0].Sequence < y.sequence || len(served[0].Roots) > 2 {
		return fmt.Errorf("%v: sequence %d after %d, %d roots", now, served[0].Sequence, y.sequence, len(served[0].Roots))
	}
	y.sequence = served[0].Sequence
	inUse := slices.Clone(y.minted)
	for _, n := range y.nodes {
		served = append(served, n.bundle)
		if n.own.leaf != nil && n.work.leaf != nil {
			inUse = append(inUse, n.own, n.work)
		}
	}
	for i := range inUse {
		if inUse[i].leaf.NotAfter.After(now) {
			if err := y.checkHeld(&inUse[i], served, thorough); err != nil {
				return err
			}
		} else if !inUse[i].minted {
			return fmt.Errorf("%v: %s has ended in use", now, inUse[i].leaf.URIs[0])
		}
	}
	return nil
}

// checkHeld looks whether a certificate is valid for everybody, and whether its
// root's mark covers it.
func (y *years) checkHeld(h *held, served []*ca.Bundle, thorough bool) error {
	for _, b := range served {
		if !slices.ContainsFunc(b.Roots, func(r ca.Root) bool { return r.ID == h.root }) {
			return fmt.Errorf("%v: the root of %s is not in bundle %d, which somebody has", time.Now(), h.leaf.URIs[0], b.Sequence)
		}
		if !thorough {
			continue
		}
		issuers := x509.NewCertPool()
		issuers.AddCert(h.issuer)
		if _, err := h.leaf.Verify(x509.VerifyOptions{Roots: b.Pool(), Intermediates: issuers, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			return fmt.Errorf("%v: %s under bundle %d: %w", time.Now(), h.leaf.URIs[0], b.Sequence, err)
		}
	}
	for _, root := range y.authority.Authorities() {
		mark := root.StreamUntil
		if h.minted {
			mark = root.HandedUntil
		}
		if root.ID == h.root && mark.Before(h.leaf.NotAfter) {
			return fmt.Errorf("%v: %s lives until %v, past its root's mark %v", time.Now(), h.leaf.URIs[0], h.leaf.NotAfter, mark)
		}
	}
	return nil
}

// watch checks at once when a bundle comes, and again when some have taken it.
func (y *years) watch(ctx context.Context) {
	for bundle := y.authority.Bundle(); ; bundle = y.authority.Bundle() {
		select {
		case <-bundle.Replaced():
		case <-ctx.Done():
			return
		}
		for range 3 {
			if err := y.check(true); err != nil {
				y.t.Error(err)
				return
			}
			select {
			case <-time.After(20 * time.Second):
			case <-ctx.Done():
				return
			}
		}
	}
}

// Time passes with SVIDs of an hour. The root is replaced by itself so many times,
// whenever a third of its life remains, and nobody notices.
func timePasses(t *testing.T, rootTTL time.Duration, times int) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		bolt, err := store.OpenBolt(store.BoltConfig{Dir: filepath.Join(dir, "store"), NoSync: true})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := bolt.Close(); err != nil {
				t.Error(err)
			}
		}()
		y := openYears(t, bolt, rootTTL)
		defer y.serve()()
		began := time.Now()
		key, replaced := newKey(t), []time.Time{began}
		active := y.authority.Issuer().AuthorityID
		for hour := 1; time.Since(began) < rootTTL*2/3*time.Duration(times)+12*time.Hour; hour++ {
			time.Sleep(time.Hour)
			if len(replaced) == 1 { // later ones have nothing but agents to wait for
				y.mint(key)
			}
			if err := y.check(hour%24 == 0 || len(y.authority.Bundle().Roots) > 1); err != nil {
				t.Fatal(err)
			}
			if now := y.authority.Issuer().AuthorityID; now != active {
				active, replaced = now, append(replaced, time.Now())
			}
		}
		if len(replaced) != times+1 {
			t.Fatalf("the root was replaced %d times", len(replaced)-1)
		}
		for i, at := range replaced[1:] {
			// Minted certificates of an hour are waited for before the new one signs.
			after, want := at.Sub(replaced[i]), rootTTL*2/3
			if after < want-3*time.Hour || after > want+4*time.Hour {
				t.Errorf("replacement %d came after %v, want %v", i+1, after, want)
			}
		}
		if starts, ends := y.audit.count("rotation.start", "ok"), y.audit.count("rotation.end", "ok"); starts != times || ends != times {
			t.Errorf("%d rotations were begun, %d ended", starts, ends)
		}
		if roots := y.authority.Bundle().Roots; len(roots) != 1 || y.sequence != uint64(1+3*times) {
			t.Errorf("%d roots, sequence %d", len(roots), y.sequence)
		}
		t.Logf("%v: %d certificates under %d issuers", time.Since(began), y.issued, len(y.issuers))
	})
}

// FED-4, PLAN-5, X509-20
func TestRootsOfThreeDaysFollowEachOther(t *testing.T) { timePasses(t, 72*time.Hour, 3) }

func openYears(t *testing.T, kv store.KV, rootTTL time.Duration) *years {
	t.Helper()
	seal, err := keys.NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	y := &years{t: t, audit: &decisions{}, issuers: map[string]bool{}}
	y.authority, err = ca.Open(t.Context(), ca.Options{
		TrustDomain: td, Config: ca.Config{RootTTL: rootTTL}, AgentSVIDTTL: 12 * time.Hour, ReservedPrefix: "/assay/", Bootstrap: time.Now().UTC().Format(time.DateOnly),
		Store: kv, Keys: keys.NewSealed(seal, td), MAC: seal.MAC, Audit: y.audit, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	y.registry, err = registry.Open(t.Context(), registry.Options{
		TrustDomain: td, ReservedPrefix: "/assay/", RejoinWindow: 7 * 24 * time.Hour, MaxX509SVIDTTL: time.Hour,
		Store: kv, Log: log, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	y.rotator = rotation.New(rotation.Options{
		Authority: y.authority, Fleet: y.registry.Fleet, MaxTTL: time.Hour, Audit: y.audit, Log: log, Automatic: true,
		OwnAuthority: func() string { return y.authority.Issuer().AuthorityID },
	})
	return y
}

// serve runs the server with two agents; what it returns ends both.
func (y *years) serve() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var ended sync.WaitGroup
	for name, run := range map[string]func(context.Context) error{
		"authority": y.authority.Run, "registry": y.registry.Run, "rotator": y.rotator.Run,
	} {
		ended.Go(func() {
			if err := run(ctx); err != nil {
				y.t.Errorf("%s: %v", name, err)
			}
		})
	}
	for name, slow := range map[string]time.Duration{"quick": time.Second, "slow": 7 * time.Minute} {
		n := y.join(name, slow)
		ended.Go(func() { n.run(ctx) })
	}
	ended.Go(func() { y.watch(ctx) })
	return func() {
		cancel()
		ended.Wait()
	}
}

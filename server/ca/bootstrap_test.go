package ca

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/keys"
	"github.com/seed-caa81108/assay/server/store"
)

// I5: the first root is made on the day that is named, and an hour after it.
// A bubble's clock begins at 2000-01-01T00:00:00Z.
func TestFirstRootIsMadeOnItsDayOnly(t *testing.T) {
	for name, c := range map[string]struct {
		bootstrap string
		at        time.Duration
		reason    string
	}{
		"first moment":          {"2000-01-01", 0, ""},
		"last moment":           {"2000-01-01", 24*time.Hour - 1, ""},
		"in the hour after":     {"2000-01-01", 25*time.Hour - 1, ""},
		"after the hour":        {"2000-01-01", 25 * time.Hour, "bootstrap_not_today"},
		"the day before":        {"2000-01-02", 24*time.Hour - 1, "bootstrap_not_today"},
		"the next day, on time": {"2000-01-02", 24 * time.Hour, ""},
		"a year ago":            {"1999-01-01", 0, "bootstrap_not_today"},
		"not named":             {"", 0, "authority_missing"},
		"not a date":            {"today", 0, "config_bootstrap"},
		"another form":          {"01.01.2000", 0, "config_bootstrap"},
		"with a time":           {"2000-01-01T00:00:00Z", 0, "config_bootstrap"},
		"not a day":             {"2000-02-30", 0, "config_bootstrap"},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.opts.Bootstrap = c.bootstrap
			advance(c.at)
			a, err := Open(t.Context(), w.opts)
			if c.reason == "" {
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				if roots := a.Bundle().Roots; len(roots) != 1 || roots[0].State != Active || a.Bundle().Sequence != 1 {
					t.Errorf("%s: bundle %+v", name, a.Bundle())
				}
				return
			}
			if fault.ReasonOf(err) != c.reason || fault.KindOf(err) != fault.Precondition {
				t.Errorf("%s: got %v, want %s", name, err, c.reason)
			}
			// P6: nothing was made, and the message says what would be right.
			if len(w.raw()) != 0 || len(w.audit.lines) != 0 {
				t.Errorf("%s: something was made", name)
			}
			if today := time.Now().UTC().Format(time.DateOnly); !strings.Contains(err.Error(), today) {
				t.Errorf("%s: the message does not name %s: %v", name, today, err)
			}
		})
	}
}

// NEG-58 b: a machine that has lost its time starts as soon as it has it back;
// until then it says that its clock is wrong, and not that the CA is.
func TestClockBeforeTheRootStopsOpen(t *testing.T) {
	w := newWorld(t)
	first := w.open()
	synctest.Test(t, func(t *testing.T) { // where it is the year 2000
		_, err := Open(t.Context(), w.opts)
		wantReason(t, err, fault.NotReady, "clock_backwards")
	})
	if again := w.open().Bundle(); again.Roots[0].ID != first.Bundle().Roots[0].ID {
		t.Error("the clock is right again and the root is another")
	}
}

func TestExistingRootIsKept(t *testing.T) {
	w := newWorld(t)
	first := w.open()
	w.opts.Bootstrap = time.Now().UTC().Format(time.DateOnly)
	second := w.open()
	w.opts.Bootstrap = ""
	third := w.open()
	if a, b, c := first.Bundle().Roots, second.Bundle().Roots, third.Bundle().Roots; len(b) != 1 || len(c) != 1 || a[0].ID != b[0].ID || a[0].ID != c[0].ID {
		t.Errorf("roots %v, %v, %v", a, b, c)
	}
	// The issuer is each server's own, and leaves nothing in the bundle.
	if first.Issuer().ID == second.Issuer().ID {
		t.Error("two servers have one issuer")
	}
	if len(w.raw()) != 2 {
		t.Errorf("%d records, want the root's and the sequence", len(w.raw()))
	}
}

func TestServersThatBootstrapTogetherShareARoot(t *testing.T) {
	w := newWorld(t)
	var wg sync.WaitGroup
	found := make([]*Authority, 4)
	for i := range found {
		wg.Go(func() {
			a, err := Open(context.Background(), w.opts)
			if err != nil {
				t.Error(err)
				return
			}
			found[i] = a
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for _, a := range found {
		if a.Bundle().Roots[0].ID != found[0].Bundle().Roots[0].ID || len(a.Bundle().Roots) != 1 {
			t.Errorf("bundle %+v", a.Bundle())
		}
		issue(t, found[0], workload("/w"))
		inspectAcross(t, a, found[0])
	}
}

// inspectAcross checks that what one server signs verifies with the other's
// bundle.
func inspectAcross(t *testing.T, signer, verifier *Authority) {
	t.Helper()
	req := workload("/w")
	svids, err := signer.IssueX509(context.Background(), (&world{}).origin(), []X509Request{req})
	if err != nil {
		t.Fatal(err)
	}
	inspect(t, verifier, req, svids[0])
}

func TestBootstrapIsAudited(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	root, iss := w.audit.taken("root.create"), w.audit.taken("issuer.create")
	if len(root) != 1 || len(iss) != 1 {
		t.Fatalf("%d lines for a root, %d for an issuer", len(root), len(iss))
	}
	cert := a.Bundle().Roots[0].Certificate
	if root[0].Cert.SPKISHA256 != Pin(cert) || root[0].Cert.Serial != hexSerial(cert.SerialNumber) || root[0].Target.AuthorityID != a.Bundle().Roots[0].ID {
		t.Errorf("line %+v is not about the root", root[0])
	}
	if issuerCert := a.current.Load().issuer.cert; iss[0].Cert.Serial != hexSerial(issuerCert.SerialNumber) || iss[0].Cert.IssuerSKI != root[0].Target.AuthorityID {
		t.Errorf("line %+v is not about the issuer", iss[0])
	}
}

func TestWithoutItsAuditLineNoRootIsMade(t *testing.T) {
	w := newWorld(t)
	w.audit.err = fault.New(fault.Exhausted, "audit_full", "no space")
	_, err := Open(t.Context(), w.opts)
	wantReason(t, err, fault.Exhausted, "audit_full")
	if len(w.raw()) != 0 {
		t.Error("a root was stored")
	}
}

func TestUnknownBootstrapCommitIsReported(t *testing.T) {
	w := newWorld(t)
	answer := func() error { return fault.Wrap(fault.NotReady, store.ErrUnknown, "store_commit_unknown", "unknown") }
	w.kv.onCommit.Store(&answer)
	_, err := Open(t.Context(), w.opts)
	wantReason(t, err, fault.NotReady, "store_commit_unknown")
}

func TestTrustDomainMustBeCarriable(t *testing.T) {
	long := strings.Repeat("a", 63) + "." + strings.Repeat("b", 63) + "." + strings.Repeat("c", 63) + "." + strings.Repeat("d", 63)
	for name, reason := range map[string]string{
		long:            "", // ID-9: 255 bytes
		long + "e":      "config_trust_domain",
		"1.2.3.4":       "", // ID-8
		"a_b":           "",
		"a..b":          "config_trust_domain", // ID-29
		".a":            "config_trust_domain",
		"a.":            "config_trust_domain",
		"x.example":     "",
		"one-label-too": "",
	} {
		w := newWorld(t)
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			t.Fatal(err)
		}
		w.opts.TrustDomain, w.opts.Keys = td, keys.NewSealed(w.seal, td)
		a, err := Open(t.Context(), w.opts)
		if reason != "" {
			wantReason(t, err, fault.Precondition, reason)
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		req := workload("/w")
		req.ID = spiffeid.RequireFromPath(td, "/w")
		issue(t, a, req)
	}
	w := newWorld(t)
	w.opts.TrustDomain = spiffeid.TrustDomain{}
	_, err := Open(t.Context(), w.opts)
	wantReason(t, err, fault.Precondition, "config_trust_domain")
}

// X509-17, ID-21
func TestStoreOfAnotherTrustDomainIsRefused(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.opts.TrustDomain = spiffeid.RequireTrustDomainFromString("example.com")
	_, err := Open(t.Context(), w.opts)
	wantReason(t, err, fault.Precondition, "trust_domain_mismatch")
}

func TestExpiredRootStopsOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.open()
		advance(366 * 24 * time.Hour)
		_, err := Open(t.Context(), w.opts)
		wantReason(t, err, fault.Precondition, "ca_expired") // NEG-58 a
		if len(w.raw()) != 2 {
			t.Error("another root was made")
		}
	})
}

// NEG-55: every byte of every record counts, and what is found wrong is left
// as it is.
func TestChangedRecordsStopTheServer(t *testing.T) {
	w := newWorld(t)
	w.open()
	good := w.raw()
	a, err := build(w.opts)
	if err != nil {
		t.Fatal(err)
	}
	refuse := func(what string, load func() error) {
		t.Helper()
		before := w.raw()
		err := load()
		if reason := fault.ReasonOf(err); reason != "store_corrupt" && reason != "store_newer" {
			t.Errorf("%s: got %v", what, err)
		}
		if !slices.EqualFunc(before, w.raw(), func(x, y store.Record) bool { return x.Key == y.Key && bytes.Equal(x.Value, y.Value) }) {
			t.Errorf("%s: the store was written to", what)
		}
	}
	read := func() error { _, err := a.load(context.Background()); return err }
	open := func() error { _, err := Open(context.Background(), w.opts); return err }
	for _, record := range good {
		for i := range record.Value {
			changed := bytes.Clone(record.Value)
			changed[i] ^= 1 << (i % 8)
			w.put(store.Write{Key: record.Key, Value: changed})
			refuse(record.Key, read)
			if i%199 == 0 {
				refuse(record.Key+" at Open", open)
			}
		}
		for _, changed := range [][]byte{
			nil, record.Value[:1], record.Value[:len(record.Value)-1], append(bytes.Clone(record.Value), ' '), append(bytes.Clone(record.Value), 0),
			append([]byte{record.Value[0], ' '}, record.Value[1:]...),
			append([]byte{record.Value[0] + 1}, record.Value[1:]...),
			bytes.Replace(record.Value, []byte(`"mac"`), []byte(`"Mac"`), 1),
		} {
			w.put(store.Write{Key: record.Key, Value: changed})
			refuse(record.Key+" in another form", read)
		}
		w.put(store.Write{Key: record.Key, Value: record.Value})
	}
	if err := read(); err != nil {
		t.Fatalf("with everything put back: %v", err)
	}
	root, sequence := good[0], good[1]
	refused := map[string][]store.Write{
		"root removed":              {{Key: root.Key, Delete: true}},
		"sequence removed":          {{Key: sequence.Key, Delete: true}},
		"values exchanged":          {{Key: root.Key, Value: sequence.Value}, {Key: sequence.Key, Value: root.Value}},
		"root under another name":   {{Key: rootPrefix + strings.Repeat("0", 40), Value: root.Value}},
		"root moved":                {{Key: rootPrefix + strings.Repeat("0", 40), Value: root.Value}, {Key: root.Key, Delete: true}},
		"unknown kind of authority": {{Key: "authority/ssh/1", Value: root.Value}},
	}
	for what, writes := range refused {
		w.put(writes...)
		refuse(what, open)
		var back []store.Write
		for _, write := range writes {
			i := slices.IndexFunc(good, func(r store.Record) bool { return r.Key == write.Key })
			if i < 0 {
				back = append(back, store.Write{Key: write.Key, Delete: true})
			} else {
				back = append(back, store.Write{Key: write.Key, Value: good[i].Value})
			}
		}
		w.put(back...)
		if err := read(); err != nil {
			t.Fatalf("%s, put back: %v", what, err)
		}
	}
	// Both gone on a day on which a root may be made is an empty store; on any
	// other it is a loss.
	w.put(store.Write{Key: root.Key, Delete: true}, store.Write{Key: sequence.Key, Delete: true})
	w.opts.Bootstrap = ""
	_, err = Open(t.Context(), w.opts)
	wantReason(t, err, fault.Precondition, "authority_missing")
}

// I3: records that carry good MACs must still be those that the sequence's
// digest describes.
func TestAuthenticRecordsMustFitTheDigest(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	seal := func(record authorityRecord) store.Write {
		t.Helper()
		value, err := a.stamp.seal(rootPrefix+record.ID, record)
		if err != nil {
			t.Fatal(err)
		}
		return store.Write{Key: rootPrefix + record.ID, Value: value}
	}
	good := a.current.Load().view.active.record
	second, err := a.makeRoot(t.Context(), Prepared)
	if err != nil {
		t.Fatal(err)
	}
	otherKey := good
	otherKey.Certificate = second.cert.Raw
	misnamed, err := a.stamp.seal(rootPrefix+good.ID, with(good, func(r *authorityRecord) { r.ID = second.record.ID }))
	if err != nil {
		t.Fatal(err)
	}
	foreign := newKey()
	crossSigned := *a.current.Load().view.active.cert
	der, err := x509.CreateCertificate(rand.Reader, &crossSigned, &x509.Certificate{Subject: rootSubject, PublicKey: foreign.Public()}, crossSigned.PublicKey, foreign)
	if err != nil {
		t.Fatal(err)
	}
	for what, write := range map[string]store.Write{
		"another name inside":   {Key: rootPrefix + good.ID, Value: misnamed},
		"not self-signed":       seal(with(good, func(r *authorityRecord) { r.Certificate = der })),
		"no active root":        seal(with(good, func(r *authorityRecord) { r.State = Retired })),
		"unknown state":         seal(with(good, func(r *authorityRecord) { r.State = "forgotten" })),
		"authority added":       seal(second.record),
		"second active":         seal(with(second.record, func(r *authorityRecord) { r.State = Active })),
		"another's certificate": seal(otherKey),
		"no certificate":        seal(with(good, func(r *authorityRecord) { r.Certificate = []byte("x") })),
		"an issuer as root":     seal(with(good, func(r *authorityRecord) { r.Certificate = a.current.Load().issuer.cert.Raw })),
	} {
		w.put(write)
		if _, err := Open(t.Context(), w.opts); fault.ReasonOf(err) != "store_corrupt" {
			t.Errorf("%s: got %v", what, err)
		}
		w.put(store.Write{Key: rootPrefix + second.record.ID, Delete: true}, seal(good))
	}
	// A root whose key is another's opens no issuer.
	w.put(seal(with(good, func(r *authorityRecord) { r.KeyRef = second.record.KeyRef })))
	_, err = Open(t.Context(), w.opts)
	wantReason(t, err, fault.Precondition, "store_corrupt")
}

func with(r authorityRecord, change func(*authorityRecord)) authorityRecord {
	change(&r)
	return r
}

func TestAnotherSealKeyDoesNotOpenTheStore(t *testing.T) {
	w := newWorld(t)
	w.open()
	seal, err := keys.NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	w.opts.MAC, w.opts.Keys = seal.MAC, keys.NewSealed(seal, example)
	_, err = Open(t.Context(), w.opts)
	wantReason(t, err, fault.Precondition, "store_corrupt")
	if !strings.Contains(err.Error(), "seal_key_file") {
		t.Errorf("the message does not mention the seal key: %v", err)
	}
}

// I10: neither the root's key nor the seal key is in the store in the clear.
func TestStoreHoldsNoKeyInTheClear(t *testing.T) {
	w := newWorld(t)
	w.open()
	pkcs8EC := []byte{0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x04, 0x6d}
	for _, record := range w.raw() {
		if record.Key == sequenceKey {
			continue
		}
		a, err := build(w.opts)
		if err != nil {
			t.Fatal(err)
		}
		var body authorityRecord
		if err := a.stamp.open(record.Key, record.Value, &body); err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(body.KeyRef, pkcs8EC) || bytes.Contains(record.Value, []byte("PRIVATE")) {
			t.Error("a record shows a private key")
		}
	}
}

func TestOpenNeedsAllItsParts(t *testing.T) {
	for name, drop := range map[string]func(*Options){
		"store": func(o *Options) { o.Store = nil }, "keys": func(o *Options) { o.Keys = nil },
		"MAC": func(o *Options) { o.MAC = nil }, "audit": func(o *Options) { o.Audit = nil }, "log": func(o *Options) { o.Log = nil },
	} {
		w := newWorld(t)
		drop(&w.opts)
		if _, err := Open(t.Context(), w.opts); err == nil {
			t.Errorf("opened without %s", name)
		}
	}
}

// I4: nothing chains to a root before the root is durable.
func TestNoIssuerBeforeTheRootIsDurable(t *testing.T) {
	w := newWorld(t)
	refuse := func() error { return errDown }
	w.kv.onCommit.Store(&refuse)
	if a, err := Open(t.Context(), w.opts); err == nil {
		t.Fatalf("opened %v over a store that takes no root", a.Bundle().Roots)
	}
	if len(w.audit.taken("root.create")) != 1 {
		t.Error("the root was not even tried: the test proves nothing")
	}
	if lines := w.audit.taken("issuer.create"); len(lines) > 0 {
		t.Errorf("an issuer under a root that was never stored: %v", lines)
	}
}

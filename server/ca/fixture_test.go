package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"iter"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/keys"
	"github.com/seed-caa81108/assay/server/store"
)

var example = spiffeid.RequireTrustDomainFromString("example.org")

const testPrefix = "/assay/"

// ledger is an Auditor that keeps the lines.
type ledger struct {
	mu     sync.Mutex
	lines  []audit.Line
	err    error
	before func()
}

func (l *ledger) Record(_ context.Context, lines ...audit.Line) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.before != nil {
		l.before()
	}
	if l.err != nil {
		return l.err
	}
	l.lines = append(l.lines, lines...)
	return nil
}

func (l *ledger) taken(action string) []audit.Line {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(l.lines), func(line audit.Line) bool { return line.Action != action })
}

// troubled is a real store in front of which things go wrong.
type troubled struct {
	store.KV
	commits atomic.Int64
	// down makes every call fail; deaf makes only Watch wait in silence.
	down, deaf atomic.Bool
	// compacted is how many watches end at once because they fell behind.
	compacted atomic.Int64
	// onCommit may answer a commit in the store's place.
	onCommit atomic.Pointer[func() error]
	// onList runs before a list is read.
	onList atomic.Pointer[func()]
}

var errDown = fault.New(fault.NotReady, "store_unreachable", "the store is down")

func (k *troubled) Get(ctx context.Context, key string) (store.Record, error) {
	if k.down.Load() {
		return store.Record{}, errDown
	}
	return k.KV.Get(ctx, key)
}

func (k *troubled) List(ctx context.Context, prefix, after string, limit int) (store.Page, error) {
	if k.down.Load() {
		return store.Page{}, errDown
	}
	if run := k.onList.Load(); run != nil {
		(*run)()
	}
	return k.KV.List(ctx, prefix, after, limit)
}

func (k *troubled) Commit(ctx context.Context, ifs []store.Precondition, writes []store.Write) (int64, error) {
	if k.down.Load() {
		return 0, errDown
	}
	if answer := k.onCommit.Load(); answer != nil {
		if err := (*answer)(); err != nil {
			return 0, err
		}
	}
	k.commits.Add(1)
	return k.KV.Commit(ctx, ifs, writes)
}

func (k *troubled) Watch(ctx context.Context, prefix string, from int64) iter.Seq2[store.Batch, error] {
	if k.compacted.Add(-1) >= 0 {
		return func(yield func(store.Batch, error) bool) { yield(store.Batch{}, store.ErrCompacted) }
	}
	if !k.deaf.Load() {
		return k.KV.Watch(ctx, prefix, from)
	}
	return func(yield func(store.Batch, error) bool) {
		<-ctx.Done()
		yield(store.Batch{}, ctx.Err())
	}
}

// world is a store with all that an Authority needs around it.
type world struct {
	t     testing.TB
	kv    *troubled
	audit *ledger
	seal  keys.SealKey
	opts  Options
}

// newWorld makes an empty world in which a root may be made today.
func newWorld(t testing.TB) *world {
	t.Helper()
	bolt, err := store.OpenBolt(store.BoltConfig{Dir: filepath.Join(t.TempDir(), "store"), NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := bolt.Close(); err != nil {
			t.Error(err)
		}
	})
	seal, err := keys.NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, kv: &troubled{KV: bolt}, audit: &ledger{}, seal: seal}
	w.opts = Options{
		TrustDomain: example, AgentSVIDTTL: 12 * time.Hour, ReservedPrefix: testPrefix,
		Bootstrap: time.Now().UTC().Format(time.DateOnly),
		Store:     w.kv, Keys: keys.NewSealed(seal, example), MAC: seal.MAC,
		Audit: w.audit, Log: slog.New(slog.DiscardHandler),
	}
	return w
}

func (w *world) open() *Authority {
	w.t.Helper()
	a, err := Open(context.Background(), w.opts)
	if err != nil {
		w.t.Fatalf("open: %v", err)
	}
	return a
}

func (w *world) origin() audit.Origin { return audit.Origin{RequestID: "test"} }

// raw returns all records of the package, as stored.
func (w *world) raw() []store.Record {
	w.t.Helper()
	page, err := w.kv.KV.List(context.Background(), "", "", 0)
	if err != nil {
		w.t.Fatal(err)
	}
	return page.Records
}

// put writes behind the authority's back.
func (w *world) put(writes ...store.Write) {
	w.t.Helper()
	if _, err := w.kv.KV.Commit(context.Background(), nil, writes); err != nil {
		w.t.Fatal(err)
	}
}

// start runs the authority until the test ends and returns where Run's error
// comes out.
func start(t testing.TB, a *Authority) <-chan error {
	ctx, cancel := context.WithCancel(context.Background())
	done, result := make(chan struct{}), make(chan error, 1)
	go func() {
		defer close(done)
		result <- a.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return result
}

// advance lets time pass; in a bubble only, where that takes none.
func advance(d time.Duration) { <-time.After(d) }

func workload(path string) X509Request {
	return X509Request{Kind: Workload, ID: spiffeid.RequireFromPath(example, path), PublicKey: newKey().Public()}
}

func agentRequest() X509Request {
	return X509Request{Kind: Agent, ID: spiffeid.RequireFromPath(example, testPrefix+"agent/join_token/1"), PublicKey: newKey().Public()}
}

func serverRequest() X509Request {
	return X509Request{Kind: Server, ID: spiffeid.RequireFromPath(example, testPrefix+"server"), PublicKey: newKey().Public()}
}

func newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

// issue has one certificate signed and returns the leaf, after all checks that
// every certificate must stand.
func issue(t testing.TB, a *Authority, req X509Request) *x509.Certificate {
	t.Helper()
	svids, err := a.IssueX509(context.Background(), audit.Origin{}, []X509Request{req})
	if err != nil {
		t.Fatalf("issue: %v", err)
	}
	if svids[0].Err != nil {
		t.Fatalf("issue: %v", svids[0].Err)
	}
	return inspect(t, a, req, svids[0])
}

// inspect checks an answer against its request, the lints, and the bundle.
func inspect(t testing.TB, a *Authority, req X509Request, svid X509SVID) *x509.Certificate {
	t.Helper()
	if len(svid.Chain) != 2 {
		t.Fatalf("the chain has %d certificates, want leaf and issuer", len(svid.Chain))
	}
	leaf, err := x509.ParseCertificate(svid.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	iss, err := x509.ParseCertificate(svid.Chain[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(Lint(leaf, a.profiles.leaf[req.Kind]), Lint(iss, a.profiles.issuer)); err != nil {
		t.Fatal(err)
	}
	below := x509.NewCertPool()
	below.AddCert(iss)
	chains, err := leaf.Verify(x509.VerifyOptions{Roots: a.Bundle().Pool(), Intermediates: below, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		t.Fatalf("verify: %v", err)
	}
	root := chains[0][len(chains[0])-1]
	if hex.EncodeToString(root.SubjectKeyId) != svid.AuthorityID {
		t.Errorf("the answer names authority %s, the chain ends at %x", svid.AuthorityID, root.SubjectKeyId)
	}
	if got := leaf.URIs[0].String(); got != req.ID.String() {
		t.Errorf("certificate for %s, want %s", got, req.ID)
	}
	if !req.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(leaf.PublicKey) {
		t.Error("the certificate has another public key")
	}
	if hexSerial(leaf.SerialNumber) != svid.Serial || !leaf.NotAfter.Equal(svid.NotAfter) || !leaf.NotBefore.Equal(svid.NotBefore) {
		t.Errorf("the answer says serial %s, %v to %v; the certificate %x, %v to %v",
			svid.Serial, svid.NotBefore, svid.NotAfter, leaf.SerialNumber, leaf.NotBefore, leaf.NotAfter)
	}
	if leaf.NotAfter.After(iss.NotAfter) || iss.NotAfter.After(root.NotAfter) || leaf.NotBefore.Before(iss.NotBefore) || iss.NotBefore.Before(root.NotBefore) {
		t.Error("a certificate lives outside what signed it")
	}
	return leaf
}

func wantReason(t testing.TB, err error, kind fault.Kind, reason string) {
	t.Helper()
	if !errors.Is(err, kind) || fault.ReasonOf(err) != reason {
		t.Fatalf("got error %v, want %s with reason %s", err, kind.Error(), reason)
	}
}

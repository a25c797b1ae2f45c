package state_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/agent/state"
	"github.com/seed-caa81108/assay/pkg/fault"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	agentID = spiffeid.RequireFromString("spiffe://example.org/assay/agent/join_token/abc")
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newKey() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

func certificate(key *ecdsa.PrivateKey, ca bool, id spiffeid.ID, extra ...pkix.Extension) *x509.Certificate {
	spki := must(x509.MarshalPKIXPublicKey(&key.PublicKey))
	ski := sha256.Sum256(spki)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: ca, KeyUsage: x509.KeyUsageDigitalSignature, SubjectKeyId: ski[:20], ExtraExtensions: extra,
	}
	if ca {
		c.KeyUsage = x509.KeyUsageCertSign
	}
	if !id.IsZero() {
		c.URIs = []*url.URL{id.URL()}
	}
	return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key))))
}

func identity(key *ecdsa.PrivateKey) state.Identity {
	return state.Identity{AgentID: agentID, Key: key, Chain: []*x509.Certificate{certificate(key, false, agentID)}}
}

func root() state.Authority {
	return must(state.ParseAuthority("", certificate(newKey(), true, td.ID()).Raw))
}

func bundle(sequence uint64, authenticated bool, roots ...state.Authority) *state.Bundle {
	return must(state.NewBundle(td, sequence, authenticated, roots))
}

func open(t *testing.T, dir string) *state.State {
	t.Helper()
	s, err := state.Open(dir, td)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func reopen(t *testing.T, s *state.State, dir string) *state.State {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, dir)
}

func wantReason(t *testing.T, err error, reason string) {
	t.Helper()
	if err == nil || fault.ReasonOf(err) != reason {
		t.Fatalf("got %v, want reason %s", err, reason)
	}
}

func TestEverythingSurvivesARestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	s := open(t, dir)
	if _, ok := s.Identity(); ok {
		t.Fatal("identity in an empty directory")
	}
	key := must(s.NextKey())
	s = reopen(t, s, dir)
	if again := must(s.NextKey()); !again.Equal(key) {
		t.Fatal("the next key changed over a restart: a lost reply could not be asked for again")
	}
	id := identity(key)
	id.TokenHash = "aa"
	b := bundle(7, true, root(), root())
	delivered := []state.Delivered{{Sequence: 6, AuthorityID: "x", Until: time.Now().UTC().Truncate(time.Second)}}
	for _, err := range []error{s.SaveIdentity(id), s.SaveBundle(b), s.SaveDelivered(delivered)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s = reopen(t, s, dir)
	defer func() { _ = s.Close() }()
	got, ok := s.Identity()
	if !ok || got.AgentID != agentID || !got.Key.Equal(key) || !got.Chain[0].Equal(id.Chain[0]) || got.TokenHash != "aa" {
		t.Errorf("identity came back as %+v", got)
	}
	if !got.NotAfter().Equal(id.Chain[0].NotAfter) {
		t.Errorf("ends %v", got.NotAfter())
	}
	if nb, ok := s.Bundle(); !ok || !nb.Equal(b) || !nb.Authenticated {
		t.Errorf("bundle came back as %+v", nb)
	}
	if d := s.Delivered(); len(d) != 1 || d[0] != delivered[0] {
		t.Errorf("delivered came back as %+v", d)
	}
	if _, pending := s.PendingKey(); pending || must(s.NextKey()).Equal(key) {
		t.Error("the key of the identity is also the next one")
	}
}

func TestFilesAreClosedToOthers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	defer func() { _ = s.Close() }()
	key := must(s.NextKey())
	for _, err := range []error{s.SaveIdentity(identity(key)), s.SaveBundle(bundle(1, true, root())), s.SaveDelivered(nil)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(s.NextKey())
	if info := must(os.Stat(dir)); info.Mode().Perm() != 0o700 {
		t.Errorf("directory has mode %v", info.Mode())
	}
	files := must(os.ReadDir(dir))
	if len(files) < 5 {
		t.Errorf("only %d files", len(files))
	}
	for _, f := range files {
		if info := must(f.Info()); info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", f.Name(), info.Mode())
		}
	}
}

func TestOneProcessPerDirectory(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	defer func() { _ = s.Close() }()
	_, err := state.Open(dir, td)
	wantReason(t, err, "data_dir_locked")
}

func TestStateOfAnotherTrustDomainIsRefused(t *testing.T) { // BUN-22
	for _, what := range []string{"identity", "bundle"} {
		dir := t.TempDir()
		s := open(t, dir)
		if what == "identity" {
			if err := s.SaveIdentity(identity(must(s.NextKey()))); err != nil {
				t.Fatal(err)
			}
		} else if err := s.SaveBundle(bundle(1, true, root())); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		_, err := state.Open(dir, spiffeid.RequireTrustDomainFromString("other.org"))
		wantReason(t, err, "config_trust_domain")
	}
}

func TestACrashBetweenTheWritesOfSaveIdentityLeavesNoUsedKey(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	key := must(s.NextKey())
	keyFile := must(os.ReadFile(filepath.Join(dir, "next-key.json")))
	if err := s.SaveIdentity(identity(key)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "next-key.json"), keyFile, 0o600); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s, dir)
	defer func() { _ = s.Close() }()
	if must(s.NextKey()).Equal(key) {
		t.Fatal("a renewal would reuse the key")
	}
}

func TestBundleNeverGoesBack(t *testing.T) {
	a, b := root(), root()
	tainted := a
	tainted.Tainted = true
	cases := []struct {
		name      string
		have, new *state.Bundle
		reason    string
	}{
		{"bootstrap by anything", bundle(9, false, a), bundle(1, false, b), ""},
		{"bootstrap by authenticated", bundle(9, false, a), bundle(1, true, b), ""},
		{"authenticated by bootstrap", bundle(1, true, a), bundle(9, false, a), "bundle_rollback"},
		{"higher", bundle(3, true, a), bundle(4, true, b), ""},
		{"same again", bundle(3, true, a, b), bundle(3, true, b, a), ""},
		{"lower", bundle(3, true, a), bundle(2, true, a), "bundle_rollback"},
		{"same sequence, other roots", bundle(3, true, a), bundle(3, true, a, b), "bundle_rollback"},
		{"same sequence, other taint", bundle(3, true, a), bundle(3, true, tainted), "bundle_rollback"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			if err := s.SaveBundle(c.have); err != nil {
				t.Fatal(err)
			}
			want := c.new
			if err := s.SaveBundle(c.new); c.reason != "" {
				wantReason(t, err, c.reason)
				want = c.have
			} else if err != nil {
				t.Fatal(err)
			}
			s = reopen(t, s, dir) // the rule holds across restarts
			defer func() { _ = s.Close() }()
			if got, _ := s.Bundle(); !got.Equal(want) || got.Authenticated != want.Authenticated {
				t.Errorf("holds %+v", got)
			}
		})
	}
}

func TestUnusableBundlesAreRefused(t *testing.T) { // BUN-22
	s := open(t, t.TempDir())
	defer func() { _ = s.Close() }()
	a := root()
	other := &state.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org"), Sequence: 1, Authorities: []state.Authority{a}}
	for name, b := range map[string]*state.Bundle{
		"empty":          {TrustDomain: td, Sequence: 1},
		"twice the same": {TrustDomain: td, Sequence: 1, Authorities: []state.Authority{a, a}},
		"foreign":        other,
		"nameless":       {Sequence: 1, Authorities: []state.Authority{a}},
	} {
		if err := s.SaveBundle(b); fault.ReasonOf(err) != "bundle_invalid" {
			t.Errorf("%s: %v", name, err)
		}
	}
	leaf := certificate(newKey(), false, agentID)
	if _, err := state.ParseAuthority("", leaf.Raw); fault.ReasonOf(err) != "bundle_invalid" {
		t.Errorf("a leaf as root: %v", err)
	}
	if _, err := state.ParseAuthority(strings.Repeat("0", 40), a.Certificate.Raw); fault.ReasonOf(err) != "bundle_invalid" {
		t.Errorf("another ID: %v", err)
	}
	if a.ID != hex.EncodeToString(a.Certificate.SubjectKeyId) {
		t.Errorf("ID is %s", a.ID)
	}
	b := bundle(1, true, a)
	if got, ok := b.Authority(a.ID); !ok || got.Certificate != a.Certificate {
		t.Error("root not found by ID")
	}
	if _, ok := b.Authority("ffff"); ok {
		t.Error("unknown root found")
	}
}

func TestCacheKeysOutliveOneChangeOfTheKey(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if keys := must(s.CacheKeys("x")); len(keys) != 0 {
		t.Fatal("cache key without identity")
	}
	if err := s.SaveIdentity(identity(must(s.NextKey()))); err != nil {
		t.Fatal(err)
	}
	first := must(s.CacheKeys("x"))
	if len(first) != 1 || first[0].Equal(must(s.CacheKeys("y"))[0]) {
		t.Fatal("labels must give different keys")
	}
	if err := s.SaveIdentity(identity(must(s.NextKey()))); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s, dir)
	both := must(s.CacheKeys("x"))
	if len(both) != 2 || !both[1].Equal(first[0]) || both[0].Equal(first[0]) {
		t.Fatal("after a change the old key must still open")
	}
	if err := s.Resealed("x", both[1]); err != nil || len(must(s.CacheKeys("x"))) != 2 {
		t.Fatal("resealing under the old key must not forget it")
	}
	if err := s.Resealed("x", both[0]); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, s, dir)
	defer func() { _ = s.Close() }()
	if keys := must(s.CacheKeys("x")); len(keys) != 1 || !keys[0].Equal(both[0]) {
		t.Fatal("the old key was not forgotten")
	}
}

func TestDropIdentityLeavesNoKey(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := s.SaveIdentity(identity(must(s.NextKey()))); err != nil {
		t.Fatal(err)
	}
	if err := s.SaveBundle(bundle(1, true, root())); err != nil {
		t.Fatal(err)
	}
	must(s.NextKey())
	if err := s.DropIdentity(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"identity.json", "next-key.json"} {
		if _, err := os.Stat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s is still there", name)
		}
	}
	s = reopen(t, s, dir)
	defer func() { _ = s.Close() }()
	if _, ok := s.Identity(); ok {
		t.Error("identity came back")
	}
	if _, ok := s.Bundle(); !ok {
		t.Error("the bundle went too")
	}
}

func TestDamagedFilesAreNamedWithTheirMend(t *testing.T) {
	whole := t.TempDir()
	s := open(t, whole)
	for _, err := range []error{
		s.SaveIdentity(identity(must(s.NextKey()))),
		s.SaveBundle(bundle(1, true, root())), s.SaveDelivered([]state.Delivered{{Sequence: 1}}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(s.NextKey())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	damages := map[string]func([]byte) []byte{
		"empty":     func([]byte) []byte { return nil },
		"truncated": func(b []byte) []byte { return b[:len(b)/2] },
		"newer":     func(b []byte) []byte { return []byte(strings.Replace(string(b), `"version":1`, `"version":2`, 1)) },
		"unknown":   func(b []byte) []byte { return []byte(strings.Replace(string(b), `{`, `{"x":1,`, 1)) },
		"trailing":  func(b []byte) []byte { return append(b, "{}"...) },
		"zeroes":    func(b []byte) []byte { return make([]byte, len(b)) },
	}
	for _, name := range []string{"identity.json", "next-key.json", "bundle.json", "delivered.json"} {
		for kind, damage := range damages {
			dir := t.TempDir()
			if err := os.CopyFS(filepath.Join(dir, "d"), os.DirFS(whole)); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "d", name)
			data := must(os.ReadFile(path))
			if err := os.WriteFile(path, damage(data), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, e := range must(os.ReadDir(filepath.Join(dir, "d"))) {
				if err := os.Chmod(filepath.Join(dir, "d", e.Name()), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			_, err := state.Open(filepath.Join(dir, "d"), td)
			if fault.ReasonOf(err) != "state_corrupt" || !strings.Contains(fault.SafeText(err), path) || !strings.Contains(fault.SafeText(err), "remove it") {
				t.Errorf("%s %s: %v", name, kind, err)
			}
		}
	}
}

func TestIdentityWithAnotherKeyIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	id := identity(newKey())
	id.Key = newKey()
	if err := s.SaveIdentity(id); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := state.Open(dir, td)
	wantReason(t, err, "state_corrupt")
}

// A kill in the middle of a write leaves keys under another name: the next start
// sweeps them.
func TestLeftoversOfAKillAreSwept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	s := open(t, dir)
	defer func() { _ = s.Close() }()
	var left []string
	for _, name := range []string{"identity.json", "next-key.json", "bundle.json", "delivered.json"} {
		left = append(left, filepath.Join(dir, "."+name+".0123456789abcdef.tmp"))
	}
	foreign := filepath.Join(dir, ".notes.0123456789abcdef.tmp")
	for _, path := range append(left, foreign) {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = reopen(t, s, dir)
	for _, path := range left {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there", path)
		}
	}
	if _, err := os.Lstat(foreign); err != nil {
		t.Error(err)
	}
}

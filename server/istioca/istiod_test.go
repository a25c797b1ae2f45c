package istioca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/server/audit"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/server/kube"
)

// testRoot signs as an authority does: by an issuer. It lives as long as its test.
type testRoot struct {
	ca.Root
	key    *ecdsa.PrivateKey
	issuer *x509.Certificate
	signer *ecdsa.PrivateKey
}

func newCertificate(t *testing.T, template, parent *x509.Certificate, key, by *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()

	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newTestKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newTestRoot(t *testing.T, id string) *testRoot {
	t.Helper()
	authority := func(cn string) *x509.Certificate {
		return &x509.Certificate{
			Subject: pkix.Name{CommonName: cn}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(100 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
	}
	r := &testRoot{key: newTestKey(t), signer: newTestKey(t)}
	self := authority("root")
	r.Root = ca.Root{ID: id, Certificate: newCertificate(t, self, self, r.key, r.key)}
	r.issuer = newCertificate(t, authority("issuer"), r.Certificate, r.signer, r.key)
	return r
}

// testSigner is an authority without a store.
type testSigner struct {
	t      *testing.T
	active *testRoot
	bundle *ca.Bundle
	asked  []ca.X509Request

	mu   sync.Mutex
	fail error
}

func (s *testSigner) setFail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

func (s *testSigner) Bundle() *ca.Bundle    { return s.bundle }
func (s *testSigner) Issuer() ca.IssuerInfo { return ca.IssuerInfo{AuthorityID: s.active.ID} }

func (s *testSigner) IssueX509(_ context.Context, by audit.Origin, reqs []ca.X509Request) ([]ca.X509SVID, error) {
	s.t.Helper()
	if by.Actor.Kind != "server" || len(reqs) != 1 {
		s.t.Errorf("%d requests by %+v", len(reqs), by)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return nil, s.fail
	}
	req := reqs[0]
	s.asked = append(s.asked, req)
	now := time.Now().Truncate(time.Second)

	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		URIs: []*url.URL{req.ID.URL()}, DNSNames: req.DNSNames, NotBefore: now, NotAfter: now.Add(time.Hour),
	}, s.active.issuer, req.PublicKey, s.active.signer)
	if err != nil {
		s.t.Fatal(err)
	}
	return []ca.X509SVID{{Chain: [][]byte{der, s.active.issuer.Raw}, Serial: "5e", NotAfter: now.Add(time.Hour)}}, nil
}

// testSecret is a cluster's only Secret.
type testSecret struct {
	held   kube.TLSSecret
	puts   int
	refuse error // of changes

	mu    sync.Mutex
	fails error
}

func (s *testSecret) delete() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held, s.fails = kube.TLSSecret{}, fault.New(fault.NotReady, "kubernetes_secret_missing", "there is no Secret istio-system/istiod-tls")
}

func (s *testSecret) setFails(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fails = err
}

// written says how often, while it is kept.
func (s *testSecret) written() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.puts
}

func (s *testSecret) TLSSecret(context.Context, string, string, string) (kube.TLSSecret, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held, s.fails
}

func (s *testSecret) PutTLSSecret(_ context.Context, cluster, namespace, name string, _, will kube.TLSSecret) error {
	if cluster+" "+namespace+"/"+name != "prod istio-system/istiod-tls" {
		return errors.New("another Secret: " + cluster + " " + namespace + "/" + name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refuse != nil {
		return s.refuse
	}
	s.held, s.puts = will, s.puts+1
	return nil
}

// testLog is a log that is read while it is written.
type testLog struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *testLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *testLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

type istiodTest struct {
	*istiod
	signer *testSigner
	secret *testSecret
	log    *testLog
}

func newIstiodTest(t *testing.T) *istiodTest {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("example.org")
	root := newTestRoot(t, "root-1")
	i := &istiodTest{
		signer: &testSigner{t: t, active: root, bundle: &ca.Bundle{TrustDomain: td, Roots: []ca.Root{root.Root}}},
		secret: &testSecret{}, log: &testLog{},
	}
	clusters := kube.Config{Clusters: map[string]kube.ClusterConfig{"prod": {}}, Template: kube.DefaultTemplate}
	cfg := Config{
		Listen: ":8444", DNSNames: []string{"ca"}, Clusters: map[string]ClusterConfig{"prod": {IstiodSecret: "istio-system/istiod-tls"}},
	}.WithDefaults(clusters)
	if err := cfg.Check(clusters); err != nil {
		t.Fatal(err)
	}
	all, err := NewIstiods(IstiodOptions{
		TrustDomain: td, Config: cfg, Server: spiffeid.RequireFromString("spiffe://example.org/assay/server"), Authority: i.signer, Secrets: i.secret,
		Log: slog.New(slog.NewTextHandler(i.log, &slog.HandlerOptions{Level: slog.LevelDebug})), Registerer: prometheus.NewRegistry(),
	})
	if err != nil || len(all.all) != 1 {
		t.Fatalf("%v, %v", all, err)
	}
	i.istiod = all.all[0]
	return i
}

func (i *istiodTest) keepNow(t *testing.T) {
	t.Helper()
	if err := i.keep(t.Context(), i.signer.bundle); err != nil {
		t.Fatal(err)
	}
}

// The Secret has what istiod needs, and gets another certificate for each reason
// that there is to make one.
func TestIstiodsSecretIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIstiodTest(t)
		i.keepNow(t)
		want := ca.X509Request{
			Kind: ca.Mesh, ID: spiffeid.RequireFromString("spiffe://example.org/ns/istio-system/sa/istiod"), Cluster: "prod", Rule: "istio_istiod",
			DNSNames: []string{"istiod.istio-system.svc", "istiod-remote.istio-system.svc", "istio-pilot.istio-system.svc"},
		}
		got := i.signer.asked[0]
		if got.Kind != want.Kind || got.ID != want.ID || got.Cluster != want.Cluster || got.Rule != want.Rule || strings.Join(got.DNSNames, " ") != strings.Join(want.DNSNames, " ") {
			t.Errorf("asked for %+v, want %+v", got, want)
		}
		block, rest := pem.Decode(i.secret.held.Key)
		if block == nil || block.Type != "PRIVATE KEY" || len(rest) > 0 {
			t.Fatal("the key is no PKCS#8 block")
		}
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if ec, ok := key.(*ecdsa.PrivateKey); err != nil || !ok || ec.Curve != elliptic.P256() || !ec.PublicKey.Equal(got.PublicKey) {
			t.Errorf("the key is %T, %v", key, err)
		}
		if n := bytes.Count(i.secret.held.Chain, []byte("BEGIN CERTIFICATE")); n != 2 || !bytes.Equal(i.secret.held.Roots, i.signer.bundle.PEM()) {
			t.Errorf("the chain has %d certificates, and the roots are\n%s", n, i.secret.held.Roots)
		}
		i.keepNow(t)
		if i.secret.puts != 1 {
			t.Errorf("what is good was written again")
		}
		if got := testutil.ToFloat64(i.notAfter); got != float64(time.Now().Add(time.Hour).Unix()) {
			t.Errorf("the metric has %v", got)
		}

		other := newTestRoot(t, "root-2")
		keys := [][]byte{i.secret.held.Key}
		for _, change := range []struct {
			why string
			to  func()
		}{
			{"there is none", func() { i.secret.held = kube.TLSSecret{} }},
			{"it is no certificate of ours", func() { i.secret.held.Key = keys[0] }},
			{"it is no certificate of ours", func() { i.secret.held.Chain = []byte("nonsense") }},
			{"it is no certificate of ours", func() { i.secret.held.Chain, _, _ = bytes.Cut(i.secret.held.Chain, []byte("\n-----BEGIN")) }},
			{"the trust bundle is another", func() { i.secret.held.Roots = nil }},
			{"the trust bundle is another", func() { i.secret.held.Roots = append(i.secret.held.Roots, '\n') }},
			{"the trust bundle is another", func() {
				i.signer.bundle = &ca.Bundle{TrustDomain: i.signer.bundle.TrustDomain, Roots: []ca.Root{i.signer.active.Root, other.Root}}
			}},
			{"another root signs", func() { i.signer.active = other }},
			{"it is no certificate of ours", func() {
				third := newTestRoot(t, "root-3")
				i.signer.active, i.signer.bundle = third, &ca.Bundle{TrustDomain: i.signer.bundle.TrustDomain, Roots: []ca.Root{third.Root}}
			}},
			{"it has other names", func() { i.dns = append([]string{"istiod-canary.istio-system.svc"}, i.dns...) }},
			{"half of its life is over", func() { time.Sleep(36 * time.Minute) }},
		} {
			time.Sleep(istiodUndone + time.Second)
			i.log.text.Reset()
			before := i.secret.puts
			change.to()
			i.keepNow(t)
			i.keepNow(t)
			if i.secret.puts != before+1 || !strings.Contains(i.log.String(), `why="`+change.why+`"`) {
				t.Errorf("%s: written %d times, and the log has %s", change.why, i.secret.puts-before, i.log)
			}
			for _, key := range keys {
				if bytes.Equal(key, i.secret.held.Key) {
					t.Errorf("%s: the key is an old one", change.why)
				}
			}
			keys = append(keys, i.secret.held.Key)
		}
		time.Sleep(23 * time.Minute)
		before := i.secret.puts
		if i.keepNow(t); i.secret.puts != before {
			t.Error("renewed long before half of its life was over")
		}
	})
}

// Who else keeps the Secret is not fought: after a few changes that were taken back
// it is written no more than twice a minute, and the log says so.
func TestASecretThatSomebodyElseKeeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIstiodTest(t)
		refused := 0
		for range 120 { // ten minutes
			i.secret.held.Chain = []byte("another's")
			if err := i.keep(t.Context(), i.signer.bundle); fault.ReasonOf(err) == "kubernetes_contested" {
				refused++
			} else if err != nil {
				t.Fatal(err)
			}
			time.Sleep(istiodAgain)
		}
		if refused < 60 || i.secret.puts > istiodUndoneTimes+25 {
			t.Errorf("in ten minutes it was written %d times and left %d times", i.secret.puts, refused)
		}
		time.Sleep(istiodUndone + time.Second)
		if before := i.secret.puts; i.keep(t.Context(), i.signer.bundle) != nil || i.secret.puts != before+1 {
			t.Error("it is not written any more")
		}
	})
}

// What could not be put there is not made again while it is good.
func TestACertificateThatCouldNotBePutIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIstiodTest(t)
		i.secret.refuse = fault.New(fault.NotReady, "kubernetes_forbidden", "no")
		for range 10 {
			if err := i.keep(t.Context(), i.signer.bundle); fault.ReasonOf(err) != "kubernetes_forbidden" {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		i.secret.refuse = nil
		i.keepNow(t)
		if n := len(i.signer.asked); n != 1 || i.secret.puts != 1 {
			t.Errorf("%d certificates for one Secret that was written %d times", n, i.secret.puts)
		}
	})
}

// Trouble is told at once and then once a minute, and never with the key (NEG-18).
func TestIstiodsTroubleIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIstiodTest(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		i.secret.fails = fault.New(fault.NotReady, "kubernetes_forbidden", "the cluster prod does not let the server get secrets istiod-tls: give it that right")
		go func() { defer close(done); i.run(ctx) }()
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if n := strings.Count(i.log.String(), "get secrets istiod-tls"); n < 2 || n > 4 {
			t.Errorf("told %d times in three minutes:\n%s", n, i.log)
		}
		if got := testutil.ToFloat64(i.notAfter); got != 0 {
			t.Errorf("the metric has %v", got)
		}
		i.signer.setFail(fault.New(fault.NotReady, "store_silent", "the store is silent"))
		i.secret.setFails(nil)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if n := i.secret.written(); n != 0 || !strings.Contains(i.log.String(), "the store is silent") {
			t.Errorf("written %d times:\n%s", n, i.log)
		}
		i.signer.setFail(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := i.secret.written(); n != 1 {
			t.Errorf("written %d times", n)
		}
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		if n := i.secret.written(); n < 5 || n > 8 {
			t.Errorf("written %d times in three hours", n)
		}
		cancel()
		<-done
		if strings.Contains(i.log.String(), "PRIVATE") || strings.Contains(i.log.String(), string(i.secret.held.Key)) { // NEG-18
			t.Error("the key is in the log")
		}
	})
}

// A Secret that is not there is told of and looked for, and nothing is signed
// before it is there again.
func TestASecretThatIsNotThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIstiodTest(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); i.run(ctx) }()
		synctest.Wait()
		if i.secret.written() != 1 || testutil.ToFloat64(i.notAfter) == 0 {
			t.Errorf("written %d times, and the metric has %v", i.secret.written(), testutil.ToFloat64(i.notAfter))
		}
		for n := range 2 {
			i.secret.delete()
			time.Sleep(10*time.Minute + istiodAgain)
			synctest.Wait()
			if told := strings.Count(i.log.String(), "there is no Secret"); told < 10*(n+1) || told > 11*(n+1) {
				t.Errorf("told %d times in ten minutes:\n%s", told, i.log)
			}
			if got := testutil.ToFloat64(i.notAfter); got != 0 || i.secret.written() != n+1 {
				t.Errorf("written %d times, and the metric has %v", i.secret.written(), got)
			}
			i.secret.setFails(nil)
			time.Sleep(istiodAgain)
			synctest.Wait()
			if i.secret.written() != n+2 || testutil.ToFloat64(i.notAfter) == 0 {
				t.Errorf("made again it was written %d times, and the metric has %v", i.secret.written(), testutil.ToFloat64(i.notAfter))
			}
		}
		cancel()
		<-done
		if n := len(i.signer.asked); n != 3 {
			t.Errorf("%d certificates for a Secret that was there three times", n)
		}
	})
}

func TestWhatIsKeptInAClusterIsChecked(t *testing.T) {
	watched := kube.Config{Clusters: map[string]kube.ClusterConfig{"prod": {}}, Template: kube.DefaultTemplate}
	check := func(c ClusterConfig, clusters kube.Config) string {
		cfg := Config{Listen: ":8444", DNSNames: []string{"ca"}, Clusters: map[string]ClusterConfig{"prod": c}}.WithDefaults(clusters)
		if err := cfg.Check(clusters); err != nil {
			return err.Error()
		}
		return ""
	}
	oidc := ClusterConfig{Issuer: "https://issuer", OIDC: &OIDCConfig{JWKSFile: "/keys"}}
	nowhere := kube.Config{Template: kube.DefaultTemplate}
	withRoots, withSecret := oidc, oidc
	withRoots.RootConfigMaps, withSecret.IstiodSecret = true, "istio-system/istiod-tls"
	for _, c := range []struct {
		name     string
		cfg      ClusterConfig
		clusters kube.Config
		want     string
	}{
		{"both", ClusterConfig{RootConfigMaps: true, IstiodSecret: "istio-system/istiod-tls", IstiodDNSNames: []string{"istiod-1-29.istio-system.svc"}}, watched, ""},
		{"neither", ClusterConfig{}, watched, ""},
		{"roots elsewhere", withRoots, nowhere, "istio.clusters.prod.root_config_maps is for a cluster of kubernetes.clusters"},
		{"secret elsewhere", withSecret, nowhere, "istio.clusters.prod.istiod_secret is for a cluster of kubernetes.clusters"},
		{"no namespace", ClusterConfig{IstiodSecret: "istiod-tls"}, watched, "is not namespace/name"},
		{"names alone", ClusterConfig{IstiodDNSNames: []string{"istiod"}}, watched, "istiod_dns_names is for istiod_secret"},
		{"a bad name", ClusterConfig{IstiodSecret: "a/b", IstiodDNSNames: []string{"a b"}}, watched, "istio.clusters.prod.istiod_dns_names: "},
	} {
		if got := check(c.cfg, c.clusters); c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
	cfg := Config{Listen: ":8444", Clusters: map[string]ClusterConfig{"b": {RootConfigMaps: true}, "a": {RootConfigMaps: true}, "c": {}}}
	if got := strings.Join(cfg.RootConfigMaps(), " "); got != "a b" {
		t.Errorf("roots are kept in %q", got)
	}
}

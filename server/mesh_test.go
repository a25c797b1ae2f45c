package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/structpb"
	istiov1 "istio.io/api/security/v1alpha1"

	"github.com/seed-caa81108/assay/pkg/rpc"
	"github.com/seed-caa81108/assay/server/istioca"
	"github.com/seed-caa81108/assay/server/kube"
	"github.com/seed-caa81108/assay/test/istioclient"
)

// mesh is a server with a mesh whose tokens are verified by a key file; the test
// has the key.
type mesh struct {
	*harness
	issuer *istioclient.Issuer
}

func startMesh(t *testing.T, changes ...func(*Config)) *mesh {
	t.Helper()
	issuer, err := istioclient.NewIssuer()
	if err != nil {
		t.Fatal(err)
	}
	m := &mesh{issuer: issuer}
	m.harness = start(t, append([]func(*Config){func(c *Config) { m.configure(t, c) }}, changes...)...)
	return m
}

func (m *mesh) configure(t *testing.T, c *Config) {
	keys, err := m.issuer.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(filepath.Dir(c.SealKeyFile), "jwks.json")
	if err := os.WriteFile(file, keys, 0o600); err != nil {
		t.Fatal(err)
	}
	c.Istio = istioca.Config{
		Listen: "127.0.0.1:0", DNSNames: []string{"ca.assay.svc"}, IPAddresses: []string{"127.0.0.1"},
		Clusters: map[string]istioca.ClusterConfig{"prod": {Issuer: m.issuer.Name, OIDC: &istioca.OIDCConfig{JWKSFile: file}}},
	}
}

func p256Key(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (m *mesh) sign(claims map[string]any) string {
	return signToken(m.t, m.issuer.Key, istioclient.KeyID, claims)
}

func signToken(t testing.TB, key crypto.Signer, kid string, claims any) string {
	t.Helper()
	text, err := istioclient.Sign(key, kid, claims)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// proxy is a sidecar's istio-agent, with an EC key as tests have no time for RSA.
func (m *mesh) proxy(namespace, account string) *istioclient.Client {
	m.t.Helper()
	c := &istioclient.Client{
		Address: m.server.IstioAddr().String(), Roots: func() []byte { return m.rooms.authority.Bundle().PEM() },
		Token: func() (string, error) { return m.issuer.Token(namespace, account) }, ClusterID: "Kubernetes",
		Identity: "spiffe://example.org/ns/" + namespace + "/sa/" + account, NewKey: istioclient.P256,
	}
	m.t.Cleanup(c.Close)
	return c
}

// CA-01, CA-02, CA-03, CA-12, ZT-10: the default of every sidecar, and the rest of
// what proxies send; what they get verifies for both purposes of TLS, from a
// certificate to each element, the same roots in each answer.
func TestProxiesGetCertificates(t *testing.T) {
	m := startMesh(t)
	roots := map[string]bool{}
	for name, newKey := range map[string]func() (crypto.Signer, error){
		"RSA 2048": istioclient.RSA,
		"P-256":    istioclient.P256,
		"P-384":    func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P384(), rand.Reader) },
		"RSA 4096": func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 4096) },
	} {
		for _, ztunnel := range []bool{false, true} {
			c := m.proxy("foo", "sleep")
			c.NewKey, c.ZTunnel = newKey, ztunnel
			got, err := c.Fetch(t.Context())
			if err != nil {
				t.Fatalf("%s, ztunnel %v: %v", name, ztunnel, err)
			}
			roots[got.Chain[len(got.Chain)-1]] = true
			if c.Calls != 1 || len(got.Chain) != 3 {
				t.Errorf("%s: %d calls, %d elements", name, c.Calls, len(got.Chain))
			}
			if left := time.Until(got.Leaf.NotAfter); left > time.Hour || left < 55*time.Minute {
				t.Errorf("%s: lives for %v", name, left)
			}
			if s := got.Leaf.Subject; s.String() != "OU=prod" {
				t.Errorf("%s: the subject is %q", name, s)
			}
			for _, e := range got.Leaf.Extensions { // an extension of ours would be in the way of rustls
				if e.Critical && !slices.Contains([]string{"2.5.29.15", "2.5.29.19", "2.5.29.17"}, e.Id.String()) {
					t.Errorf("%s: extension %v is critical", name, e.Id)
				}
			}
		}
	}
	if len(roots) != 1 {
		t.Errorf("the last element has %d forms", len(roots))
	}
	line := m.audited("x509_svid.issue")
	for want, path := range map[string][]string{
		"proxy": {"actor", "kind"}, "spiffe://example.org/ns/foo/sa/sleep": {"actor", "spiffe_id"}, "prod": {"actor", "kubernetes", "cluster"},
		"foo": {"actor", "kubernetes", "namespace"}, "sleep": {"actor", "kubernetes", "service_account"}, "sleep-1": {"actor", "kubernetes", "pod"},
		"pod-uid": {"actor", "kubernetes", "pod_uid"}, "node-1": {"actor", "kubernetes", "node"}, "istio_token": {"why", "rule"}, "ok": {"result", "code"},
	} {
		if got := sub(line, path...); got != want {
			t.Errorf("audit line: %v is %v, want %s", path, got, want)
		}
	}
	if serial, from := sub(line, "cert", "serial"), line["from"]; serial == nil || !strings.HasPrefix(fmt.Sprint(from), "127.0.0.1:") {
		t.Errorf("audit line: serial %v, from %v", serial, from)
	}
}

// answerTo is the code, the text and the reason of a refusal, as a proxy and the
// log see them.
func (m *mesh) refusal(t *testing.T, c *istioclient.Client) (codes.Code, string, string) {
	t.Helper()
	_, err := c.Fetch(t.Context())
	if err == nil {
		t.Fatal("a certificate was issued")
	}
	line := m.audited("x509_svid.issue")
	reason, _ := sub(line, "result", "cause").(string)
	if reason == "" {
		reason, _ = sub(line, "result", "reason").(string)
	}
	return status.Code(err), status.Convert(err).Message(), reason
}

// CA-06, CA-07, CA-09, CA-14, NEG-29, NEG-30, NEG-31: who proves nothing hears
// Istio's words and no more, once; the audit log says why.
func TestCallersThatProveNothingHearNoMore(t *testing.T) {
	m := startMesh(t)
	with := func(key string, value any) func() string {
		return func() string {
			c := m.issuer.Claims("foo", "sleep")
			if value == nil {
				delete(c, key)
			} else {
				c[key] = value
			}
			return m.sign(c)
		}
	}
	text := func(s string) func() string { return func() string { return s } }
	part := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	good := m.sign(m.issuer.Claims("foo", "sleep"))
	payload := strings.Split(good, ".")[1]
	nested := part(strings.Repeat(`{"a":`, 1000) + "1" + strings.Repeat("}", 1000))
	for name, c := range map[string]struct {
		token  func() string
		reason string
	}{
		"no token":                {nil, "bearer_missing"},
		"empty":                   {text(""), "bearer_missing"},
		"blank":                   {text("  "), "bearer_missing"},
		"garbage":                 {text("garbage"), "token_malformed"},
		"dots":                    {text(strings.Repeat(".", 10000)), "token_malformed"},
		"JWE":                     {text("a.b.c.d.e"), "token_malformed"},
		"nested":                  {text(part(`{"alg":"ES256"}`) + "." + nested + ".c2ln"), "no_service_account"},
		"alg none":                {text(part(`{"alg":"none"}`) + "." + payload + ".c2ln"), "token_malformed"},
		"alg none, no signature":  {text(part(`{"alg":"none"}`) + "." + payload + "."), "token_malformed"},
		"HS256":                   {text(part(`{"alg":"HS256"}`) + "." + payload + ".c2ln"), "token_malformed"},
		"zip":                     {text(part(`{"alg":"ES256","zip":"DEF"}`) + "." + payload + ".c2ln"), "token_malformed"},
		"crit":                    {text(part(`{"alg":"ES256","crit":["x"]}`) + "." + payload + ".c2ln"), "token_malformed"},
		"another audience":        {with("aud", []string{"vault"}), "audience"},
		"the API server's":        {with("aud", []string{m.issuer.Name}), "audience"},
		"no audience":             {with("aud", nil), "audience"},
		"audience in part":        {with("aud", []string{"istio-ca2", "istio"}), "audience"},
		"expired by a second":     {with("exp", time.Now().Add(-time.Second).Unix()), "token_expired"},
		"without an end":          {with("exp", nil), "token_expired"},
		"of a time to come":       {with("nbf", time.Now().Add(time.Hour).Unix()), "token_early"},
		"another issuer":          {with("iss", "https://evil.example.org"), "cluster_unknown"},
		"issuer with a slash":     {with("iss", m.issuer.Name+"/"), "cluster_unknown"},
		"no ServiceAccount":       {with("sub", "alice"), "no_service_account"},
		"three parts":             {with("sub", "system:serviceaccount:foo"), "no_service_account"},
		"five parts":              {with("sub", "system:serviceaccount:foo:sleep:x"), "no_service_account"},
		"another namespace":       {with("kubernetes.io", map[string]any{"namespace": "bar"}), "no_service_account"},
		"half a pod":              {with("kubernetes.io", map[string]any{"pod": map[string]any{"name": "x"}}), "not_bound"},
		"not bound to a pod":      {with("kubernetes.io", nil), "not_bound"},
		"signature of another":    {func() string { return signToken(t, p256Key(t), "k1", m.issuer.Claims("foo", "sleep")) }, "token_invalid"},
		"key that is not known":   {func() string { return signToken(t, m.issuer.Key, "k2", m.issuer.Claims("foo", "sleep")) }, "token_invalid"},
		"another's claims, glued": {text(strings.Split(good, ".")[0] + "." + strings.Split(m.sign(m.issuer.Claims("foo", "admin")), ".")[1] + "." + strings.Split(good, ".")[2]), "token_invalid"},
	} {
		p := m.proxy("foo", "sleep")
		p.Token = nil
		if c.token != nil {
			p.Token = func() (string, error) { return c.token(), nil }
		}
		code, message, reason := m.refusal(t, p)
		if code != codes.Unauthenticated || !strings.Contains(message, "request authenticate failure") || strings.Contains(message, c.reason) || reason != c.reason || p.Calls != 1 {
			t.Errorf("%s: %v %q after %d calls, and the audit log says %s; want %s", name, code, message, p.Calls, reason, c.reason)
		}
		p.Close()
	}
	// ztunnel sends its file as it is.
	p := m.proxy("foo", "sleep")
	p.Token = func() (string, error) { return good + " ", nil }
	if _, err := p.Fetch(t.Context()); err != nil {
		t.Errorf("a blank behind the token: %v", err)
	}
}

// A name in the request or in a header gives nothing. // CA-06, NEG-29, NEG-34
func TestNoHeaderGivesAnIdentity(t *testing.T) {
	m := startMesh(t)
	conn := m.dialMesh(t, nil)
	good := "Bearer " + m.sign(m.issuer.Claims("foo", "sleep"))
	for name, headers := range map[string][]string{
		"Basic":              {"authorization", "Basic Zm9vOmJhcg=="},
		"lower-case bearer":  {"authorization", "bearer " + m.sign(m.issuer.Claims("foo", "sleep"))},
		"two tokens":         {"authorization", good, "authorization", good},
		"client certificate": {"x-forwarded-client-cert", `By=spiffe://example.org/x;URI=spiffe://example.org/ns/foo/sa/sleep`},
		"forwarded":          {"x-forwarded-for", "127.0.0.1", "x-forwarded-user", "system:serviceaccount:foo:sleep"},
		"two cluster IDs":    {"authorization", good, "clusterid", "Kubernetes", "clusterid", "Kubernetes"},
		"another cluster":    {"authorization", good, "clusterid", "other"},
	} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), headers...)
		_, err := istiov1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &istiov1.IstioCertificateRequest{})
		if status.Code(err) != codes.Unauthenticated || !strings.Contains(status.Convert(err).Message(), "request authenticate failure") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// CA-09: no cluster ID is as good as the right one, where there is but one.
	p := m.proxy("foo", "sleep")
	p.ClusterID = ""
	if _, err := p.Fetch(t.Context()); err != nil {
		t.Errorf("no cluster ID: %v", err)
	}
}

func (m *mesh) dialMesh(t *testing.T, change func(*tls.Config)) *grpc.ClientConn {
	t.Helper()
	settings := &tls.Config{RootCAs: m.rooms.authority.Bundle().Pool(), MinVersion: tls.VersionTLS12}
	if change != nil {
		change(settings)
	}
	conn, err := grpc.NewClient(m.server.IstioAddr().String(), grpc.WithTransportCredentials(credentials.NewTLS(settings)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// CA-04, CA-05, CA-10, CA-14: what a known caller asks for in vain is refused once
// and signed never; the next clean request gets none of it.
func TestRequestsOfKnownCallersThatAreRefused(t *testing.T) {
	m := startMesh(t, func(c *Config) {
		c.Kubernetes.Rules = append(c.Kubernetes.Rules, noIdentity("kube-system/*"))
	})
	signer := func(v *structpb.Value) *structpb.Struct {
		return &structpb.Struct{Fields: map[string]*structpb.Value{"CertSigner": v}}
	}
	cluster := func(id string) *structpb.Struct {
		return &structpb.Struct{Fields: map[string]*structpb.Value{"ClusterID": structpb.NewStringValue(id)}}
	}
	key := p256Key(t)
	request := func(template x509.CertificateRequest) string {
		der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	}
	clean := request(x509.CertificateRequest{})
	for name, c := range map[string]struct {
		csr    string
		meta   *structpb.Struct
		code   codes.Code
		reason string
	}{
		"signer":             {clean, signer(structpb.NewStringValue("clusterissuers/x")), codes.InvalidArgument, "cert_signer_unknown"},
		"signer, a number":   {clean, signer(structpb.NewNumberValue(1)), codes.InvalidArgument, "cert_signer_unknown"},
		"DNS name":           {request(x509.CertificateRequest{DNSNames: []string{"istiod.istio-system.svc"}}), nil, codes.InvalidArgument, "csr_spiffe_id_missing"},
		"IP address":         {request(x509.CertificateRequest{IPAddresses: []net.IP{{127, 0, 0, 1}}}), nil, codes.InvalidArgument, "csr_san_forbidden"},
		"garbage":            {"garbage", nil, codes.InvalidArgument, "csr_malformed"},
		"two":                {clean + clean, nil, codes.InvalidArgument, "csr_malformed"},
		"no CSR":             {"", nil, codes.InvalidArgument, "csr_malformed"},
		"another cluster":    {clean, cluster("other"), codes.Unauthenticated, "cluster_unknown"},
		"no node proxy":      {clean, &structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewStringValue("spiffe://example.org/ns/foo/sa/admin")}}, codes.Unauthenticated, "node_account_unknown"},
		"no node proxy, odd": {clean, &structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewNullValue()}}, codes.Unauthenticated, "node_account_unknown"},
	} {
		p := m.proxy("foo", "sleep")
		_, err := p.Send(t.Context(), c.csr, c.meta)
		line := m.audited("x509_svid.issue")
		reason := sub(line, "result", "cause")
		if reason == nil {
			reason = sub(line, "result", "reason")
		}
		if status.Code(err) != c.code || reason != c.reason || sub(line, "actor", "kubernetes", "pod") != "sleep-1" {
			t.Errorf("%s: %v, and the audit log says %v", name, err, line)
		}
	}
	p := m.proxy("foo", "sleep")
	p.Identity = "spiffe://example.org/ns/foo/sa/admin"
	if code, _, reason := m.refusal(t, p); code != codes.InvalidArgument || reason != "csr_identity_mismatch" || p.Calls != 1 {
		t.Errorf("another's name: %v %s after %d calls", code, reason, p.Calls)
	}
	if code, _, reason := m.refusal(t, m.proxy("kube-system", "x")); code != codes.PermissionDenied || reason != "identity_excluded" {
		t.Errorf("excluded by a rule: %v %s", code, reason)
	}
	conn := m.dialMesh(t, nil)
	large := &istiov1.IstioCertificateRequest{Csr: strings.Repeat("x", 1<<20)}
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+m.sign(m.issuer.Claims("foo", "sleep")))
	if _, err := istiov1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, large); err == nil {
		t.Error("a message of a megabyte was taken")
	}
	for _, meta := range []*structpb.Struct{nil, signer(structpb.NewStringValue("")), cluster("Kubernetes"), cluster("")} {
		resp, err := m.proxy("foo", "sleep").Send(t.Context(), clean, meta)
		if err != nil || len(resp.GetCertChain()) != 3 {
			t.Errorf("%v: %v", meta, err)
		}
	}
}

// CA-11, NEG-8: how long one asks for is a wish.
func TestLifeThatIsAskedForIsAWish(t *testing.T) {
	m := startMesh(t, func(c *Config) {
		c.CA.X509SVIDTTL = 30 * time.Minute
		c.Kubernetes.Rules = append(c.Kubernetes.Rules, shortLived("short/*", 10*time.Minute))
	})
	for _, c := range []struct {
		namespace string
		asked     int64
		want      time.Duration
	}{
		{"foo", -1, 30 * time.Minute},
		{"foo", -1 << 63, 30 * time.Minute},
		{"foo", 86400, time.Hour},
		{"foo", 1 << 62, time.Hour},
		{"foo", 1<<63 - 1, time.Hour},
		{"foo", 9223372037, time.Hour},
		{"foo", 60, time.Minute},
		{"foo", 1, time.Minute},
		{"foo", 600, 10 * time.Minute},
		{"short", 86400, 10 * time.Minute},
		{"short", -1, 10 * time.Minute},
		{"short", 120, 2 * time.Minute},
	} {
		p := m.proxy(c.namespace, "sleep")
		p.Validity = c.asked
		got, err := p.Fetch(t.Context())
		if err != nil {
			t.Fatalf("%d: %v", c.asked, err)
		}
		if left := time.Until(got.Leaf.NotAfter); left > c.want || left < c.want-10*time.Second {
			t.Errorf("%s, %d s asked: lives for %v, want %v", c.namespace, c.asked, left, c.want)
		}
	}
}

// CA-16, CA-17, NEG-34: how proxies may connect.
func TestConnectionsOfProxies(t *testing.T) {
	m := startMesh(t, func(c *Config) { c.Istio.DNSNames = append(c.Istio.DNSNames, "istiod.istio-system.svc") })
	call := func(conn *grpc.ClientConn) error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err := istiov1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &istiov1.IstioCertificateRequest{}, grpc.WaitForReady(false))
		return err
	}
	for name, c := range map[string]struct {
		change func(*tls.Config)
		ok     bool
	}{
		"by address":   {nil, true},
		"by name":      {func(c *tls.Config) { c.ServerName = "ca.assay.svc" }, true},
		"localhost":    {func(c *tls.Config) { c.ServerName = "istiod.istio-system.svc" }, true}, // what istio-agent asks for then
		"another name": {func(c *tls.Config) { c.ServerName = "other.svc" }, false},
		"TLS 1.2":      {func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, true},
		"TLS 1.2, CBC": {func(c *tls.Config) {
			c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}
		}, false},
		"TLS 1.3":        {func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 }, true},
		"post-quantum":   {func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768} }, true},
		"P-256 alone":    {func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} }, true},
		"TLS 1.1":        {func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, false},
		"another's root": {func(c *tls.Config) { c.RootCAs = x509.NewCertPool() }, false},
	} {
		err := call(m.dialMesh(t, c.change))
		if reached := status.Code(err) == codes.Unauthenticated; reached != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Without the right protocol, and without TLS, the connection is closed.
	raw, err := tls.Dial("tcp", m.server.IstioAddr().String(), &tls.Config{RootCAs: m.rooms.authority.Bundle().Pool()})
	if err == nil {
		_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
		if n, err := raw.Read(make([]byte, 1)); err == nil {
			t.Errorf("without ALPN %d bytes came", n)
		}
		_ = raw.Close()
	}
	plain, err := net.Dial("tcp", m.server.IstioAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = plain.Close() }()
	_ = plain.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := plain.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 64)
	if n, _ := plain.Read(answer); bytes.Contains(answer[:n], []byte("HTTP")) || n > 7 { // a TLS alert has 7 bytes
		t.Errorf("plain text was answered with %q", answer[:n])
	}
	if conn := m.dialMesh(t, nil); !m.isWholeServer(t, conn) {
		t.Error("the port has more than its one method")
	}
}

// isWholeServer says whether the port has nothing but its one method.
func (m *mesh) isWholeServer(t *testing.T, conn *grpc.ClientConn) bool {
	t.Helper()
	err := conn.Invoke(t.Context(), "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", &istiov1.IstioCertificateRequest{}, &istiov1.IstioCertificateResponse{})
	return status.Code(err) == codes.Unimplemented
}

// I11: what the port serves has a rule.
func TestTheMeshServesWhatItsTableSays(t *testing.T) {
	srv := grpc.NewServer()
	(&istioca.Service{}).Register(srv)
	if missing := rpc.Uncovered(srv, istioca.Methods()); len(missing) > 0 {
		t.Errorf("without a rule: %v", missing)
	}
	if got := slices.Collect(maps.Keys(istioca.Methods())); len(got) != 1 {
		t.Errorf("the table has %v", got)
	}
}

// CA-14: who asks without end is told so once.
func TestACallerThatAsksWithoutEndIsRefused(t *testing.T) {
	m := startMesh(t, func(c *Config) { c.Istio.RequestRate = 1 })
	busy, calm := m.proxy("foo", "busy"), m.proxy("foo", "calm")
	var err error
	for range 300 {
		before := busy.Calls
		if _, err = busy.Fetch(t.Context()); err != nil {
			if busy.Calls != before+1 {
				t.Errorf("it was asked again %d times", busy.Calls-before-1)
			}
			break
		}
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("after 300 requests: %v", err)
	}
	if _, err := calm.Fetch(t.Context()); err != nil {
		t.Errorf("another caller: %v", err)
	}
}

func noIdentity(accounts string) kube.Rule {
	return kube.Rule{ServiceAccounts: []string{accounts}, NoIdentity: true}
}

func shortLived(accounts string, ttl time.Duration) kube.Rule {
	return kube.Rule{ServiceAccounts: []string{accounts}, X509SVIDTTL: ttl}
}

// CA-21: a mesh that renews at once gets to each what is his, under a serial of
// its own.
func TestManyProxiesAtOnce(t *testing.T) {
	const proxies = 500
	m := startMesh(t)
	clients := make([]*istioclient.Client, proxies)
	for i := range clients {
		clients[i] = m.proxy("foo", fmt.Sprint("sleep-", i))
	}
	var mu sync.Mutex
	serials := map[string]string{}
	var all sync.WaitGroup
	for _, c := range clients {
		all.Go(func() {
			got, err := c.Fetch(t.Context()) // holds name and key to the request
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			serials[got.Leaf.SerialNumber.String()] = c.Identity
		})
	}
	all.Wait()
	if len(serials) != proxies {
		t.Errorf("%d serials for %d proxies", len(serials), proxies)
	}
}

// stalling answers after a while.
type stalling struct {
	istiov1.UnimplementedIstioCertificateServiceServer
}

func (stalling) CreateCertificate(context.Context, *istiov1.IstioCertificateRequest) (*istiov1.IstioCertificateResponse, error) {
	time.Sleep(150 * time.Second) // of a bubble
	return &istiov1.IstioCertificateResponse{}, nil
}

// CA-15: a proxy that pings while it waits is not told to go away. What we answer
// late is answered by our own deadline; here the handler is another's, so that
// there is time for pings.
func TestProxiesMayPingWhileTheyWait(t *testing.T) {
	for name, c := range map[string]struct {
		options []grpc.ServerOption
		ok      bool
	}{"as gRPC has it": {nil, false}, "as the mesh's port has it": {meshKeepalives(), true}} {
		synctest.Test(t, func(t *testing.T) {
			lis := bufconn.Listen(1 << 16)
			srv := grpc.NewServer(append(c.options, grpc.WaitForHandlers(true))...)
			istiov1.RegisterIstioCertificateServiceServer(srv, stalling{})
			done := make(chan error, 1)
			go func() { done <- srv.Serve(lis) }()
			conn, err := grpc.NewClient("passthrough:///mesh", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
				grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second})) // istio-agent's
			if err != nil {
				t.Fatal(err)
			}
			_, err = istiov1.NewIstioCertificateServiceClient(conn).CreateCertificate(t.Context(), &istiov1.IstioCertificateRequest{})
			if (err == nil) != c.ok {
				t.Errorf("%s: %v", name, err)
			}
			_ = conn.Close()
			srv.Stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

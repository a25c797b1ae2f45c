package endpoint

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/seed-caa81108/assay/agent/cache"
	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
)

// sdsStream is a stream of SDS as Envoy uses it.
type sdsStream struct {
	t       testing.TB
	stream  grpc.BidiStreamingClient[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]
	version string // of what was taken last
}

func (e *endpoint) sdsClient() secretv3.SecretDiscoveryServiceClient {
	e.t.Helper()
	return secretv3.NewSecretDiscoveryServiceClient(e.connTo(e.sds))
}

// secrets opens a stream and asks for names.
func (e *endpoint) secrets(names ...string) *sdsStream {
	e.t.Helper()
	s := e.silentStream()
	s.send(&discoveryv3.DiscoveryRequest{ResourceNames: names, TypeUrl: secretType, Node: &corev3.Node{Id: "sidecar~10.0.0.1~victim.prod~prod.svc.cluster.local"}})
	return s
}

func (e *endpoint) silentStream() *sdsStream {
	e.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	e.t.Cleanup(cancel)
	stream, err := e.sdsClient().StreamSecrets(ctx)
	if err != nil {
		e.t.Fatal(err)
	}
	return &sdsStream{t: e.t, stream: stream}
}

func (s *sdsStream) send(req *discoveryv3.DiscoveryRequest) {
	s.t.Helper()
	if err := s.stream.Send(req); err != nil {
		s.t.Fatal(err)
	}
}

func (s *sdsStream) recv() *discoveryv3.DiscoveryResponse {
	s.t.Helper()
	resp, err := s.stream.Recv()
	if err != nil {
		s.t.Fatal(err)
	}
	return resp
}

func (s *sdsStream) ack(resp *discoveryv3.DiscoveryResponse, names ...string) {
	s.t.Helper()
	s.version = resp.GetVersionInfo()
	s.send(&discoveryv3.DiscoveryRequest{VersionInfo: s.version, ResponseNonce: resp.GetNonce(), ResourceNames: names, TypeUrl: secretType})
}

func (s *sdsStream) nack(resp *discoveryv3.DiscoveryResponse, why string, names ...string) {
	s.t.Helper()
	s.send(&discoveryv3.DiscoveryRequest{
		VersionInfo: s.version, ResponseNonce: resp.GetNonce(), ResourceNames: names, TypeUrl: secretType,
		ErrorDetail: &rpcstatus.Status{Code: 3, Message: why},
	})
}

func (s *sdsStream) wantEnd(code codes.Code, reason string) {
	s.t.Helper()
	resp, err := s.stream.Recv()
	if resp != nil {
		s.t.Fatalf("got %d resources, want the end", len(resp.GetResources()))
	}
	wantStatus(s.t, err, code, reason)
}

func unpack(t testing.TB, resp *discoveryv3.DiscoveryResponse) []*tlsv3.Secret {
	t.Helper()
	if resp.GetTypeUrl() != secretType || resp.GetNonce() == "" || resp.GetVersionInfo() == "" {
		t.Fatalf("response of type %q, nonce %q, version %q", resp.GetTypeUrl(), resp.GetNonce(), resp.GetVersionInfo())
	}
	var list []*tlsv3.Secret
	for _, r := range resp.GetResources() {
		s := &tlsv3.Secret{}
		if err := r.UnmarshalTo(s); err != nil {
			t.Fatal(err)
		}
		list = append(list, s)
	}
	return list
}

func secretNames(t testing.TB, resp *discoveryv3.DiscoveryResponse) string {
	t.Helper()
	var list []string
	for _, s := range unpack(t, resp) {
		list = append(list, s.GetName())
	}
	return strings.Join(list, " ")
}

// keyPair is a certificate secret as a TLS library takes it: it fails if key and
// chain don't match.
func keyPair(t testing.TB, s *tlsv3.Secret) tls.Certificate {
	t.Helper()
	c := s.GetTlsCertificate()
	block, rest := pem.Decode(c.GetPrivateKey().GetInlineBytes())
	if block == nil || block.Type != "PRIVATE KEY" || len(rest) != 0 {
		t.Fatalf("%s: no PKCS#8 key in PEM", s.GetName())
	}
	pair, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatalf("%s: %v", s.GetName(), err)
	}
	return pair
}

// roots are what a bundle secret has for the trust domain, by the validator or
// as a plain list.
func roots(t testing.TB, s *tlsv3.Secret, plain bool) []*x509.Certificate {
	t.Helper()
	v := s.GetValidationContext()
	data := v.GetTrustedCa().GetInlineBytes()
	if plain != (data != nil) || plain == (v.GetCustomValidatorConfig() != nil) {
		t.Fatalf("%s: want plain %v, got %v", s.GetName(), plain, v)
	}
	if !plain {
		config := &tlsv3.SPIFFECertValidatorConfig{}
		if err := v.GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(config); err != nil {
			t.Fatal(err)
		}
		if name := v.GetCustomValidatorConfig().GetName(); name != "envoy.tls.cert_validator.spiffe" || len(config.GetTrustDomains()) != 1 || config.GetTrustDomains()[0].GetName() != "example.org" {
			t.Fatalf("validator %q with %v", name, config)
		}
		data = config.GetTrustDomains()[0].GetTrustBundle().GetInlineBytes()
	}
	var list []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, cert)
	}
	return list
}

func TestSecretsByTheNamesOfIstio(t *testing.T) { // SDS-01
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/first", ""), ca.svid("/second", ""))})
	cert, bundle := e.secrets("default"), e.secrets("ROOTCA")
	got, trust := cert.recv(), bundle.recv()
	if a, b := secretNames(t, got), secretNames(t, trust); a != "default" || b != "ROOTCA" {
		t.Fatalf("%q and %q", a, b)
	}
	cert.ack(got, "default")
	bundle.ack(trust, "ROOTCA")
	pair := keyPair(t, unpack(t, got)[0])
	if len(pair.Certificate) != 2 || pair.Leaf.URIs[0].String() != "spiffe://example.org/first" {
		t.Fatalf("%d certificates of %v", len(pair.Certificate), pair.Leaf.URIs)
	}
	pool, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range roots(t, unpack(t, trust)[0], false) {
		pool.AddCert(root)
	}
	intermediates.AppendCertsFromPEM(unpack(t, got)[0].GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Fatal(err)
	}
	until(t, "both acknowledged", func() bool { return e.value("assay_sds_updates_total", "ack") == 2 })
	if n := e.value("assay_workload_streams", "StreamSecrets"); n != 2 {
		t.Errorf("%v streams", n)
	}
	if !e.source.wasSent(e.source.snap) {
		t.Error("delivery was not reported")
	}
}

func TestRejectedSecretIsNotSentAgain(t *testing.T) { // SDS-02
	logs := &strings.Builder{}
	ca := newAuthority(t)
	a, b := ca.svid("/a", ""), ca.svid("/b", "")
	e := serve(t, &source{snap: ca.snapshot(a, b)}, func(c *Config, _ *timing) { c.Log = slog.New(slog.NewTextHandler(logs, nil)) })
	s := e.secrets("default")
	first := s.recv()
	for range 30 {
		s.nack(first, "no good\nlevel=ERROR "+strings.Repeat("x", 5000), "default")
	}
	until(t, "counted", func() bool { return e.value("assay_sds_updates_total", "nack") == 1 })
	// The same content in a new snapshot is the same content.
	same := ca.snapshot(a, b)
	same.BundleSequence = 2
	e.source.set(same, nil)
	until(t, "seen", func() bool { return e.source.wasSent(same) })
	renewed := ca.snapshot(ca.svid("/a", ""), b)
	e.source.set(renewed, nil)
	next := s.recv()
	if next.GetVersionInfo() == first.GetVersionInfo() || next.GetNonce() == first.GetNonce() {
		t.Fatal("version or nonce is the same for something else")
	}
	if pair := keyPair(t, unpack(t, next)[0]); !bytes.Equal(pair.Certificate[0], certificates(t, renewed.SVIDs[0])[0]) {
		t.Fatal("not the renewed one")
	}
	s.nack(next, "-----BEGIN PRIVATE KEY-----\nCANARY", "default")
	until(t, "counted", func() bool { return e.value("assay_sds_updates_total", "nack") == 2 })
	e.stop()
	if text := logs.String(); !strings.Contains(text, "no good") || strings.Contains(text, "CANARY") || strings.Contains(text, strings.Repeat("x", 300)) || strings.Contains(text, "\nlevel=ERROR") {
		t.Errorf("the log has %q", text)
	}
}

func certificates(t testing.TB, svid *cache.SVID) [][]byte {
	t.Helper()
	certs, err := x509.ParseCertificates(svid.CertificatesDER)
	if err != nil {
		t.Fatal(err)
	}
	var list [][]byte
	for _, c := range certs {
		list = append(list, c.Raw)
	}
	return list
}

func TestNACKsDoNotFloodTheLog(t *testing.T) { // SDS-02
	logs := &strings.Builder{}
	l := newNACKLog(slog.New(slog.NewTextHandler(logs, nil)))
	for range 1000 {
		l.tell(t.Context(), &dialogue{}, &discoveryv3.DiscoveryRequest{})
	}
	if n := strings.Count(logs.String(), "\n"); n > 20 || n == 0 {
		t.Errorf("%d lines", n)
	}
}

func TestOneStreamForSeveralNamesThatChange(t *testing.T) { // SDS-03
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""), ca.svid("/b", ""))})
	s := e.secrets("default", "ROOTCA")
	resp := s.recv()
	if got := secretNames(t, resp); got != "ROOTCA default" {
		t.Fatalf("got %q: the bundle comes first", got)
	}
	s.ack(resp, "default", "ROOTCA")
	s.ack(resp, "ROOTCA", "default", "ROOTCA") // the same names in other words
	for _, want := range []string{"ROOTCA default spiffe://example.org/b", "spiffe://example.org/a", "ROOTCA default"} {
		s.ack(resp, strings.Fields(want)...)
		if resp = s.recv(); secretNames(t, resp) != want {
			t.Fatalf("got %q, want %q", secretNames(t, resp), want)
		}
	}
	// Everything, without names.
	s.ack(resp)
	if resp = s.recv(); secretNames(t, resp) != "spiffe://example.org spiffe://example.org/a spiffe://example.org/b" {
		t.Fatalf("got %q", secretNames(t, resp))
	}
}

func TestBundlesAsTheClientCanTakeThem(t *testing.T) { // SDS-04
	ca := newAuthority(t)
	names := []string{"ALL", "ROOTCA", "spiffe://example.org"}
	node := func(v *structpb.Value) *corev3.Node {
		return &corev3.Node{Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{"disable_spiffe_cert_validation": v}}}
	}
	for _, tc := range []struct {
		validation string
		node       *corev3.Node
		plain      bool
	}{
		{"", nil, false},
		{"spiffe", node(structpb.NewBoolValue(true)), true},
		{"spiffe", node(structpb.NewStringValue("true")), true},
		{"spiffe", node(structpb.NewStringValue("1")), true},
		{"spiffe", node(structpb.NewBoolValue(false)), false},
		{"spiffe", node(structpb.NewStringValue("yes")), false},
		{"spiffe", node(structpb.NewNumberValue(1)), false},
		{"ca", nil, true},
		{"ca", node(structpb.NewBoolValue(false)), true},
	} {
		e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, func(c *Config, _ *timing) { c.SDS.Validation = tc.validation })
		s := e.silentStream()
		s.send(&discoveryv3.DiscoveryRequest{ResourceNames: names, Node: tc.node})
		resp := s.recv()
		if secretNames(t, resp) != strings.Join(names, " ") {
			t.Fatalf("got %q", secretNames(t, resp))
		}
		for _, secret := range unpack(t, resp) {
			if got := roots(t, secret, tc.plain); len(got) != 1 || !got[0].Equal(ca.root) {
				t.Fatalf("%+v: %s has %d roots", tc, secret.GetName(), len(got))
			}
		}
		// The node is in the first message only; that counts for the stream.
		s.send(&discoveryv3.DiscoveryRequest{ResourceNames: names[:1], ResponseNonce: resp.GetNonce()})
		roots(t, unpack(t, s.recv())[0], tc.plain)
		e.stop()
	}
}

func TestNewRootComesBeforeCertificatesUnderIt(t *testing.T) { // SDS-01, SDS-13
	old, next := newAuthority(t), newAuthority(t)
	e := serve(t, &source{snap: old.snapshot(old.svid("/a", ""))})
	s, lone := e.secrets("default", "ROOTCA"), e.secrets("default")
	s.ack(s.recv(), "default", "ROOTCA")
	lone.ack(lone.recv(), "default")
	both := old.snapshot(e.source.snap.SVIDs...)
	both.BundleDER, both.BundleSequence = slices.Concat(old.root.Raw, next.root.Raw), 2
	e.source.set(both, nil)
	if got := unpack(t, s.recv()); len(roots(t, got[0], false)) != 2 {
		t.Fatal("no second root")
	}
	until(t, "both streams count as served", func() bool { return e.source.wasSent(both) })
	activated := old.snapshot(next.svid("/a", ""))
	activated.BundleDER, activated.BundleSequence = both.BundleDER, 2
	e.source.set(activated, nil)
	got := unpack(t, s.recv())
	if len(roots(t, got[0], false)) != 2 || !bytes.Equal(keyPair(t, got[1]).Certificate[1], next.issuer.Raw) {
		t.Fatal("not the bundle, then the certificate under the new root")
	}
	// Nothing changed for who has no bundle on its stream until now.
	if resp := lone.recv(); !bytes.Equal(keyPair(t, unpack(t, resp)[0]).Certificate[1], next.issuer.Raw) {
		t.Fatal("not the next certificate")
	}
}

func TestUnknownNamesEndTheirStreamOnly(t *testing.T) { // SDS-05
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	good := e.secrets("default")
	resp := good.recv()
	for _, name := range []string{
		"file-root:system", "file-cert:/a~/b", "spiffe://example.org/other", "spiffe://other.org", "spiffe://example.org/", "rootca",
		"DEFAULT", "", "kubernetes://x", "default\x00", "spiffe://example.org/a ", "\xff",
	} {
		if name == "\xff" { // no string of protobuf
			continue
		}
		e.secrets(name).wantEnd(codes.InvalidArgument, "resource_unknown")
		e.secrets("default", name).wantEnd(codes.InvalidArgument, "resource_unknown")
	}
	many := make([]string, 101)
	for i := range many {
		many[i] = fmt.Sprint("n", i)
	}
	e.secrets(many...).wantEnd(codes.InvalidArgument, "resource_names_invalid")
	e.secrets(strings.Repeat("x", 2049)).wantEnd(codes.InvalidArgument, "resource_names_invalid")
	s := e.silentStream()
	s.send(&discoveryv3.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"})
	s.wantEnd(codes.InvalidArgument, "type_url_unknown")
	s = e.silentStream()
	if err := s.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	s.wantEnd(codes.InvalidArgument, "request_missing")
	// The others go on.
	good.ack(resp, "default")
	e.source.set(ca.snapshot(ca.svid("/a", "")), nil)
	good.recv()
	// The text says no more than the name, and not all of a long one.
	_, err := e.sdsClient().FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{strings.Repeat("y", 2000)}})
	wantStatus(t, err, codes.InvalidArgument, "resource_unknown")
	if strings.Contains(err.Error(), strings.Repeat("y", 200)) {
		t.Error("the whole name comes back")
	}
}

func TestFetchSecretsAndDelta(t *testing.T) { // SDS-06
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	c := e.sdsClient()
	resp, err := c.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ALL"}, TypeUrl: secretType})
	if err != nil || secretNames(t, resp) != "ALL default" {
		t.Fatalf("%v, %v", resp, err)
	}
	delta, err := c.DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = delta.Recv()
	wantStatus(t, err, codes.Unimplemented, "unimplemented")
	wantStatus(t, call(withHeader(t), e.connTo(e.sds), "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"), codes.Unimplemented, "method_unknown")
	wantStatus(t, call(withHeader(t), e.connTo(e.sds), fetchSVID), codes.Unimplemented, "method_unknown")
	wantStatus(t, call(withHeader(t), e.conn(), secretv3.SecretDiscoveryService_StreamSecrets_FullMethodName), codes.Unimplemented, "method_unknown")
	until(t, "nothing is left of the call", func() bool { return e.source.open() == 0 && e.server.gate.count(streams) == 0 })
}

func TestRequestsThatAreNoAnswerAreIgnored(t *testing.T) { // SDS-07
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, withTiming(func(w *timing) { w.pace = 50 * time.Microsecond }))
	s := e.silentStream()
	s.send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}, ResponseNonce: "of a stream before", VersionInfo: "7"})
	first := s.recv()
	var before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range 10_000 {
		req := &discoveryv3.DiscoveryRequest{ResponseNonce: []string{"", "wrong", first.GetVersionInfo()}[i%3], ResourceNames: []string{"ROOTCA", "file-root:system"}, TypeUrl: "nonsense"}
		if i%3 == 0 {
			req.ErrorDetail = &rpcstatus.Status{Message: strings.Repeat("x", 1000)}
		}
		s.send(req)
		if i%1000 == 0 { // meanwhile others are served
			if got := secretNames(t, e.secrets("ROOTCA").recv()); got != "ROOTCA" {
				t.Fatal(got)
			}
		}
	}
	s.ack(first, "default", "ROOTCA") // the one that counts
	if got := secretNames(t, s.recv()); got != "ROOTCA default" {
		t.Fatal(got)
	}
	var after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&after)
	if after.HeapAlloc > before.HeapAlloc+8<<20 {
		t.Errorf("%d KB kept of 10 000 requests", (after.HeapAlloc-before.HeapAlloc)>>10)
	}
	if n := e.value("assay_sds_updates_total", "nack"); n != 0 {
		t.Errorf("%v of them counted as rejections", n)
	}
}

// A client that writes without end is read no faster than others can bear.
func TestManyRequestsAreSlowedDown(t *testing.T) { // SDS-07
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, withTiming(func(w *timing) { w.pace = 20 * time.Millisecond }))
	s := e.secrets("default")
	resp, begin := s.recv(), time.Now()
	for range burst + 20 {
		s.send(&discoveryv3.DiscoveryRequest{ResponseNonce: "wrong"})
	}
	s.ack(resp, "ROOTCA")
	s.recv()
	if took := time.Since(begin); took < 200*time.Millisecond {
		t.Errorf("taken after %v", took)
	}
}

func TestSecretsForCallersWithoutIdentity(t *testing.T) { // SDS-08
	for _, tc := range []struct {
		why  error
		code codes.Code
	}{{errNoIdentity, codes.PermissionDenied}, {errNotSynced, codes.Unavailable}, {errPending, codes.Unavailable}, {errEnded, codes.Unavailable}} {
		e := serve(t, &source{err: tc.why}, withTiming(func(w *timing) { w.hold = 20 * time.Millisecond }))
		probe(t, e.sds)
		e.secrets("default").wantEnd(tc.code, fault.ReasonOf(tc.why))
		_, err := e.sdsClient().FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{})
		wantStatus(t, err, tc.code, fault.ReasonOf(tc.why))
		if n := e.value("assay_workload_denials_total", fault.ReasonOf(tc.why)); n != 2 {
			t.Errorf("%v denials", n)
		}
	}
	// Held until there is one; what it asks for may change meanwhile.
	ca := newAuthority(t)
	e := serve(t, &source{err: errNoIdentity}, withTiming(func(w *timing) { w.hold = time.Minute }))
	s := e.secrets("default")
	until(t, "held", func() bool { return e.value("assay_workload_held") == 1 })
	s.send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}})
	e.source.set(ca.snapshot(ca.svid("/a", "")), nil)
	resp := s.recv()
	for secretNames(t, resp) != "ROOTCA" { // it crossed with the request: the answer to it says so again
		s.ack(resp, "ROOTCA")
		resp = s.recv()
	}
	e.source.set(nil, errNoIdentity)
	s.wantEnd(codes.PermissionDenied, "no_identity")
}

// probe is what istio-agent does at its start to see whether somebody serves:
// HTTP/2 settings are exchanged, and nothing is called.
func probe(t *testing.T, path string) {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 0, 0, 0, 4, 0, 0, 0, 0, 0)); err != nil {
		t.Fatal(err)
	}
	frame := make([]byte, 9)
	if _, err := io.ReadFull(c, frame); err != nil || frame[3] != 4 {
		t.Fatalf("no settings came: %v, %v", frame, err)
	}
}

// The node id of a request is its client's own word.
func TestNodeIDIsNoIdentity(t *testing.T) { // SDS-14
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	e.secrets("default").recv() // it says that it is victim.prod
	mine := selector.NewSet(selector.Selector{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())})
	e.source.mu.Lock()
	defer e.source.mu.Unlock()
	if !e.source.selectors.Contains(mine) || strings.Contains(e.source.selectors.Key(), "victim") {
		t.Errorf("subscribed to %v", e.source.selectors)
	}
}

func TestWithdrawnSecretEndsItsStream(t *testing.T) { // WL-26, SDS-05
	ca := newAuthority(t)
	a, b := ca.svid("/a", ""), ca.svid("/b", "")
	e := serve(t, &source{snap: ca.snapshot(a, b)})
	s, rest := e.secrets("spiffe://example.org/b"), e.secrets("default")
	s.recv()
	rest.recv()
	e.source.set(ca.snapshot(a), nil)
	s.wantEnd(codes.PermissionDenied, "no_identity")
	e.source.set(ca.snapshot(ca.svid("/a", "")), nil)
	rest.recv()
}

func TestSecretsEndWithTheAgent(t *testing.T) { // SDS-11, WL-24
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	s, early := e.secrets("default"), e.silentStream()
	s.recv()
	until(t, "both open", func() bool { return e.server.gate.count(secretStreams) == 2 })
	e.stop()
	s.wantEnd(codes.Unavailable, "shutting_down")
	early.wantEnd(codes.Unavailable, "shutting_down")
}

func TestKeyAndChainMatchInEachSecret(t *testing.T) { // SDS-13
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))})
	last := ca.svid("/a", "")
	var rotating sync.WaitGroup
	defer rotating.Wait()
	rotating.Go(func() {
		for range 100 {
			e.source.set(ca.snapshot(ca.svid("/a", ""), ca.svid("/b", "")), nil)
		}
		e.source.set(ca.snapshot(last), nil)
	})
	ids := map[string]string{"default": "spiffe://example.org/a", "spiffe://example.org/a": "spiffe://example.org/a", "spiffe://example.org/b": "spiffe://example.org/b"}
	s := e.secrets("default", "spiffe://example.org/a", "ROOTCA")
	versions := map[string]bool{}
	for over := false; !over; {
		resp := s.recv()
		if versions[resp.GetVersionInfo()] {
			t.Fatal("one version twice in a row of changes")
		}
		versions[resp.GetVersionInfo()] = true
		var leaves []string
		for _, secret := range unpack(t, resp)[1:] {
			leaf := keyPair(t, secret).Leaf
			if leaf.URIs[0].String() != ids[secret.GetName()] {
				t.Fatalf("%s is of %v", secret.GetName(), leaf.URIs)
			}
			leaves = append(leaves, leaf.SerialNumber.String())
		}
		if len(slices.Compact(leaves)) != 1 {
			t.Fatal("one message of two states")
		}
		s.ack(resp, "default", "spiffe://example.org/a", "ROOTCA")
		over = bytes.Equal(keyPair(t, unpack(t, resp)[1]).Certificate[0], certificates(t, last)[0])
	}
}

func TestVersionIsOfTheContents(t *testing.T) { // SDS-11
	ca := newAuthority(t)
	svid := ca.svid("/a", "")
	version := func(names ...string) string {
		e := serve(t, &source{snap: ca.snapshot(svid)})
		defer e.stop()
		return e.secrets(names...).recv().GetVersionInfo()
	}
	if a, b := version("default", "ROOTCA"), version("ROOTCA", "default"); a != b {
		t.Error("another version after a restart")
	}
	if version("default") == version("ROOTCA") || version("ALL") == version("ROOTCA") {
		t.Error("one version for different contents")
	}
}

func TestSecretStreamsAreAQuarter(t *testing.T) { // NEG-43
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, withLimits(Limits{Streams: 8, StreamsPerUID: 8}))
	e.secrets("default").recv()
	s := e.secrets("default")
	s.recv()
	e.secrets("default").wantEnd(codes.Unavailable, "load_shed")
	recv(t, fetch(t, e.client(), withHeader(t)))
	if err := s.stream.CloseSend(); err != nil { // it goes on listening
		t.Fatal(err)
	}
	e.source.set(ca.snapshot(ca.svid("/a", "")), nil)
	s.recv()
}

func TestStalledSecretStreamEnds(t *testing.T) { // NEG-43
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, withTiming(func(w *timing) { w.send = 50 * time.Millisecond }))
	s := e.secrets()
	s.recv()
	for n := 0; e.value("assay_workload_denials_total", "stream_stalled") == 0; n++ {
		var many []*cache.SVID
		for i := range 20 {
			many = append(many, ca.svid(fmt.Sprintf("/x%d/%d", n, i), ""))
		}
		e.source.set(ca.snapshot(many...), nil)
		if n > 200 {
			t.Fatal("never stalled")
		}
	}
}

func TestSDSConfig(t *testing.T) { // I6
	for _, c := range []SDSConfig{
		{Validation: "none"},
		{DefaultSVIDName: "ROOTCA"},
		{DefaultBundleName: "ALL"},
		{DefaultAllBundlesName: "default"},
		{DefaultSVIDName: "x", DefaultAllBundlesName: "x"},
		{DefaultBundleName: "spiffe://example.org"},
		{DefaultSVIDName: "a b"},
		{DefaultSVIDName: "a\n"},
		{DefaultSVIDName: strings.Repeat("x", 2049)},
	} {
		if err := c.Check(); fault.ReasonOf(err) != "config_sds" {
			t.Errorf("%+v: %v", c, err)
		}
		if _, err := New(Config{SDS: c}); fault.ReasonOf(err) != "config_sds" {
			t.Errorf("%+v: %v", c, err)
		}
	}
	// As Istio's sample of a federation has it.
	swapped := SDSConfig{DefaultBundleName: "null", DefaultAllBundlesName: "ROOTCA"}
	if err := swapped.Check(); err != nil {
		t.Fatal(err)
	}
	ca := newAuthority(t)
	e := serve(t, &source{snap: ca.snapshot(ca.svid("/a", ""))}, func(c *Config, _ *timing) { c.SDS = swapped })
	if got := secretNames(t, e.secrets("ROOTCA", "null").recv()); got != "ROOTCA null" {
		t.Error(got)
	}
	e.secrets("ALL").wantEnd(codes.InvalidArgument, "resource_unknown")
}

func TestBrokenStateIsNotTold(t *testing.T) { // WL-31
	ca := newAuthority(t)
	snap := ca.snapshot(ca.svid("/a", ""))
	snap.SVIDs[0].Key = cache.PrivateKey{}
	e := serve(t, &source{snap: snap})
	e.secrets("ROOTCA").wantEnd(codes.Unavailable, "response_invalid")
	var long []*cache.SVID
	one := ca.svid("/a", "")
	for i := range 2200 {
		copied := *one
		copied.EntryID = fmt.Sprint(i)
		long = append(long, &copied)
	}
	e.source.set(ca.snapshot(long...), nil)
	// Many entries of one ID are one secret; the oldest is served.
	if got := secretNames(t, e.secrets().recv()); got != "spiffe://example.org spiffe://example.org/a" {
		t.Error(got)
	}
}

func TestResponsesAreWhatTheSnapshotHas(t *testing.T) {
	ca := newAuthority(t)
	snap := ca.snapshot(ca.svid("/a", ""))
	c := SDSConfig{}.WithDefaults()
	first, _, err := c.compose(snap, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := c.compose(snap, nil, false)
	if err != nil || !proto.Equal(first, again) || first.GetResources()[0] != again.GetResources()[0] {
		t.Error("made twice")
	}
}

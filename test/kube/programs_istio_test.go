//go:build kube && istio

package kube

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/test/harness"
)

// Istio's own programs, built by tools.sh: pilot-agent is what istio-agent is
// called, pilot-discovery is istiod. Envoy is not among them: what it would do, the
// tests do.

// place is a directory that stands for a pod's root, as Istio's images have it.
type place struct {
	t   *testing.T
	dir string
}

func newPlace(t *testing.T) place {
	t.Helper()
	dir, err := os.MkdirTemp("", "istio") // short: sockets are below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return place{t, dir}
}

func (p place) path(name string) string { return filepath.Join(p.dir, name) }

// put writes a file as a kubelet does: it is there whole, or not, and stays if
// nothing has changed.
func (p place) put(name, content string) {
	p.t.Helper()
	if held, err := os.ReadFile(p.path(name)); err == nil && string(held) == content {
		return
	}
	if err := errors.Join(
		os.MkdirAll(filepath.Dir(p.path(name)), 0o755),
		os.WriteFile(p.path(name+".new"), []byte(content), 0o600),
		os.Rename(p.path(name+".new"), p.path(name)),
	); err != nil {
		p.t.Fatal(err)
	}
}

// start starts a program of Istio's with p as its root.
func (p place) start(program string, env []string, args ...string) *harness.Process {
	p.t.Helper()
	program, err := filepath.Abs("../../out/kube/" + program)
	if err == nil {
		_, err = os.Stat(program)
	}
	if err != nil {
		p.t.Fatalf("%v: run make test-istio, which builds it", err)
	}
	p.t.Cleanup(func() {
		if p.t.Failed() {
			p.t.Logf("--- %s\n%s", filepath.Base(program), readFile(p.t, p.path("log")))
		}
	})
	return harness.Start(p.t, p.path("log"), env, "env", append([]string{"-C", p.dir, program}, args...)...)
}

// Where a proxy's sockets are.
const (
	workloadSockets = "var/run/secrets/workload-spiffe-uds"
	xdsSocket       = "etc/istio/proxy/XDS"
)

// istioAgent is Istio's agent in a pod.
type istioAgent struct {
	place
	*harness.Process
	// node is what Envoy would call itself.
	node string
}

// istioAgent starts Istio's agent for a pod, with what a kubelet would mount into
// it. xds is where istiod is.
func (m *mesh) istioAgent(pod *corev1.Pod, xds int, prepare func(place), env ...string) *istioAgent {
	m.t.Helper()
	p := newPlace(m.t)
	account := pod.Spec.ServiceAccountName
	p.put("var/run/secrets/tokens/istio-token", m.Token(account, "istio-ca", pod))
	p.put("var/run/secrets/istio/root-cert.pem", m.roots())
	prepare(p)
	for _, dir := range []string{"etc/istio/proxy", "var/run/secrets/credential-uds", workloadSockets} {
		if err := os.MkdirAll(p.path(dir), 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	var ports harness.Ports
	// In Envoy's place is a program that does nothing, and ends with the agent.
	p.put("envoy", "#!/bin/sh\nwhile kill -0 $PPID; do sleep 1; done\n")
	if err := os.Chmod(p.path("envoy"), 0o700); err != nil {
		m.t.Fatal(err)
	}
	p.put("envoy.json", "{}")
	config := fmt.Sprintf(`{"discoveryAddress": "127.0.0.1:%d", "statusPort": %d, "proxyAdminPort": %d, "binaryPath": "./envoy", "customConfigFile": "./envoy.json"}`,
		xds, ports.Free(m.t), ports.Free(m.t))
	return &istioAgent{
		place: p, node: fmt.Sprintf("sidecar~127.0.0.1~%s.%s~%s.svc.cluster.local", pod.Name, m.Namespace, m.Namespace),
		Process: p.start("pilot-agent", append([]string{
			"PROXY_CONFIG=" + config, "PILOT_CERT_PROVIDER=istiod", "TRUST_DOMAIN=example.org",
			fmt.Sprintf("CA_ADDR=127.0.0.1:%d", m.port), "ISTIO_META_CLUSTER_ID=Kubernetes", "INSTANCE_IP=127.0.0.1",
			"POD_NAME=" + pod.Name, "POD_NAMESPACE=" + m.Namespace, "SERVICE_ACCOUNT=" + account,
		}, env...), "proxy", "sidecar"),
	}
}

// roots is what the server keeps in the namespace for proxies.
func (m *mesh) roots() string {
	m.t.Helper()
	var roots string
	m.site.Server.Eventually(time.Minute, "the mesh's roots", func() error {
		held, err := m.Core.ConfigMaps(m.Namespace).Get(m.t.Context(), rootMapName, metav1.GetOptions{})
		if err == nil {
			roots = held.Data["root-cert.pem"]
		}
		return err
	})
	return roots
}

func dial(t *testing.T, target string, creds credentials.TransportCredentials, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, append(options, grpc.WithTransportCredentials(creds))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// envoy asks for one secret over a socket as Envoy does, and calls do with each that
// comes until that is content.
func (a *istioAgent) envoy(ctx context.Context, socket, name string, content func(*tlsv3.Secret) (bool, error)) error {
	conn := dial(a.t, "unix://"+a.path(workloadSockets+"/"+socket), insecure.NewCredentials())
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	req := &discoveryv3.DiscoveryRequest{
		TypeUrl:       "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
		ResourceNames: []string{name}, Node: &corev3.Node{Id: a.node},
	}
	for {
		if err := stream.Send(req); err != nil {
			return err
		}
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		secret := &tlsv3.Secret{}
		if n := len(resp.GetResources()); n != 1 {
			return fmt.Errorf("%d resources", n)
		}
		if err := resp.GetResources()[0].UnmarshalTo(secret); err != nil {
			return err
		}
		if done, err := content(secret); done || err != nil {
			return err
		}
		req = &discoveryv3.DiscoveryRequest{TypeUrl: req.GetTypeUrl(), ResourceNames: req.GetResourceNames(), VersionInfo: resp.GetVersionInfo(), ResponseNonce: resp.GetNonce()}
	}
}

// parseSVID is x509svid.Parse for keys of any form: istio-agent's are RSA's own.
func parseSVID(chain, key []byte) (*x509svid.SVID, error) {
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, err
	}
	svid := &x509svid.SVID{PrivateKey: pair.PrivateKey.(crypto.Signer)}
	if svid.Certificates, err = x509.ParseCertificates(bytes.Join(pair.Certificate, nil)); err == nil {
		svid.ID, err = x509svid.IDFromCert(svid.Certificates[0])
	}
	return svid, err
}

// svid is what the proxy presents to its peers: the first that is as want says.
func (a *istioAgent) svid(socket string, want func(*x509svid.SVID) bool) *x509svid.SVID {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), 3*time.Minute)
	defer cancel()
	var svid *x509svid.SVID
	if err := a.envoy(ctx, socket, "default", func(s *tlsv3.Secret) (_ bool, err error) {
		cert := s.GetTlsCertificate()
		svid, err = parseSVID(cert.GetCertificateChain().GetInlineBytes(), cert.GetPrivateKey().GetInlineBytes())
		return err == nil && want(svid), err
	}); err != nil {
		a.t.Fatalf("default: %v", err)
	}
	return svid
}

// trusted is what it knows its peers by: the first that is of n roots.
func (a *istioAgent) trusted(socket string, n int) *x509bundle.Bundle {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), 3*time.Minute)
	defer cancel()
	bundle := x509bundle.New(spiffeid.RequireTrustDomainFromString("example.org"))
	if err := a.envoy(ctx, socket, "ROOTCA", func(s *tlsv3.Secret) (_ bool, err error) {
		bundle, err = x509bundle.Parse(bundle.TrustDomain(), s.GetValidationContext().GetTrustedCa().GetInlineBytes())
		return err == nil && len(bundle.X509Authorities()) == n, err
	}); err != nil {
		a.t.Fatalf("ROOTCA: %v", err)
	}
	return bundle
}

func anySVID(*x509svid.SVID) bool { return true }

// keptMesh is newMesh with what an istiod that is no CA needs, and short lives.
func keptMesh(t *testing.T) *mesh {
	t.Helper()
	s := cluster.NewSpace(t)
	var ports harness.Ports
	m := &mesh{Space: s, t: t, port: ports.Free(t)}
	s.makeSecret(t, corev1.SecretTypeOpaque, nil)
	rules := slices.Concat(serverRules, rootMapRules, istiodRules)
	m.site = s.siteWith(t, rules, fmt.Sprintf(`istio:
  listen: 127.0.0.1:%d
  ip_addresses: [127.0.0.1]
  clusters:
    test: {root_config_maps: true, istiod_secret: %s/istiod-tls}
ca: {x509_svid_ttl: 1m, max_x509_svid_ttl: 1m}
attestation: {agent_svid_ttl: 1m}
`, m.port, s.Namespace))
	return m
}

// nobody is the address of an istiod that is not there.
const nobody = 1

// CA-01, CA-03, CA-12, CA-18, CA-19: Istio's own agent gets its certificates from the
// server, renews them, and learns of a new root with its next certificate.
func TestIstiosAgentTakesCertificatesFromTheServer(t *testing.T) {
	m := keptMesh(t)
	m.Account("sleep")
	pod := m.Run(Pod{Name: "sleep-1", Node: m.Node("a").Name, Account: "sleep"})
	a := m.istioAgent(pod, nobody, func(place) {})
	first := a.svid("socket", anySVID)
	if first.ID.String() != m.id("sleep") {
		t.Errorf("it is %s", first.ID)
	}
	bundle := a.trusted("socket", 1)
	if _, _, err := x509svid.Verify(first.Certificates, bundle); err != nil {
		t.Error(err)
	}
	renewed := a.svid("socket", func(s *x509svid.SVID) bool { return !s.Certificates[0].Equal(first.Certificates[0]) })
	if bytes.Equal(first.Certificates[0].RawSubjectPublicKeyInfo, renewed.Certificates[0].RawSubjectPublicKeyInfo) {
		t.Error("a renewal has the same key")
	}
	m.site.CLI("root", "prepare", "--reason", "friday")
	// Istio's agent renews for as long as Envoy follows.
	ctx, cancel := context.WithCancel(t.Context())
	var envoy sync.WaitGroup
	envoy.Go(func() {
		if err := a.envoy(ctx, "socket", "default", func(*tlsv3.Secret) (bool, error) { return false, nil }); ctx.Err() == nil {
			t.Errorf("the stream of default ended: %v", err)
		}
	})
	two := a.trusted("socket", 2)
	cancel()
	envoy.Wait()
	for _, svid := range []*x509svid.SVID{renewed, a.svid("socket", anySVID)} {
		if _, _, err := x509svid.Verify(svid.Certificates, two); err != nil {
			t.Error(err)
		}
	}
	if !strings.Contains(readFile(t, m.site.Audit()), `"istio_token"`) {
		t.Error("the audit log does not have the rule istio_token")
	}
}

// SDS-01, SDS-09: Istio's own agent finds the socket of Assay's, leaves certificates
// to it, and asks no CA.
func TestIstiosAgentLeavesCertificatesToAssays(t *testing.T) {
	m := keptMesh(t)
	m.Account("sleep")
	pod := m.Run(Pod{Name: "sleep-1", Node: m.Node("a").Name, Account: "sleep"})
	node := m.site.NewAgent("node")
	node.Start(node.Join())
	m.site.CreateEntry(node.ID, "spiffe://example.org/proxy")
	m.site.CLI("wait", "--all-agents")
	a := m.istioAgent(pod, nobody, func(p place) {
		if err := os.Symlink(filepath.Dir(node.SDSSocket()), p.path(workloadSockets)); err != nil {
			t.Fatal(err)
		}
	}, "WORKLOAD_IDENTITY_SOCKET_FILE="+filepath.Base(node.SDSSocket()))
	a.Eventually(time.Minute, "it has found the socket", func() error {
		if !strings.Contains(readFile(t, a.path("log")), "Default Istio SDS Server will only serve files") {
			return errors.New("it does not say so")
		}
		return nil
	})
	if svid := a.svid("sds.sock", anySVID); svid.ID.String() != "spiffe://example.org/proxy" {
		t.Errorf("the socket has %s", svid.ID)
	}
	if strings.Contains(readFile(t, m.site.Audit()), `"istio_token"`) {
		t.Error("it asked the server")
	}
}

// SDS-10: without Assay's agent a proxy that is to have its socket ends, and asks no
// other CA.
func TestIstiosAgentEndsWithoutAssays(t *testing.T) {
	m := keptMesh(t)
	m.Account("sleep")
	pod := m.Run(Pod{Name: "sleep-1", Node: m.Node("a").Name, Account: "sleep"})
	a := m.istioAgent(pod, nobody, func(place) {}, "WORKLOAD_IDENTITY_SOCKET_FILE=sds.sock")
	if code := a.ExitCode(); code == 0 {
		t.Error("it has ended well")
	}
	if log := readFile(t, a.path("log")); !strings.Contains(log, "no socket found") {
		t.Errorf("it says:\n%s", log)
	}
	if strings.Contains(readFile(t, m.site.Audit()), `"istio_token"`) {
		t.Error("it asked the server")
	}
}

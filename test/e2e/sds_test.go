//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

const (
	secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	proxyTTL   = `ca:
  x509_svid_ttl: 20s
  max_x509_svid_ttl: 20s
attestation:
  agent_svid_ttl: 1m
`
)

// proxy is a client of SDS that does as Envoy does: a stream for each name, an
// answer to each response, and a new stream when one ends.
type proxy struct {
	t       *testing.T
	client  secretv3.SecretDiscoveryServiceClient
	ctx     context.Context
	changed chan struct{} // something was taken since it was read from

	mu      sync.Mutex
	svid    *x509svid.SVID
	bundle  *x509bundle.Bundle
	streams map[string]int // opened, by name
	// killed: the agent may not have kept its last SVID, so that a stream may
	// begin with the one before.
	killed bool
}

func startProxy(t *testing.T, socket string) *proxy {
	t.Helper()
	p := &proxy{t: t, client: secretv3.NewSecretDiscoveryServiceClient(dialSDS(t, socket)), changed: make(chan struct{}, 1), streams: map[string]int{}}
	ctx, cancel := context.WithCancel(context.Background())
	p.ctx = ctx
	var following sync.WaitGroup
	for _, name := range []string{"default", "ROOTCA"} {
		following.Go(func() { p.follow(name) })
	}
	t.Cleanup(func() {
		cancel()
		following.Wait()
	})
	p.until("both secrets", func() bool { return p.svid != nil && p.bundle != nil })
	return p
}

func dialSDS(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// follow keeps a stream for a name open until the proxy ends.
func (p *proxy) follow(name string) {
	version := ""
	for p.ctx.Err() == nil {
		err := p.stream(name, &version)
		if code := status.Code(err); p.ctx.Err() == nil && code != codes.Unavailable {
			p.t.Errorf("the stream of %s ended with %v", name, err)
			return
		}
		select {
		case <-p.ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (p *proxy) stream(name string, version *string) error {
	stream, err := p.client.StreamSecrets(p.ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.streams[name]++
	p.mu.Unlock()
	req := &discoveryv3.DiscoveryRequest{
		VersionInfo: *version, TypeUrl: secretType, ResourceNames: []string{name},
		Node: &corev3.Node{Id: "sidecar~10.0.0.1~web.prod~prod.svc.cluster.local"},
	}
	for first := true; ; first = false {
		if err := stream.Send(req); err != nil {
			_, err = stream.Recv() // has the reason
			return err
		}
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := p.take(name, resp, first); err != nil {
			p.t.Errorf("take %s: %v", name, err)
		}
		*version = resp.GetVersionInfo()
		req = &discoveryv3.DiscoveryRequest{VersionInfo: *version, TypeUrl: secretType, ResourceNames: []string{name}, ResponseNonce: resp.GetNonce()}
	}
}

// take puts a secret into use: the same as before or a newer one.
func (p *proxy) take(name string, resp *discoveryv3.DiscoveryResponse, first bool) error {
	secret := &tlsv3.Secret{}
	if n := len(resp.GetResources()); n != 1 {
		return fmt.Errorf("%d resources", n)
	}
	if err := resp.GetResources()[0].UnmarshalTo(secret); err != nil {
		return err
	}
	if secret.GetName() != name {
		return fmt.Errorf("it is called %s", secret.GetName())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if cert := secret.GetTlsCertificate(); cert != nil { // it is refused if key and chain don't match
		svid, err := x509svid.Parse(cert.GetCertificateChain().GetInlineBytes(), cert.GetPrivateKey().GetInlineBytes())
		if err != nil {
			return err
		}
		if p.svid != nil && !(first && p.killed) && svid.Certificates[0].NotAfter.Before(p.svid.Certificates[0].NotAfter) {
			return errors.New("it ends before the one that there was")
		}
		p.svid = svid
	} else {
		config := &tlsv3.SPIFFECertValidatorConfig{}
		if err := secret.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(config); err != nil {
			return err
		}
		domain := config.GetTrustDomains()[0]
		bundle, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString(domain.GetName()), domain.GetTrustBundle().GetInlineBytes())
		if err != nil {
			return err
		}
		p.bundle = bundle
	}
	select {
	case p.changed <- struct{}{}:
	default:
	}
	return nil
}

// GetX509SVID implements x509svid.Source.
func (p *proxy) GetX509SVID() (*x509svid.SVID, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.svid, nil
}

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (p *proxy) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bundle.GetX509BundleForTrustDomain(td)
}

// until waits until what was taken is as is says.
func (p *proxy) until(what string, is func() bool) {
	p.t.Helper()
	for deadline := time.After(time.Minute); ; {
		p.mu.Lock()
		done := is()
		p.mu.Unlock()
		if done {
			return
		}
		select {
		case <-p.changed:
		case <-deadline:
			p.t.Fatalf("waiting for %s", what)
		}
	}
}

func (p *proxy) renewed() {
	p.t.Helper()
	before, _ := p.GetX509SVID()
	p.until("a renewal", func() bool { return p.svid.Certificates[0].NotAfter.After(before.Certificates[0].NotAfter) })
}

// sulk rejects every response that it gets, until ctx ends, and returns how
// many there were.
func sulk(ctx context.Context, client secretv3.SecretDiscoveryServiceClient) (int, error) {
	stream, err := client.StreamSecrets(ctx)
	if err != nil {
		return 0, err
	}
	last := ""
	req := &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default"}}
	for n := 0; ; n++ {
		if err := stream.Send(req); err != nil {
			return n, nil
		}
		resp, err := stream.Recv()
		switch {
		case err != nil && ctx.Err() == nil:
			return n, err
		case err != nil:
			return n, nil
		case resp.GetVersionInfo() == last:
			return n, errors.New("the same content again")
		}
		last = resp.GetVersionInfo()
		req = &discoveryv3.DiscoveryRequest{
			TypeUrl: secretType, ResourceNames: []string{"default"}, ResponseNonce: resp.GetNonce(),
			ErrorDetail: &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: "no"},
		}
	}
}

// Proxies that have their secrets by SDS make connections without one failure
// while certificates of 20 s are renewed, agents restart and the root is
// replaced. // SDS-01, SDS-02, SDS-06, SDS-11, SDS-13
func TestProxiesGoOnOverRenewalsRestartsAndANewRoot(t *testing.T) {
	s := newSite(t, proxyTTL)
	s.StartServer()
	proxies := make([]*proxy, 2)
	f := &fleet{t: t, site: s}
	for i := range proxies {
		a := s.NewAgent(fmt.Sprintf("agent%d", i))
		a.Start(a.Join())
		s.CreateEntry(a.ID, fmt.Sprintf("spiffe://example.org/proxy/%d", i))
		proxies[i] = startProxy(t, a.SDSSocket())
		f.agents = append(f.agents, a)
	}
	f.pairs = []*handshakes{
		startHandshakesBetween(t, proxies[0], proxies[1], 5*time.Millisecond),
		startHandshakesBetween(t, proxies[1], proxies[0], 5*time.Millisecond),
	}
	ctx, cancel := context.WithCancel(t.Context())
	type outcome struct {
		n   int
		err error
	}
	rejected := make(chan outcome, 1)
	go func() {
		n, err := sulk(ctx, proxies[1].client)
		rejected <- outcome{n, err}
	}()
	proxies[1].renewed()
	proxies[1].renewed()
	proxies[0].renewed()

	agent := f.agents[0]
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		before, err := os.Stat(filepath.Dir(agent.SDSSocket()))
		if err != nil {
			t.Fatal(err)
		}
		p := proxies[0]
		p.mu.Lock()
		streams := p.streams["default"] + p.streams["ROOTCA"]
		p.killed = sig == syscall.SIGKILL
		p.mu.Unlock()
		agent.Restart(sig)
		after, err := os.Stat(filepath.Dir(agent.SDSSocket()))
		if err != nil || !os.SameFile(before, after) {
			t.Errorf("another directory: %v", err)
		}
		p.until("both streams to come back", func() bool { return p.streams["default"]+p.streams["ROOTCA"] >= streams+2 })
		p.renewed()
	}

	s.CLI("root", "rotate", "--yes", "--detach", "--reason", "friday")
	st := f.until("the end of the rotation", ended("done"))
	for i, p := range proxies {
		p.until("the one new root", func() bool { return len(p.bundle.X509Authorities()) == 1 })
		p.mu.Lock()
		svid, bundle := p.svid, p.bundle
		p.mu.Unlock()
		if id := fmt.Sprintf("%x", bundle.X509Authorities()[0].SubjectKeyId); id != st.Rotation.To {
			t.Errorf("proxy %d trusts %s, not %s", i, id, st.Rotation.To)
		}
		if _, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil {
			t.Errorf("proxy %d: %v", i, err)
		}
	}
	f.check()
	cancel()
	if got := <-rejected; got.err != nil || got.n < 3 {
		t.Errorf("a client that rejects all got %d responses: %v", got.n, got.err)
	}
	resp, err := proxies[0].client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"ALL", "spiffe://example.org/proxy/0"}})
	if err != nil || len(resp.GetResources()) != 2 {
		t.Errorf("fetched %d: %v", len(resp.GetResources()), err)
	}
}

// istio-agent looks for a socket at its start: it connects within a second, or
// goes another way for good. It has to succeed for who has no identity too, who
// is refused by the call. // SDS-08, SDS-05
func TestSocketForEnvoyIsFoundByAnybody(t *testing.T) {
	s := newSite(t, "")
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	conn := dialSDS(t, a.SDSSocket())
	// Not the second that istio-agent gives it: a busy machine is no fault of ours.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	conn.Connect()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		if !conn.WaitForStateChange(ctx, state) {
			t.Fatalf("no connection: %v", state)
		}
	}
	client := secretv3.NewSecretDiscoveryServiceClient(conn)
	fetch := func(name string) codes.Code {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		_, err := client.FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{ResourceNames: []string{name}})
		return status.Code(err)
	}
	if code := fetch("default"); code != codes.PermissionDenied {
		t.Errorf("without an identity: %v", code)
	}
	s.CreateEntry(a.ID, "spiffe://example.org/web")
	a.Eventually(10*time.Second, "the secret", func() error {
		if code := fetch("default"); code != codes.OK {
			return fmt.Errorf("%v", code)
		}
		return nil
	})
	for name, want := range map[string]codes.Code{
		"file-root:system": codes.InvalidArgument, "spiffe://example.org/other": codes.InvalidArgument, "spiffe://example.org/web": codes.OK,
	} {
		if code := fetch(name); code != want {
			t.Errorf("%s: %v", name, code)
		}
	}
}

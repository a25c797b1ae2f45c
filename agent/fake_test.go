package agent_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/test/harness"
)

var (
	td      = spiffeid.RequireTrustDomainFromString("example.org")
	agentID = spiffeid.RequireFromPath(td, "/assay/agent/join_token/x")
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// fake is a server that knows one token, one agent and a list of entries.
type fake struct {
	agentv1.UnimplementedAgentServer
	cert *x509.Certificate
	key  *ecdsa.PrivateKey

	mu      sync.Mutex
	entries []*agentv1.Entry
	banned  bool
	joined  int
	token   string

	addr   string
	server *grpc.Server
}

func newFake(t *testing.T, entries ...*agentv1.Entry) *fake {
	t.Helper()
	var ports harness.Ports // nobody else gets one while the server is away
	f := &fake{
		key: must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), entries: entries,
		addr: fmt.Sprintf("127.0.0.1:%d", ports.Free(t)), token: "the token",
	}
	sum := sha256.Sum256(must(x509.MarshalPKIXPublicKey(&f.key.PublicKey)))
	f.cert = f.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "root"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: sum[:20],
	}, td.ID(), &f.key.PublicKey)
	t.Cleanup(f.stop)
	return f
}

func (f *fake) sign(template *x509.Certificate, id spiffeid.ID, pub crypto.PublicKey) *x509.Certificate {
	template.SerialNumber = must(rand.Int(rand.Reader, big.NewInt(1<<62)))
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	template.BasicConstraintsValid, template.URIs = true, []*url.URL{id.URL()}
	parent := f.cert
	if parent == nil {
		parent = template
	}
	return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, parent, pub, f.key))))
}

func (f *fake) leaf(id spiffeid.ID, pub crypto.PublicKey) *x509.Certificate {
	return f.sign(&x509.Certificate{
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, id, pub)
}

func (f *fake) pin() string {
	sum := sha256.Sum256(f.cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

func (f *fake) start(t *testing.T) {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	leaf := f.leaf(spiffeid.RequireFromPath(td, "/assay/server"), &key.PublicKey)
	f.server = grpc.NewServer(grpc.Creds(rpc.ServerTLS(func() (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
	}, func() (spiffeid.TrustDomain, *x509.CertPool) {
		pool := x509.NewCertPool()
		pool.AddCert(f.cert)
		return td, pool
	})))
	agentv1.RegisterAgentServer(f.server, f)
	lis, err := net.Listen("tcp", f.addr)
	if err != nil {
		t.Fatal(err)
	}
	go func(s *grpc.Server) { _ = s.Serve(lis) }(f.server)
}

func (f *fake) stop() {
	if f.server != nil {
		f.server.Stop()
		f.server = nil
	}
}

func (f *fake) bundle() *agentv1.TrustBundle {
	return &agentv1.TrustBundle{TrustDomain: td.Name(), Sequence: 1, X509Authorities: []*agentv1.Authority{
		{Id: hex.EncodeToString(f.cert.SubjectKeyId), Certificate: f.cert.Raw},
	}}
}

func (f *fake) Bundle(context.Context, *agentv1.BundleRequest) (*agentv1.BundleResponse, error) {
	return &agentv1.BundleResponse{Bundle: f.bundle()}, nil
}

func (f *fake) Attest(stream grpc.BidiStreamingServer[agentv1.AttestRequest, agentv1.AttestResponse]) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if string(req.GetStart().GetPayload()) != f.token {
		return fault.Status(fault.New(fault.Denied, "join_token_invalid", "x"), "R").Err()
	}
	f.mu.Lock()
	f.joined++
	f.mu.Unlock()
	csr := must(x509.ParseCertificateRequest(req.GetStart().GetCsr()))
	return stream.Send(&agentv1.AttestResponse{Step: &agentv1.AttestResponse_Identity{Identity: &agentv1.Identity{
		AgentId: agentID.String(), Chain: [][]byte{f.leaf(agentID, csr.PublicKey).Raw}, Bundle: f.bundle(),
	}}})
}

func (f *fake) admit(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch c := rpc.CallerFrom(ctx); {
	case c.State != rpc.CertValid || c.ID != agentID:
		return fault.Status(fault.New(fault.Unauthenticated, "agent_svid_missing", "x"), "R").Err()
	case f.banned:
		return fault.Status(fault.New(fault.Denied, "agent_banned", "x"), "R").Err()
	}
	return nil
}

func (f *fake) SignX509(ctx context.Context, req *agentv1.SignX509Request) (*agentv1.SignX509Response, error) {
	if err := f.admit(ctx); err != nil {
		return nil, err
	}
	resp := &agentv1.SignX509Response{}
	for _, item := range req.GetItems() {
		csr := must(x509.ParseCertificateRequest(item.GetCsr()))
		for _, e := range f.entries {
			if e.GetId() == item.GetEntryId() {
				leaf := f.leaf(spiffeid.RequireFromString(e.GetSpiffeId()), csr.PublicKey)
				resp.Results = append(resp.Results, &agentv1.SignX509Response_Result{Outcome: &agentv1.SignX509Response_Result_Chain{
					Chain: &agentv1.SignX509Response_Chain{Certificates: [][]byte{leaf.Raw}},
				}})
			}
		}
	}
	return resp, nil
}

func (f *fake) Sync(stream grpc.BidiStreamingServer[agentv1.SyncRequest, agentv1.SyncResponse]) error {
	if err := f.admit(stream.Context()); err != nil {
		return err
	}
	if err := stream.Send(&agentv1.SyncResponse{Epoch: "e", Revision: 1, Snapshot: true, Entries: f.entries, Bundle: f.bundle()}); err != nil {
		return err
	}
	for {
		// Each message of the agent is an occasion to look at the ban.
		if _, err := stream.Recv(); err != nil {
			return err
		}
		if err := f.admit(stream.Context()); err != nil {
			return err
		}
	}
}

func (f *fake) ban() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.banned = true
}

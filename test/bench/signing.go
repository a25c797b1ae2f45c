package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/test/harness"
)

const measureFor = 4 * time.Second

// signing measures SignX509 as an agent would call it, against what the
// standard library can issue on all cores.
func (b *bench) signing(s *harness.Site) {
	limit := b.issueLimit()
	client, id := b.attest(s)
	admin := b.admin(s)
	var items []*agentv1.SignX509Request_Item
	for i := range 50 {
		entry := admin.create(id, fmt.Sprintf("spiffe://example.org/s/%d", i))
		items = append(items, &agentv1.SignX509Request_Item{EntryId: entry, Csr: b.csr(b.key())})
	}
	for _, c := range []struct {
		batch int
		goal  string
	}{{50, ">= 100 %"}, {1, ">= 60 %"}} {
		rate := b.signRate(client, items, c.batch)
		b.add(fmt.Sprintf("signing, batches of %d, 32 in flight", c.batch), fmt.Sprintf("%.0f/s", rate),
			fmt.Sprintf("%.0f/s", limit), fmt.Sprintf("%.0f %%", 100*rate/limit), c.goal)
	}
}

func (b *bench) signRate(client agentv1.AgentClient, items []*agentv1.SignX509Request_Item, batch int) float64 {
	var count atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for worker := range 32 {
		wg.Go(func() {
			for i := worker; time.Since(begin) < measureFor; i++ {
				from := i * batch % len(items)
				resp, err := client.SignX509(context.Background(), &agentv1.SignX509Request{Items: items[from : from+batch]})
				if err != nil {
					b.Errorf("sign: %v", err)
					return
				}
				for _, r := range resp.GetResults() {
					if f := r.GetFailure(); f != nil {
						b.Errorf("sign: %v", f)
						return
					}
				}
				count.Add(int64(batch))
			}
		})
	}
	wg.Wait()
	return float64(count.Load()) / time.Since(begin).Seconds()
}

// issueLimit is parse and verify a CSR and create a certificate with the
// standard library, on all cores, with nothing else.
func (b *bench) issueLimit() float64 {
	key := b.key()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	csr := b.csr(b.key())
	return b.onAllCores(func() error {
		req, err := x509.ParseCertificateRequest(csr)
		if err == nil {
			err = req.CheckSignature()
		}
		if err == nil {
			_, err = x509.CreateCertificate(rand.Reader, template, template, req.PublicKey, key)
		}
		return err
	})
}

// onAllCores does the same on every core for a while, and returns how often in
// a second.
func (b *bench) onAllCores(do func() error) float64 {
	var count atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for range runtime.NumCPU() {
		wg.Go(func() {
			for time.Since(begin) < measureFor {
				if err := do(); err != nil {
					b.Errorf("%v", err)
					return
				}
				count.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(count.Load()) / time.Since(begin).Seconds()
}

func (b *bench) key() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	b.must(err)
	return key
}

func (b *bench) csr(key *ecdsa.PrivateKey) []byte {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	b.must(err)
	return der
}

// attest joins as an agent with a token and returns its connection.
func (b *bench) attest(s *harness.Site) (agentv1.AgentClient, string) {
	token := s.NewAgent("signer").Join()
	addr := fmt.Sprintf("127.0.0.1:%d", s.Port)
	dial := func(creds credentials.TransportCredentials) agentv1.AgentClient {
		conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(creds))
		b.must(err)
		b.Cleanup(func() { _ = conn.Close() })
		return agentv1.NewAgentClient(conn)
	}
	answer, err := dial(rpc.ClientTLSUnverified()).Bundle(context.Background(), &agentv1.BundleRequest{})
	b.must(err)
	var roots []*x509.Certificate
	for _, authority := range answer.GetBundle().GetX509Authorities() {
		root, err := x509.ParseCertificate(authority.GetCertificate())
		b.must(err)
		pin := sha256.Sum256(root.RawSubjectPublicKeyInfo)
		if hex.EncodeToString(pin[:]) == token.Pin {
			roots = append(roots, root)
		}
	}
	trust := func() []*x509.Certificate { return roots }
	serverID := spiffeid.RequireFromString("spiffe://" + harness.TrustDomain + "/assay/server")
	key := b.key()
	stream, err := dial(rpc.ClientTLS(serverID, trust, func() *tls.Certificate { return nil })).Attest(context.Background())
	b.must(err)
	b.must(stream.Send(&agentv1.AttestRequest{Step: &agentv1.AttestRequest_Start_{Start: &agentv1.AttestRequest_Start{
		Attestor: "join_token", Payload: []byte(token.Token), Csr: b.csr(key),
	}}}))
	reply, err := stream.Recv()
	b.must(err)
	cert := &tls.Certificate{Certificate: reply.GetIdentity().GetChain(), PrivateKey: key}
	return dial(rpc.ClientTLS(serverID, trust, func() *tls.Certificate { return cert })), reply.GetIdentity().GetAgentId()
}

// adminClient makes and removes entries for this user's processes.
type adminClient struct {
	b       *bench
	entries entryv1.EntryClient
}

func (b *bench) admin(s *harness.Site) *adminClient {
	conn, err := grpc.NewClient("unix://"+s.AdminSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	b.must(err)
	b.Cleanup(func() { _ = conn.Close() })
	return &adminClient{b: b, entries: entryv1.NewEntryClient(conn)}
}

func (c *adminClient) create(parent, id string) string {
	resp, err := c.entries.BatchCreateEntry(context.Background(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		ParentId: protoID(c.b, parent), SpiffeId: protoID(c.b, id),
		Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}},
	}}})
	c.b.must(err)
	result := resp.GetResults()[0]
	if result.GetStatus().GetCode() != 0 {
		c.b.Fatalf("create entry: %s", result.GetStatus().GetMessage())
	}
	return result.GetEntry().GetId()
}

func protoID(b *bench, text string) *types.SPIFFEID {
	id, err := spiffeid.FromString(text)
	b.must(err)
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

func (c *adminClient) remove(id string) {
	resp, err := c.entries.BatchDeleteEntry(context.Background(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
	c.b.must(err)
	if st := resp.GetResults()[0].GetStatus(); st.GetCode() != 0 {
		c.b.Fatalf("delete entry: %s", st.GetMessage())
	}
}

// Command certificates writes one certificate of every kind that the product
// makes into a directory, in DER. They come out of the real binaries, by the
// ways on which users get them. `make zlint` lints them.
package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"

	"github.com/seed-caa81108/assay/pkg/rpc"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/ca"
	"github.com/seed-caa81108/assay/test/harness"
	"github.com/seed-caa81108/assay/test/istioclient"
)

func main() {
	bins := flag.String("bin", "bin", "directory of the three binaries")
	out := flag.String("o", "", "directory to write to; made if missing")
	flag.Parse()
	dir, err := filepath.Abs(*bins)
	if err == nil {
		err = os.MkdirAll(*out, 0o755)
	}
	if err == nil {
		c := &collector{bins: dir, out: *out}
		err = c.Run(c.collect)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "certificates:", err)
		os.Exit(1)
	}
}

// collector writes down certificates; it is the harness's TB.
type collector struct {
	harness.Program
	bins, out string
}

func (c *collector) write(kind string, der []byte) {
	c.Must(os.WriteFile(filepath.Join(c.out, kind+".der"), der, 0o644))
}

func (c *collector) collect() {
	s := harness.NewSite(c, c.bins, "")
	proxies := c.mesh(s)
	s.StartServer()
	a := s.NewAgent("agent")
	a.Start(a.Join())
	c.authorities(s)
	c.workloads(s, a)
	c.otherKeys(s, a)
	c.minted(s)
	c.proxied(proxies)
	c.complete()
}

// complete fails when a kind of end entity that the authority knows is missing.
func (c *collector) complete() {
	for k := ca.Kind(0); k.String() != fmt.Sprintf("kind_%d", int(k)); k++ {
		if _, err := os.Stat(filepath.Join(c.out, k.String()+".der")); err != nil {
			c.Fatalf("no certificate of kind %s: %v", k, err)
		}
	}
}

// authorities takes down the root from the bundle, and what the server shows
// to its agents: its own certificate and its issuer.
func (c *collector) authorities(s *harness.Site) {
	// It only looks at what is shown, whoever shows it.
	conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.Port), &tls.Config{NextProtos: []string{"h2"}, InsecureSkipVerify: true})
	c.Must(err)
	shown := conn.ConnectionState().PeerCertificates
	c.Must(conn.Close())
	if len(shown) != 2 {
		c.Fatalf("the server shows %d certificates, want its own and its issuer", len(shown))
	}
	c.write("server", shown[0].Raw)
	c.write("issuer", shown[1].Raw)
}

// workloads fetches SVIDs as a workload does.
func (c *collector) workloads(s *harness.Site, a *harness.Agent) {
	s.CreateEntry(a.ID, "spiffe://example.org/plain", "--hint", "workload")
	s.CreateEntry(a.ID, "spiffe://example.org/dns", "--hint", "workload-dns", "--dns", "web.example.org", "--dns", "*.shop.example.org")
	s.CreateEntry(a.ID, "spiffe://example.org/short", "--hint", "workload-short", "--ttl", "1m")
	s.CreateEntry(a.ID, "spiffe://example.org/teams/team-a_b/Web.v2", "--hint", "workload-path")

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	const all = 4
	var got *workloadapi.X509Context
	a.Eventually(time.Minute, "all SVIDs", func() (err error) {
		got, err = workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(a.Endpoint()))
		if err == nil && len(got.SVIDs) != all {
			err = fmt.Errorf("%d SVIDs, want %d", len(got.SVIDs), all)
		}
		return err
	})
	for _, svid := range got.SVIDs {
		c.write(svid.Hint, svid.Certificates[0].Raw)
	}
	for _, b := range got.Bundles.Bundles() {
		for _, root := range b.X509Authorities() {
			c.write("root", root.Raw)
		}
	}
}

// otherKeys takes down the agent's own SVID, and with it asks for SVIDs with
// all sorts of keys that a requester may bring.
func (c *collector) otherKeys(s *harness.Site, a *harness.Agent) {
	identity := c.identity(s.File("agent/data"))
	c.write("agent", identity.Certificate[0])

	root, err := os.ReadFile(filepath.Join(c.out, "root.der"))
	c.Must(err)
	trusted, err := x509.ParseCertificate(root)
	c.Must(err)
	conn, err := grpc.NewClient(fmt.Sprintf("127.0.0.1:%d", s.Port), grpc.WithTransportCredentials(rpc.ClientTLS(
		spiffeid.RequireFromString("spiffe://"+harness.TrustDomain+"/assay/server"),
		func() []*x509.Certificate { return []*x509.Certificate{trusted} },
		func() *tls.Certificate { return identity },
	)))
	c.Must(err)
	c.Cleanup(func() { _ = conn.Close() })

	var entry struct {
		ID string `json:"id"`
	}
	s.CLIJSON(&entry, "entry", "create", "--parent-id", a.ID, "--spiffe-id", "spiffe://example.org/keys", "--selector", "unix:uid:4294967")
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	c.Must(err)
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	c.Must(err)
	for kind, key := range map[string]crypto.Signer{"workload-p384": p384, "workload-rsa": rsa2048} {
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		c.Must(err)
		reply, err := agentv1.NewAgentClient(conn).SignX509(context.Background(), &agentv1.SignX509Request{
			Items: []*agentv1.SignX509Request_Item{{EntryId: entry.ID, Csr: csr}},
		})
		c.Must(err)
		chain := reply.GetResults()[0].GetChain().GetCertificates()
		if len(chain) == 0 {
			c.Fatalf("%s: %v", kind, reply.GetResults()[0].GetFailure())
		}
		c.write(kind, chain[0])
	}
}

// minted mints an SVID as an operator does.
func (c *collector) minted(s *harness.Site) {
	dir := s.File("minted")
	s.CLI("x509", "mint", "--spiffe-id", "spiffe://example.org/minted", "--dns", "db.example.org", "--write", dir)
	data, err := os.ReadFile(filepath.Join(dir, "svid.pem"))
	c.Must(err)
	block, _ := pem.Decode(data)
	c.write("minted", block.Bytes)
}

// mesh makes the server the CA of one.
func (c *collector) mesh(s *harness.Site) *istioclient.Client {
	issuer, err := istioclient.NewIssuer()
	c.Must(err)
	keys, err := issuer.JWKS()
	c.Must(err)
	return &istioclient.Client{
		Address: fmt.Sprintf("127.0.0.1:%d", s.ServeMesh(issuer.Name, keys)), Roots: func() []byte { return []byte(s.CLI("bundle", "show")) },
		Token: func() (string, error) { return issuer.Token("foo", "sleep") }, Identity: "spiffe://example.org/ns/foo/sa/sleep",
	}
}

// proxied fetches a certificate as a sidecar does, with its RSA key.
func (c *collector) proxied(proxy *istioclient.Client) {
	got, err := proxy.Fetch(context.Background())
	c.Must(err)
	proxy.Close()
	c.write("mesh", got.Leaf.Raw)
}

// identity reads the agent's own key and chain from its data directory.
func (c *collector) identity(dir string) *tls.Certificate {
	data, err := os.ReadFile(filepath.Join(dir, "identity.json"))
	c.Must(err)
	var stored struct {
		Key   []byte   `json:"key"`
		Chain [][]byte `json:"chain"`
	}
	c.Must(json.Unmarshal(data, &stored))
	key, err := x509.ParsePKCS8PrivateKey(stored.Key)
	c.Must(err)
	return &tls.Certificate{Certificate: stored.Chain, PrivateKey: key}
}

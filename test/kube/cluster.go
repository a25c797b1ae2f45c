//go:build kube

package kube

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"k8s.io/client-go/rest"

	"github.com/seed-caa81108/assay/test/harness"
)

// issuer of the tokens of service accounts, and the audience of those that are
// made for no other.
const issuer = "https://kubernetes.default.svc.cluster.local"

// Cluster is a Kubernetes API with nothing in it.
type Cluster struct {
	// URL of the API server; it stays over restarts.
	URL string
	// AdminToken is a bearer token that may do everything.
	AdminToken string

	tb        harness.TB
	bins, dir string
	args      []string
	etcd, api *harness.Process
}

// Start starts a cluster that lives as long as tb and waits until it is ready.
// bins has the programs that tools.sh has built. It takes some seconds.
func Start(tb harness.TB, bins string) *Cluster {
	tb.Helper()
	for _, name := range []string{"etcd", "kube-apiserver"} {
		if _, err := os.Stat(filepath.Join(bins, name)); err != nil {
			tb.Fatalf("%v: run make test-kube, which builds it", err)
		}
	}
	dir, err := os.MkdirTemp("", "assay-kube")
	if err != nil {
		tb.Fatalf("make a directory: %v", err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	c := &Cluster{AdminToken: rand.Text(), tb: tb, bins: bins, dir: dir}

	var ports harness.Ports
	client, peer, secure := ports.Free(tb), ports.Free(tb), ports.Free(tb)
	c.URL = fmt.Sprintf("https://127.0.0.1:%d", secure)
	store := fmt.Sprintf("http://127.0.0.1:%d", client)
	between := fmt.Sprintf("http://127.0.0.1:%d", peer)
	c.etcd = harness.Start(tb, c.file("etcd.log"), nil, filepath.Join(bins, "etcd"),
		"--data-dir="+c.file("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+store, "--advertise-client-urls="+store,
		"--listen-peer-urls="+between, "--initial-advertise-peer-urls="+between, "--initial-cluster=default="+between)

	key, public := c.accountKey()
	c.args = []string{
		"--etcd-servers=" + store,
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", secure),
		"--cert-dir=" + c.file("tls"),
		"--service-account-issuer=" + issuer,
		"--service-account-key-file=" + public, "--service-account-signing-key-file=" + key,
		"--token-auth-file=" + c.write("tokens.csv", c.AdminToken+`,admin,admin,system:masters`+"\n"),
		"--authorization-mode=Node,RBAC",
		"--service-cluster-ip-range=10.250.0.0/24", "--endpoint-reconciler-type=none",
		"--enable-admission-plugins=NodeRestriction",
		"--allow-privileged", // as clusters have it; namespaces forbid it by their labels
		// Nobody makes a default service account in each namespace.
		"--disable-admission-plugins=ServiceAccount",
	}
	c.startAPI()
	c.waitReady(tb)
	return c
}

// Stop ends the API server, as a crash does; its objects stay in etcd.
func (c *Cluster) Stop() { c.api.Stop(syscall.SIGKILL) }

// Restart starts the API server again where it was and waits until it is ready.
func (c *Cluster) Restart(tb harness.TB) {
	tb.Helper()
	c.Stop()
	c.startAPI()
	c.waitReady(tb)
}

// Config is how a client that has token reaches the API server.
func (c *Cluster) Config(token string) *rest.Config {
	return &rest.Config{
		Host:            c.URL,
		BearerToken:     token,
		TLSClientConfig: rest.TLSClientConfig{CAFile: c.caFile()},
		QPS:             -1, // a test doesn't wait for itself
	}
}

func (c *Cluster) startAPI() {
	c.tb.Helper()
	c.api = harness.Start(c.tb, c.file("kube-apiserver.log"), nil, filepath.Join(c.bins, "kube-apiserver"), c.args...)
}

// waitReady waits until the API server answers that it is ready.
func (c *Cluster) waitReady(tb harness.TB) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := poll(ctx, c.api.Done(), func() error { return c.ready(ctx) }); err != nil {
		tb.Fatalf("the API server is not ready: %v\n%s%s", err, c.tail("etcd.log"), c.tail("kube-apiserver.log"))
	}
}

// ready is nil when the API server answers that it is ready.
func (c *Cluster) ready(ctx context.Context) error {
	client, err := rest.HTTPClientFor(c.Config(c.AdminToken)) // no certificate before its first start
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL+"/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("readyz: %s", resp.Status)
	}
	return nil
}

// accountKey makes the key that tokens of service accounts are signed with.
func (c *Cluster) accountKey() (private, public string) {
	c.tb.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		c.tb.Fatalf("make a key: %v", err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		c.tb.Fatalf("encode a key: %v", err)
	}
	private = c.write("sa.key", string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})))
	public = c.write("sa.pub", string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	return private, public
}

// caFile has the certificate that the API server made for itself.
func (c *Cluster) caFile() string { return c.file("tls/apiserver.crt") }

func (c *Cluster) file(name string) string { return filepath.Join(c.dir, name) }

func (c *Cluster) write(name, text string) string {
	c.tb.Helper()
	if err := os.WriteFile(c.file(name), []byte(text), 0o600); err != nil {
		c.tb.Fatalf("%v", err)
	}
	return c.file(name)
}

// tail is the end of a log.
func (c *Cluster) tail(name string) string {
	data, _ := os.ReadFile(c.file(name))
	return fmt.Sprintf("--- %s\n%s\n", name, data[max(0, len(data)-4<<10):])
}

// poll calls check until it succeeds, until ctx ends, or until what ends
// without which it can't succeed any more. A nil channel never ends.
func poll(ctx context.Context, ended <-chan struct{}, check func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return fmt.Errorf("it has ended: %w", err)
		case <-ctx.Done():
			return fmt.Errorf("waited too long: %w", err)
		case <-tick.C:
		}
	}
}

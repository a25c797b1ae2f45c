package reference

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	spireagentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/seed-caa81108/assay/agent"
	"github.com/seed-caa81108/assay/pkg/daemon"
	"github.com/seed-caa81108/assay/server"
	"github.com/seed-caa81108/assay/server/istioca"
	"github.com/seed-caa81108/assay/server/kube"
)

// Both daemons run, so that every metric is registered, whenever that is done.
func TestMetricsReference(t *testing.T) {
	dir, err := os.MkdirTemp("", "as") // short: socket paths are
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	log := slog.New(slog.DiscardHandler)

	ofServer := &Recorder{Registry: prometheus.NewRegistry()}
	seal := filepath.Join(dir, "seal.key")
	if err := server.WriteSealKey(seal); err != nil {
		t.Fatal(err)
	}
	nowhere := filepath.Join(dir, "kubeconfig") // of a cluster that gives no answer
	if err := os.WriteFile(nowhere, []byte(`{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}],
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}], users: [{name: u, user: {}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := server.New(server.Config{
		Kubernetes: kube.Config{Clusters: map[string]kube.ClusterConfig{
			"c": {Kubeconfig: nowhere, AgentServiceAccounts: []string{"assay/assay-agent"}, BundleConfigMap: "assay/assay-bundle"},
		}},
		Istio: istioca.Config{Listen: "127.0.0.1:0", DNSNames: []string{"ca"}, Clusters: map[string]istioca.ClusterConfig{
			"c": {RootConfigMaps: true, IstiodSecret: "istio-system/istiod-tls"},
		}},
		TrustDomain: "example.org", Bootstrap: time.Now().UTC().Format(time.DateOnly), SealKeyFile: seal,
		Listen: "127.0.0.1:0", DataDir: filepath.Join(dir, "server"),
		Admin: server.AdminConfig{Socket: filepath.Join(dir, "run", "admin.sock")},
	}, server.Deps{Log: log, Registerer: ofServer})
	if err != nil {
		t.Fatal(err)
	}
	serve(t, "server", s.Run, s.Ready)

	id := node(t, dir, s.AdminSocket())
	ofAgent := &Recorder{Registry: prometheus.NewRegistry()}
	a, err := agent.New(agent.Config{
		TrustDomain: "example.org", Server: agent.ServerConfig{Addresses: []string{s.Addr().String()}},
		TrustBundle: filepath.Join(dir, "bundle.pem"), JoinTokenFile: filepath.Join(dir, "token"),
		Sockets: agent.SocketsConfig{Dir: filepath.Join(dir, "public")},
		DataDir: filepath.Join(dir, "agent"), RunDir: filepath.Join(dir, "cache"),
	}, agent.Deps{Log: log, Registerer: ofAgent})
	if err != nil {
		t.Fatal(err)
	}
	serve(t, "agent "+id, a.Run, func(ctx context.Context) error {
		_, err := ofAgent.Metrics() // until there is a workload's SVID to tell of
		_, heard := ofServer.Metrics()
		return errors.Join(err, heard, a.Ready(ctx))
	})

	serverMetrics, err := ofServer.Metrics()
	if err != nil {
		t.Fatal(err)
	}
	agentMetrics, err := ofAgent.Metrics()
	if err != nil {
		t.Fatal(err)
	}
	both, err := Gathered(daemon.NewRegistry(daemon.Build{}), "assay_")
	if err != nil {
		t.Fatal(err)
	}
	Check(t, "metrics.md", MetricsPage(serverMetrics, agentMetrics, both), *update)
}

// node writes what an agent needs to join, and registers a workload for it.
// It returns the agent's ID to be.
func node(t *testing.T, dir, adminSocket string) string {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+adminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	bundle, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	token, err := spireagentv1.NewAgentClient(conn).CreateJoinToken(t.Context(), &spireagentv1.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		t.Fatal(err)
	}
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: bundle.GetX509Authorities()[0].GetAsn1()})
	for name, content := range map[string][]byte{"bundle.pem": root, "token": []byte(token.GetValue())} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sum := sha256.Sum256([]byte(token.GetValue()))
	path := "/assay/agent/join_token/" + hex.EncodeToString(sum[:16])
	created, err := entryv1.NewEntryClient(conn).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		ParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: path}, SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/web"},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if st := created.GetResults()[0].GetStatus(); st.GetCode() != 0 {
		t.Fatal(st.GetMessage())
	}
	return path
}

// serve runs a daemon until the test ends, and returns when it is ready.
func serve(t *testing.T, name string, run, ready func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	})
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	tooLong := time.After(time.Minute)
	for {
		err := ready(ctx)
		if err == nil {
			return
		}
		select {
		case err := <-done:
			done <- err
			t.Fatalf("%s ended: %v", name, err)
		case <-tooLong:
			t.Fatalf("%s is not ready: %v", name, err)
		case <-tick.C:
		}
	}
}

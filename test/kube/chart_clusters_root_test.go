//go:build kube && root

package kube

import (
	"context"
	"crypto/tls"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/seed-caa81108/assay/test/harness"
)

// One server and two clusters, each with the chart: the second one with agents
// alone. By a kubeconfig of the account that the chart makes there the server does
// in the second cluster all that it does in its own, and is refused nothing.
func TestTheChartInASecondCluster(t *testing.T) {
	east := cluster.NewSpace(t)
	west, cg := east.Twin(t, Start(t, "../../out/kube")), newCgroups(t)
	account := func(s *Space) string { return s.Kubeconfig(s.Token("assay-server", "", nil)) }
	westAll := west.chartOf(t, "agents", append(west.withMesh(), "--set", "cluster=west")...)
	mesh := "server.config.istio.clusters."
	eastAll := east.chart(t, append(east.withMesh(), "--set", "cluster=east",
		"--set", "server.otherClusters.west.existingSecret=assay-cluster-west,server.config.kubernetes.namespace_sameness=true",
		"--set", mesh+"east.cluster_id=East,"+mesh+"west.cluster_id=West,"+mesh+"west.root_config_maps=true,"+mesh+"west.istiod_secret="+west.Namespace+"/istiod-tls")...)
	// What is found not to be too many with a server is not without one.
	if with, without := rightsOf(t, eastAll), rightsOf(t, westAll); !slices.Equal(with, without) {
		t.Errorf("the rights without a server are %v, with one %v", without, with)
	}
	volumes := fmt.Sprint(find(t, eastAll, "StatefulSet", "assay-server").Object)
	if !strings.Contains(volumes, "mountPath:/etc/assay-server/clusters") || !strings.Contains(volumes, "[items:[map[key:kubeconfig path:west]] name:assay-cluster-west]") {
		t.Errorf("the kubeconfig is not mounted: %s", volumes)
	}
	config := text(t, find(t, eastAll, "ConfigMap", "assay-server"), "data", "server.yaml")
	if !strings.Contains(config, "kubeconfig: "+filepath.Join("/etc/assay-server/clusters", "west")) {
		t.Errorf("the server looks for its kubeconfig elsewhere:\n%s", config)
	}

	for _, s := range []*Space{east, west} {
		var rules []rbacv1.PolicyRule
		for _, r := range rightsOf(t, westAll) {
			rules = append(rules, r.rule())
		}
		s.awaitRights("assay-server", rules)
	}
	site := chartSiteWith(t, eastAll, map[string]string{"east": account(east), "west": account(west)})
	site.StartServer()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for name, s := range map[string]*Space{"east": east, "west": west} {
		node := s.Node(name)
		s.Account("web")
		site.Write("agent-"+node.Name+".bundle", s.bundle(ctx, t))
		a, _ := s.newAgent(t, site, node, cg.root)
		a.Cluster, a.ID = name, "spiffe://example.org/assay/agent/k8s_psat/"+name+"/"+string(node.UID)
		a.Start(harness.Token{})
		pod := s.Run(Pod{Name: "web-1", Node: node.Name, Account: "web"})
		want := fmt.Sprintf("svid spiffe://example.org/ns/%s/sa/web ", s.Namespace)
		if line := cg.start(pod, a.Endpoint()).await("svid"); !strings.HasPrefix(line, want) || !strings.Contains(line, " ou="+name) {
			t.Errorf("in the %s got %q, want %q", name, line, want)
		}
		c := &control{Space: s, t: t, ctx: ctx, site: site}
		c.await("istiod's certificate in the "+name, func(*tls.Certificate, *corev1.Secret) error { return nil })
		if err := poll(ctx, nil, func() error {
			if n := harness.Metric(t, site.Ops, fmt.Sprintf("assay_istio_root_config_maps{cluster=%q,state=\"behind\"}", name)); n != 0 {
				return fmt.Errorf("%v namespaces are behind", n)
			}
			return nil
		}); err != nil {
			t.Errorf("in the %s: %v", name, err)
		}
	}
	if log := readFile(t, site.File("server.log")); strings.Contains(log, "kubernetes_forbidden") || strings.Contains(log, "cannot ") {
		t.Errorf("the server was refused something:\n%s", log)
	}
}

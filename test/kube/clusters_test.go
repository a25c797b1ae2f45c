//go:build kube

package kube

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/seed-caa81108/assay/test/harness"
	"github.com/seed-caa81108/assay/test/istioclient"
)

// Two clusters of one trust domain, each with an API server of its own, whose
// pods have the same namespace and ServiceAccount: they share an ID only where
// the configuration says that they may, and their certificates tell them apart in
// any case. An agent of one gets nothing of the other's.
func TestTwoClustersInOneTrustDomain(t *testing.T) {
	east := cluster.NewSpace(t)
	west := east.Twin(t, Start(t, "../../out/kube"))
	clusters := "kubernetes:\n  clusters:\n"
	for name, s := range map[string]*Space{"east": east, "west": west} {
		s.Account("assay-server", serverRules...)
		s.Account("assay-agent")
		s.Account("web")
		clusters += fmt.Sprintf("    %s:\n      kubeconfig: %s\n      agent_service_accounts: [%s/assay-agent]\n", name, s.Kubeconfig(s.Token("assay-server", "", nil)), s.Namespace)
	}
	path := "/ns/" + east.Namespace + "/sa/web"
	for name, tc := range map[string]struct{ config, east, west string }{
		"by cluster": {"  template: /{cluster}/ns/{namespace}/sa/{service_account}\n", "/east" + path, "/west" + path},
		"the same":   {"  namespace_sameness: true\n", path, path},
	} {
		t.Run(name, func(t *testing.T) {
			site := harness.NewSite(t, bins, clusters+tc.config)
			site.StartServer()
			suffix := strings.ReplaceAll(name, " ", "-")
			pods := map[string]string{}
			agents := map[string]*forged{}
			for name, s := range map[string]*Space{"east": east, "west": west} {
				node := s.Node(suffix)
				agent := s.Run(Pod{Name: "agent-" + suffix, Node: node.Name, Account: "assay-agent"})
				pods[name] = "pod/" + string(s.Run(Pod{Name: "web-" + suffix, Node: node.Name, Account: "web"}).UID)
				agents[name] = newForged(t, site)
				agents[name].cluster = name
				if err := agents[name].attest(s.Token("assay-agent", audience, agent)); err != nil {
					t.Fatal(err)
				}
			}
			agents["east"].signs(pods["east"], "spiffe://example.org"+tc.east)
			agents["west"].signs(pods["west"], "spiffe://example.org"+tc.west)
			agents["east"].signs(pods["west"], "no_such_workload_on_node")
		})
	}
	t.Run("collision", func(t *testing.T) {
		site := harness.NewSite(t, bins, clusters)
		site.LaunchServer()
		<-site.Server.Done()
		log := readFile(t, site.File("server.log"))
		if code := site.Server.ExitCode(); code != 78 || !strings.Contains(log, "put {cluster} into kubernetes.template") {
			t.Errorf("a server whose clusters collide: exit %d\n%s", code, log)
		}
	})
}

// CA-9, ZT-6: a mesh over two clusters whose tokens have the same issuer. A token
// is of the cluster that the caller names, by that one's API server, and a node
// proxy of one gets nothing of the other's.
func TestAMeshOverTwoClusters(t *testing.T) {
	east := cluster.NewSpace(t)
	west := east.Twin(t, Start(t, "../../out/kube"))
	var ports harness.Ports
	port := ports.Free(t)
	config := "kubernetes:\n  namespace_sameness: true\n  clusters:\n"
	spaces := map[string]*Space{"east": east, "west": west}
	for name, s := range spaces {
		s.Account("assay-server", serverRules...)
		s.Account("web-" + name)
		s.Account("ztunnel")
		config += fmt.Sprintf("    %s:\n      kubeconfig: %s\n      agent_service_accounts: [%s/assay-agent]\n", name, s.Kubeconfig(s.Token("assay-server", "", nil)), s.Namespace)
	}
	config += fmt.Sprintf("istio:\n  listen: 127.0.0.1:%d\n  ip_addresses: [127.0.0.1]\n  trusted_node_accounts: [%s/ztunnel]\n"+
		"  clusters:\n    east: {cluster_id: East, issuer: %q}\n    west: {cluster_id: West, issuer: %q}\n", port, east.Namespace, issuer, issuer)
	site := harness.NewSite(t, bins, config)
	site.StartServer()
	meshes, ztunnels, webs := map[string]*mesh{}, map[string]*corev1.Pod{}, map[string]*corev1.Pod{}
	for name, s := range spaces {
		node := s.Node("a").Name
		meshes[name] = &mesh{Space: s, t: t, site: site, port: port}
		webs[name] = s.Run(Pod{Name: "web-1", Node: node, Account: "web-" + name})
		ztunnels[name] = s.Run(Pod{Name: "ztunnel-1", Node: node, Account: "ztunnel"})
	}
	m := meshes["east"]
	in := func(c *istioclient.Client, id string) *istioclient.Client { c.ClusterID = id; return c }
	m.issued("of the east", in(m.proxy("web-east", webs["east"]), "East"))
	m.issued("of the west", in(meshes["west"].proxy("web-west", webs["west"]), "West"))
	m.issued("a pod of the east, by its ztunnel", in(m.ztunnel(ztunnels["east"], "web-east"), "East"))
	m.refused("no cluster's", in(m.proxy("web-east", webs["east"]), ""), "cluster_ambiguous")
	m.refused("as one of the west", in(m.proxy("web-east", webs["east"]), "West"), "token_invalid")
	m.refused("a pod of the west, by the ztunnel of the east", in(m.ztunnel(ztunnels["east"], "web-west"), "East"), "no_such_workload_on_node")
	m.refused("the same, as one of the west", in(m.ztunnel(ztunnels["east"], "web-west"), "West"), "token_invalid")
}

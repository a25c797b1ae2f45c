//go:build kube

package kube

import (
	"fmt"
	"strings"
	"testing"

	"github.com/seed-caa81108/assay/test/harness"
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

//go:build kube

package kube

import (
	"fmt"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/seed-caa81108/assay/test/harness"
)

// serverRules are the rights that the documentation tells the server to have,
// and no more.
var serverRules = []rbacv1.PolicyRule{
	{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}},
	{APIGroups: []string{""}, Resources: []string{"pods", "nodes"}, Verbs: []string{"get", "list", "watch"}},
}

// site is a server that knows the cluster, with exactly serverRules.
func (s *Space) site(t testing.TB, more string) *harness.Site {
	t.Helper()
	return s.siteWith(t, serverRules, more)
}

// siteWith is site with other rights.
func (s *Space) siteWith(t testing.TB, rules []rbacv1.PolicyRule, more string) *harness.Site {
	t.Helper()
	s.Account("assay-server", rules...)
	s.Account("assay-agent")
	site := harness.NewSite(t, bins, fmt.Sprintf(`kubernetes:
  clusters:
    test:
      kubeconfig: %s
      agent_service_accounts: [%s/assay-agent]
%s`, s.Kubeconfig(s.Token("assay-server", "", nil)), s.Namespace, more))
	site.StartServer()
	return site
}

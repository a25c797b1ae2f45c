//go:build kube

package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/test/harness"
)

// The trust bundle is in the cluster before the first agent comes, and follows
// each change of roots. An agent begins with nothing but what is there.
func TestTheBundleIsInTheCluster(t *testing.T) {
	s := cluster.NewSpace(t)
	site := s.siteWith(t, append(slices.Clone(serverRules), rbacv1.PolicyRule{
		APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"get", "update", "create"},
	}), "      bundle_config_map: "+s.Namespace+"/assay-bundle\n")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	published := func(roots int) (bundle string) {
		t.Helper()
		if err := poll(ctx, nil, func() error {
			held, err := s.Core.ConfigMaps(s.Namespace).Get(ctx, "assay-bundle", metav1.GetOptions{})
			if err != nil {
				return err
			}
			if n := strings.Count(held.Data["bundle.crt"], "BEGIN CERTIFICATE"); n != roots {
				return fmt.Errorf("the ConfigMap has %d roots, want %d", n, roots)
			}
			bundle = held.Data["bundle.crt"]
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return bundle
	}
	first := published(1)

	node := s.Node("a")
	pod := s.Run(Pod{Name: "agent", Node: node.Name, Account: "assay-agent"})
	a := site.NewAgent("agent")
	a.Cluster, a.TokenFile = "test", site.Write("agent.token", s.Token("assay-agent", audience, pod))
	site.Write("agent.bundle", first)
	a.Start(harness.Token{})

	var made struct {
		ID string `json:"id"`
	}
	site.CLIJSON(&made, "root", "prepare", "--reason", "test")
	if both := published(2); !strings.Contains(both, first) {
		t.Errorf("the root that signs is not published any more:\n%s", both)
	}
	if got := harness.Metric(t, site.Ops, `assay_kubernetes_bundle_published{cluster="test"}`); got != 1 {
		t.Errorf("assay_kubernetes_bundle_published is %v", got)
	}
	if err := s.Core.ConfigMaps(s.Namespace).Delete(ctx, "assay-bundle", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	site.CLI("root", "revoke", made.ID, "--yes", "--reason", "test")
	if err := poll(ctx, nil, func() error {
		if harness.Metric(t, site.Ops, `assay_kubernetes_bundle_published{cluster="test"}`) != 1 {
			return errors.New("not published")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if again := published(1); again != first {
		t.Errorf("after the new root was given up the bundle is\n%s", again)
	}
}

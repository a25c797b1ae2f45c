//go:build kube && root

package kube

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/seed-caa81108/assay/test/harness"
)

// chart is the chart as it is installed in the space: what has rights, the ConfigMap
// and the Secret that the server fills. No kubelet is here to run its pods.
func (s *Space) chart(t testing.TB, flags ...string) []*unstructured.Unstructured {
	t.Helper()
	return s.chartOf(t, "minimal", append([]string{"--set", "cluster=test"}, flags...)...)
}

// chartOf is chart by one of the files of values in ci.
func (s *Space) chartOf(t testing.TB, values string, flags ...string) []*unstructured.Unstructured {
	t.Helper()
	all := s.Render(chartDir+"/ci/"+values+".yaml", flags...)
	for _, o := range all {
		switch o.GetKind() {
		case "ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "Secret":
		case "ConfigMap":
			if o.GetName() != "assay-bundle" {
				continue
			}
		default:
			continue
		}
		if err := s.Apply(o, false); err != nil {
			t.Fatalf("%s %s: %v", o.GetKind(), o.GetName(), err)
		}
	}
	return all
}

// chartSite is a server with what the chart configures of Kubernetes, that
// reaches the API server as one of the space's accounts.
func (s *Space) chartSite(t testing.TB, all []*unstructured.Unstructured, account string) *harness.Site {
	t.Helper()
	return chartSiteWith(t, all, map[string]string{"test": s.Kubeconfig(s.Token(account, "", nil))})
}

// chartSiteWith has a kubeconfig for each cluster, wherever the chart mounts them.
func chartSiteWith(t testing.TB, all []*unstructured.Unstructured, kubeconfigs map[string]string) *harness.Site {
	t.Helper()
	var config map[string]any
	if err := yaml.Unmarshal([]byte(text(t, find(t, all, "ConfigMap", "assay-server"), "data", "server.yaml")), &config); err != nil {
		t.Fatal(err)
	}
	for name, file := range kubeconfigs {
		if err := unstructured.SetNestedField(config, file, "kubernetes", "clusters", name, "kubeconfig"); err != nil {
			t.Fatal(err)
		}
	}
	if mesh, ok := config["istio"].(map[string]any); ok {
		var ports harness.Ports
		mesh["listen"] = fmt.Sprintf("127.0.0.1:%d", ports.Free(t))
	}
	var more strings.Builder
	for _, part := range []string{"kubernetes", "istio"} {
		if config[part] == nil {
			continue
		}
		text, err := json.Marshal(config[part]) // which is YAML
		if err != nil {
			t.Fatal(err)
		}
		more.WriteString(part + ": " + string(text) + "\n")
	}
	return harness.NewSite(t, bins, more.String())
}

// withMesh are the flags for a chart that keeps all that it can in a mesh, with
// istiod in the space's namespace.
func (s *Space) withMesh() []string {
	return []string{"--set", "istio.enabled=true,istio.rootConfigMaps=true,istio.istiodSecret=" + s.Namespace + "/istiod-tls"}
}

// With the chart's rights and no others the server publishes its bundle, an agent
// attests by what the chart mounts for it, and a pod gets its SVID.
func TestTheChartsRightsSuffice(t *testing.T) {
	s, cg := cluster.NewSpace(t), newCgroups(t)
	all := s.chart(t, s.withMesh()...)
	node := s.Node("a")
	s.Account("web")
	site := s.chartSite(t, all, "assay-server")
	site.StartServer()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	site.Write("agent-"+node.Name+".bundle", s.bundle(ctx, t))
	a := s.agent(t, site, node, cg.root)
	pod := s.Run(Pod{Name: "web-1", Node: node.Name, Account: "web"})
	want := fmt.Sprintf("svid spiffe://example.org/ns/%s/sa/web ", s.Namespace)
	if line := cg.start(pod, a.Endpoint()).await("svid"); !strings.HasPrefix(line, want) {
		t.Errorf("got %q, want %q", line, want)
	}
	c := &control{Space: s, t: t, ctx: ctx, site: site}
	c.await("istiod's certificate", func(*tls.Certificate, *corev1.Secret) error { return nil })
	// Who has the server's account can make no Secret, not even of that name, and with
	// it have the token of another ServiceAccount; nor read one.
	secrets := s.as(t, s.Token("assay-server", "", nil)).Secrets(s.Namespace)
	for _, name := range []string{"istiod-tls", "stolen"} {
		if _, err := secrets.Create(ctx, &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{corev1.ServiceAccountNameKey: "web"}},
			Type:       corev1.SecretTypeServiceAccountToken,
		}, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("create the Secret %s: %v", name, err)
		}
	}
	if _, err := secrets.Get(ctx, "stolen", metav1.GetOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("read another Secret: %v", err)
	}
	if err := poll(ctx, nil, func() error {
		if n := harness.Metric(t, site.Ops, `assay_istio_root_config_maps{cluster="test",state="behind"}`); n != 0 {
			return fmt.Errorf("%v namespaces are behind", n)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// bundle is what the server has published, once it has.
func (s *Space) bundle(ctx context.Context, t testing.TB) (bundle string) {
	t.Helper()
	if err := poll(ctx, nil, func() error {
		held, err := s.Core.ConfigMaps(s.Namespace).Get(ctx, "assay-bundle", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if bundle = held.Data["bundle.crt"]; bundle == "" {
			return errors.New("the ConfigMap has no bundle")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return bundle
}

// right is one verb on one resource.
type right struct{ group, resource, name, verb string }

func (r right) rule() rbacv1.PolicyRule {
	rule := rbacv1.PolicyRule{APIGroups: []string{r.group}, Resources: []string{r.resource}, Verbs: []string{r.verb}}
	if r.name != "" {
		rule.ResourceNames = []string{r.name}
	}
	return rule
}

// refused says whether a log tells that this right is missing: in the API server's
// words, or in those that an agent hears.
func (r right) refused(log string) bool {
	for line := range strings.Lines(strings.ToLower(log)) {
		if strings.Contains(line, "does not let the server "+r.verb+" "+r.resource) ||
			strings.Contains(line, "cannot "+r.verb+" resource") && strings.Contains(line, r.resource) {
			return true
		}
	}
	return false
}

// rightsOf are the chart's, one by one.
func rightsOf(t testing.TB, all []*unstructured.Unstructured) (rights []right) {
	t.Helper()
	for _, o := range all {
		if o.GetKind() != "ClusterRole" && o.GetKind() != "Role" {
			continue
		}
		var role rbacv1.ClusterRole // a Role has the same rules
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &role); err != nil {
			t.Fatal(err)
		}
		for _, rule := range role.Rules {
			names := rule.ResourceNames
			if len(names) == 0 {
				names = []string{""}
			}
			for _, resource := range rule.Resources {
				for _, name := range names {
					for _, verb := range rule.Verbs {
						rights = append(rights, right{rule.APIGroups[0], resource, name, verb})
					}
				}
			}
		}
	}
	return rights
}

// None of the chart's rights is too many: without any one of them the API server
// refuses something that the server asks for.
func TestTheChartHasNoRightTooMany(t *testing.T) {
	s := cluster.NewSpace(t)
	if rights := rightsOf(t, s.Render(chartDir+"/ci/minimal.yaml")); len(rights) != 9 {
		t.Errorf("the chart has %d rights: %v", len(rights), rights)
	}
	all := s.chart(t, s.withMesh()...)
	rights := rightsOf(t, all)
	if len(rights) != 17 {
		t.Errorf("with a mesh the chart has %d rights: %v", len(rights), rights)
	}
	for i, without := range rights {
		t.Run(without.verb+" "+without.resource, func(t *testing.T) {
			rest := slices.Delete(slices.Clone(rights), i, i+1)
			account := fmt.Sprintf("server-%d", i)
			var rules []rbacv1.PolicyRule
			for _, r := range rest {
				rules = append(rules, r.rule())
			}
			s.Account(account, rules...)
			s.newNamespace(fmt.Sprintf("n%d", i)) // to create a ConfigMap in
			if err := s.Core.Secrets(s.Namespace).Delete(t.Context(), "istiod-tls", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			s.makeSecret(t, corev1.SecretTypeOpaque, nil)

			site := s.chartSite(t, all, account)
			var env []string
			if without.verb == "list" {
				// An API server before 1.34 can't begin a watch with what is there, as
				// this one can. So it is asked as those are.
				env = []string{"KUBE_FEATURE_WatchListClient=false"}
			}
			site.StartServer(env...)
			node := s.Node(fmt.Sprintf("n%d", i))
			pod := s.Run(Pod{Name: "agent-" + node.Name, Node: node.Name, Account: "assay-agent"})
			a := site.NewAgent("agent")
			a.Cluster, a.TokenFile = "test", site.Write("agent.token", s.Token("assay-agent", audience, pod))
			a.Launch(harness.Token{})
			site.Server.Eventually(2*time.Minute, "the server is refused "+without.verb+" "+without.resource, func() error {
				if !without.refused(readFile(t, site.File("server.log")) + a.Log()) {
					return fmt.Errorf("not yet")
				}
				return nil
			})
		})
	}
}

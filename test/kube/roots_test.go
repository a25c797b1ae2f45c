//go:build kube

package kube

import (
	"context"
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
	"k8s.io/apimachinery/pkg/types"

	"github.com/seed-caa81108/assay/test/harness"
)

// rootMapRules are the rights that root_config_maps needs besides serverRules.
var rootMapRules = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"namespaces"}, Verbs: []string{"list", "watch"}},
	{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"create"}},
	{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{rootMapName}, Verbs: []string{"list", "watch", "patch"}},
}

const rootMapName = "istio-ca-root-cert"

// keeping is the configuration of a mesh of the cluster with what is kept in it.
func keeping(t testing.TB, what string) string {
	var ports harness.Ports
	return fmt.Sprintf("istio:\n  listen: 127.0.0.1:%d\n  dns_names: [assay-server.assay.svc]\n  clusters:\n    test: {%s}\n", ports.Free(t), what)
}

// newNamespace makes one more, in which no test is.
func (s *Space) newNamespace(suffix string) string {
	s.t.Helper()
	name := s.Namespace + "-" + suffix
	if _, err := s.Core.Namespaces().Create(s.t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	return name
}

// IS-03: the roots of the mesh are in each namespace, kube-system too, follow the
// trust bundle, come back when they are deleted or changed, and leave alone what
// else is in the ConfigMap.
func TestEveryNamespaceHasTheRootsOfTheMesh(t *testing.T) {
	s := cluster.NewSpace(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	maps := s.Core.ConfigMaps(s.Namespace)
	if _, err := maps.Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: rootMapName, Annotations: map[string]string{"kept": "true"}},
		Data:       map[string]string{"root-cert.pem": "istiod's", "other": "kept"},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	site := s.siteWith(t, append(slices.Clone(serverRules), rootMapRules...), keeping(t, "root_config_maps: true"))
	roots := site.CLI("bundle", "show")
	has := func(namespace string) error {
		held, err := s.Core.ConfigMaps(namespace).Get(ctx, rootMapName, metav1.GetOptions{})
		if err == nil && (held.Data["root-cert.pem"] != roots || held.Labels["istio.io/config"] != "true") {
			err = fmt.Errorf("%s has %v, labels %v", namespace, held.Data, held.Labels)
		}
		return err
	}
	await := func(what, namespace string) {
		t.Helper()
		began := time.Now()
		if err := poll(ctx, site.Server.Done(), func() error { return has(namespace) }); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		t.Logf("%s: after %v", what, time.Since(began).Round(time.Millisecond))
	}
	everywhere := func(what string) {
		t.Helper()
		if err := poll(ctx, site.Server.Done(), func() error {
			all, err := s.Core.Namespaces().List(ctx, metav1.ListOptions{})
			if err != nil {
				return err
			}
			n := 0
			for _, one := range all.Items {
				if one.Status.Phase != corev1.NamespaceTerminating {
					if n++; has(one.Name) != nil {
						return fmt.Errorf("%s has not the roots: %w", one.Name, has(one.Name))
					}
				}
			}
			series := `assay_istio_root_config_maps{cluster="test",state=`
			current, behind := harness.Metric(t, site.Ops, series+`"current"}`), harness.Metric(t, site.Ops, series+`"behind"}`)
			if current != float64(n) || behind != 0 {
				return fmt.Errorf("of %d namespaces the metrics have %v current, %v behind", n, current, behind)
			}
			return nil
		}); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	await("kube-system", metav1.NamespaceSystem)
	everywhere("at first")
	kept := func(what string) {
		t.Helper()
		held, err := maps.Get(ctx, rootMapName, metav1.GetOptions{})
		if err != nil || held.Data["other"] != "kept" || held.Annotations["kept"] != "true" {
			t.Errorf("%s: %v has lost what was there, %v", what, held, err)
		}
	}
	kept("over what istiod wrote")
	fresh := s.newNamespace("new")
	await("a new namespace", fresh)

	patch := func(namespace, patch string) {
		t.Helper()
		if _, err := s.Core.ConfigMaps(namespace).Patch(ctx, rootMapName, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	patch(s.Namespace, `{"data":{"root-cert.pem":"forged","more":"kept"}}`)
	await("edited", s.Namespace)
	patch(s.Namespace, `{"data":{"root-cert.pem":null}}`)
	await("emptied", s.Namespace)
	// In another: what is taken back a third time is told of.
	patch(fresh, `{"metadata":{"labels":{"istio.io/config":null}}}`)
	await("without its label", fresh)
	kept("after the repairs")
	if err := s.Core.ConfigMaps(metav1.NamespaceSystem).Delete(ctx, rootMapName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	await("deleted", metav1.NamespaceSystem)

	// Nobody is here to empty a namespace that is deleted, so it stays as one that
	// goes does for a while.
	going := s.newNamespace("going")
	await("before it goes", going)
	if err := s.Core.Namespaces().Delete(ctx, going, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Core.ConfigMaps(going).Delete(ctx, rootMapName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}

	var made struct {
		ID string `json:"id"`
	}
	site.CLIJSON(&made, "root", "prepare", "--reason", "test")
	one := roots
	if roots = site.CLI("bundle", "show"); strings.Count(roots, "BEGIN") != 2 {
		t.Fatalf("the bundle is %s", roots)
	}
	everywhere("with a second root")
	site.CLI("root", "revoke", made.ID, "--yes", "--reason", "test")
	if roots = site.CLI("bundle", "show"); roots != one {
		t.Fatalf("the bundle is %s", roots)
	}
	everywhere("without it")
	if _, err := s.Core.ConfigMaps(going).Get(ctx, rootMapName, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a namespace that goes got the roots: %v", err)
	}
	if log := readFile(t, site.File("server.log")); strings.Contains(log, "namespaces can't have the roots") || strings.Contains(log, "somebody else keeps") {
		t.Error("there was trouble")
	}
}

// While the API server is away nothing is known, and what has changed meanwhile is
// put right after it.
func TestTheRootsOfTheMeshOutliveAnOutage(t *testing.T) {
	s := cluster.NewSpace(t)
	site := s.siteWith(t, append(slices.Clone(serverRules), rootMapRules...), keeping(t, "root_config_maps: true"))
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	behind := func(want bool) {
		t.Helper()
		if err := poll(ctx, site.Server.Done(), func() error {
			if n := harness.Metric(t, site.Ops, `assay_istio_root_config_maps{cluster="test",state="behind"}`); n > 0 != want {
				return fmt.Errorf("%v are behind", n)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	behind(false)
	s.Stop()
	behind(true)
	site.CLI("root", "prepare", "--reason", "test")
	roots := site.CLI("bundle", "show")
	s.Restart(t)
	if err := poll(ctx, site.Server.Done(), func() error {
		held, err := s.Core.ConfigMaps(s.Namespace).Get(ctx, rootMapName, metav1.GetOptions{})
		if err == nil && held.Data["root-cert.pem"] != roots {
			err = errors.New("the roots are the old ones")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	behind(false)
}

// An immutable ConfigMap can't be kept; the log says what to do about it.
func TestAnImmutableConfigMapIsTold(t *testing.T) {
	s := cluster.NewSpace(t)
	immutable := true
	if _, err := s.Core.ConfigMaps(s.Namespace).Create(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: rootMapName}, Immutable: &immutable, Data: map[string]string{"root-cert.pem": "istiod's"},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	site := s.siteWith(t, append(slices.Clone(serverRules), rootMapRules...), keeping(t, "root_config_maps: true"))
	site.Server.Eventually(time.Minute, "the log tells of it", func() error {
		if log := readFile(t, site.File("server.log")); !strings.Contains(log, "immutable, delete it") || !strings.Contains(log, "namespace="+s.Namespace) {
			return errors.New("not yet")
		}
		return nil
	})
	if err := s.Core.ConfigMaps(s.Namespace).Delete(t.Context(), rootMapName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	site.Server.Eventually(2*time.Minute, "it is there again", func() error {
		held, err := s.Core.ConfigMaps(s.Namespace).Get(t.Context(), rootMapName, metav1.GetOptions{})
		if err == nil && !strings.Contains(held.Data["root-cert.pem"], "BEGIN CERTIFICATE") {
			err = errors.New("not yet")
		}
		return err
	})
}

// Who may watch ConfigMaps by one name can't look at others.
func TestRightsToOneNameAreEnough(t *testing.T) {
	s := cluster.NewSpace(t)
	s.Account("narrow", rootMapRules...)
	client := s.as(t, s.Token("narrow", "", nil))
	for selector, want := range map[string]bool{"metadata.name=" + rootMapName: true, "metadata.name=assay-bundle": false, "": false} {
		_, err := client.ConfigMaps("").List(t.Context(), metav1.ListOptions{FieldSelector: selector})
		if got := err == nil; got != want || err != nil && !apierrors.IsForbidden(err) {
			t.Errorf("list %q: %v", selector, err)
		}
		w, err := client.ConfigMaps("").Watch(t.Context(), metav1.ListOptions{FieldSelector: selector})
		if got := err == nil; got != want || err != nil && !apierrors.IsForbidden(err) {
			t.Errorf("watch %q: %v", selector, err)
		}
		if err == nil {
			w.Stop()
		}
	}
	other, err := json.Marshal(map[string]any{"data": map[string]string{"a": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.ConfigMaps(s.Namespace).Patch(t.Context(), "assay-bundle", types.MergePatchType, other, metav1.PatchOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("patch another: %v", err)
	}
}

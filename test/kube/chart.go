//go:build kube

package kube

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
)

const chartDir = "../../deploy/helm/assay"

// kinds are those of the chart: the API and the name under which objects of them
// are made.
var kinds = map[string]struct{ api, plural string }{
	"ConfigMap":          {"/api/v1", "configmaps"},
	"Pod":                {"/api/v1", "pods"},
	"Secret":             {"/api/v1", "secrets"},
	"Service":            {"/api/v1", "services"},
	"ServiceAccount":     {"/api/v1", "serviceaccounts"},
	"DaemonSet":          {"/apis/apps/v1", "daemonsets"},
	"StatefulSet":        {"/apis/apps/v1", "statefulsets"},
	"NetworkPolicy":      {"/apis/networking.k8s.io/v1", "networkpolicies"},
	"Role":               {rbacAPI, "roles"},
	"RoleBinding":        {rbacAPI, "rolebindings"},
	"ClusterRole":        {rbacAPI, "clusterroles"},
	"ClusterRoleBinding": {rbacAPI, "clusterrolebindings"},
}

// istioNamespace is where values for a mesh have istiod.
const istioNamespace = "istio-system"

const rbacAPI = "/apis/rbac.authorization.k8s.io/v1"

// helm runs helm to its end.
func helm(t testing.TB, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	program := "../../out/kube/helm"
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: run make test-kube, which builds it", err)
	}
	cmd := exec.CommandContext(t.Context(), program, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Env = []string{"HOME=" + t.TempDir()} // whatever this user has of helm's
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// Render returns the chart's objects for the space's namespace, by a file of
// values and flags of helm.
func (s *Space) Render(values string, flags ...string) []*unstructured.Unstructured {
	s.t.Helper()
	args := append([]string{"template", "assay", chartDir, "--namespace", s.Namespace, "-f", values}, flags...)
	stdout, stderr, err := helm(s.t, args...)
	if err != nil {
		s.t.Fatalf("helm template: %v\n%s", err, stderr)
	}
	return decode(s.t, stdout)
}

// decode reads manifests.
func decode(t testing.TB, manifests string) []*unstructured.Unstructured {
	t.Helper()
	var all []*unstructured.Unstructured
	for d := yaml.NewYAMLOrJSONDecoder(bytes.NewReader([]byte(manifests)), 4096); ; {
		o := &unstructured.Unstructured{}
		err := d.Decode(&o.Object)
		switch {
		case errors.Is(err, io.EOF):
			return all
		case err != nil:
			t.Fatalf("read manifests: %v", err)
		case len(o.Object) > 0: // not just comments
			all = append(all, o)
		}
	}
}

// Apply makes an object as an administrator, with dry only up to where it would
// be stored. A field that the API server does not know is an error.
func (s *Space) Apply(o *unstructured.Unstructured, dry bool) error {
	s.t.Helper()
	data, err := o.MarshalJSON()
	if err != nil {
		s.t.Fatalf("encode %s %s: %v", o.GetKind(), o.GetName(), err)
	}
	r := s.Core.RESTClient().Post().AbsPath(s.path(o)).Param("fieldValidation", "Strict").SetHeader("Content-Type", "application/json").Body(data)
	if dry {
		return r.Param("dryRun", "All").Do(s.t.Context()).Error()
	}
	if err := r.Do(s.t.Context()).Error(); err != nil {
		return err
	}
	s.cleanup(o.GetKind(), func(ctx context.Context) error {
		return s.Core.RESTClient().Delete().AbsPath(s.path(o), o.GetName()).Do(ctx).Error()
	})
	return nil
}

// path is where objects of a kind are made: in no namespace, or in the space's.
func (s *Space) path(o *unstructured.Unstructured) string {
	s.t.Helper()
	kind, ok := kinds[o.GetKind()]
	if !ok || strings.TrimPrefix(strings.TrimPrefix(kind.api, "/apis/"), "/api/") != o.GetAPIVersion() {
		s.t.Fatalf("%s %s is not known to this test", o.GetAPIVersion(), o.GetKind())
	}
	if strings.HasPrefix(o.GetKind(), "Cluster") {
		return kind.api + "/" + kind.plural
	}
	if o.GetNamespace() != s.Namespace && o.GetNamespace() != istioNamespace {
		s.t.Fatalf("%s %s is in the namespace %q, not in %q", o.GetKind(), o.GetName(), o.GetNamespace(), s.Namespace)
	}
	return kind.api + "/namespaces/" + o.GetNamespace() + "/" + kind.plural
}

package test

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"text/template"

	"github.com/goccy/go-yaml"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	mesh "istio.io/api/mesh/v1alpha1"
	security "istio.io/api/security/v1beta1"
)

const istioDir = "../deploy/istio"

// istioValues is what we look at of values for Istio's charts.
type istioValues struct {
	Profile string
	Global  struct {
		CAAddress    string `yaml:"caAddress"`
		MultiCluster struct {
			ClusterName string `yaml:"clusterName"`
		} `yaml:"multiCluster"`
	}
	MeshConfig             map[string]any `yaml:"meshConfig"`
	Pilot                  struct{ Env map[string]string }
	SidecarInjectorWebhook struct {
		DefaultTemplates []string `yaml:"defaultTemplates"`
		Templates        map[string]string
	} `yaml:"sidecarInjectorWebhook"`
}

func decodeStrict(t *testing.T, file string, into any) {
	t.Helper()
	if err := yaml.UnmarshalWithOptions([]byte(read(t, filepath.Join(istioDir, file))), into, yaml.Strict()); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// asIstio reads a part of a file into Istio's own type, which refuses a field that it
// does not know.
func asIstio(t *testing.T, file string, part any, into proto.Message) {
	t.Helper()
	text, err := json.Marshal(part)
	if err != nil {
		t.Fatal(err)
	}
	if err := protojson.Unmarshal(text, into); err != nil {
		t.Errorf("%s: %v", file, err)
	}
}

// The configuration for Istio's charts says what docs/istio.md says of it: one CA, no
// other, by the same name and in the same trust domain everywhere.
func TestValuesForIstio(t *testing.T) {
	const address = "assay-server.assay.svc:8444"
	for _, file := range []string{"istiod-csr.yaml", "istiod-sds.yaml", "istiod-ambient.yaml"} {
		var values istioValues
		decodeStrict(t, file, &values)
		var config mesh.MeshConfig
		asIstio(t, file, values.MeshConfig, &config)
		if config.GetTrustDomain() != "example.org" || values.Global.CAAddress != address || values.Global.MultiCluster.ClusterName != "Kubernetes" {
			t.Errorf("%s: %+v", file, values)
		}
		if values.Pilot.Env["ENABLE_CA_SERVER"] != "false" {
			t.Errorf("%s: istiod stays a CA", file)
		}
		if (values.Profile == "ambient") != (file == "istiod-ambient.yaml") {
			t.Errorf("%s has profile %q", file, values.Profile)
		}
	}
	var ztunnel struct {
		CAAddress    string `yaml:"caAddress"`
		MultiCluster struct {
			ClusterName string `yaml:"clusterName"`
		} `yaml:"multiCluster"`
	}
	decodeStrict(t, "ztunnel.yaml", &ztunnel)
	if ztunnel.CAAddress != address || ztunnel.MultiCluster.ClusterName != "Kubernetes" {
		t.Errorf("ztunnel.yaml: %+v", ztunnel)
	}
}

// The template gives the proxy the agent's directory, whichever kind of sidecar it is:
// read-only, and by a name of its own, so that there is no falling back.
func TestTheTemplateForTheSocket(t *testing.T) {
	var values istioValues
	decodeStrict(t, "istiod-sds.yaml", &values)
	if got := strings.Join(values.SidecarInjectorWebhook.DefaultTemplates, ","); got != "sidecar,assay" {
		t.Errorf("pods are injected with %s", got)
	}
	// As Istio's injector has them.
	funcs := template.FuncMap{"contains": func(part, s string) bool { return strings.Contains(s, part) }, "default": func(fallback, value string) string {
		if value == "" {
			return fallback
		}
		return value
	}}
	parsed, err := template.New("assay").Funcs(funcs).Parse(values.SidecarInjectorWebhook.Templates["assay"])
	if err != nil {
		t.Fatal(err)
	}
	type container struct {
		Name         string
		Env          []struct{ Name, Value string }
		VolumeMounts []struct {
			Name      string
			MountPath string `yaml:"mountPath"`
			ReadOnly  bool   `yaml:"readOnly"`
		} `yaml:"volumeMounts"`
	}
	type pod struct {
		Spec struct {
			InitContainers []container `yaml:"initContainers"`
			Containers     []container
			Volumes        []struct {
				Name     string
				EmptyDir *struct{}                   `yaml:"emptyDir"`
				HostPath struct{ Path, Type string } `yaml:"hostPath"`
			}
		}
	}
	for _, c := range []struct {
		native     bool
		annotation string
		templates  string
		init       bool
	}{
		{true, "", "", true},
		{false, "", "", false},
		{true, "false", "", false},
		{false, "true", "", true},
		{true, "", "sidecar,assay", true},
		{true, "", "gateway,assay", false}, // a gateway's proxy is never an init container
	} {
		var data struct {
			NativeSidecars bool
			ObjectMeta     struct{ Annotations map[string]string }
		}
		data.NativeSidecars = c.native
		data.ObjectMeta.Annotations = map[string]string{"sidecar.istio.io/nativeSidecar": c.annotation, "inject.istio.io/templates": c.templates}
		var text bytes.Buffer
		if err := parsed.Execute(&text, data); err != nil {
			t.Fatal(err)
		}
		var patch pod
		if err := yaml.UnmarshalWithOptions(text.Bytes(), &patch, yaml.Strict()); err != nil {
			t.Fatalf("%v\n%s", err, text.String())
		}
		in := patch.Spec.Containers
		if c.init {
			in = patch.Spec.InitContainers
		}
		if len(in) != 1 || len(patch.Spec.Containers)+len(patch.Spec.InitContainers) != 1 || in[0].Name != "istio-proxy" {
			t.Fatalf("%+v: %s", c, text.String())
		}
		if env := in[0].Env; len(env) != 1 || env[0].Name != "WORKLOAD_IDENTITY_SOCKET_FILE" || env[0].Value != "sds.sock" {
			t.Errorf("%+v: %+v", c, env)
		}
		mounts, volumes := in[0].VolumeMounts, patch.Spec.Volumes
		if len(mounts) != 1 || !mounts[0].ReadOnly || mounts[0].MountPath != "/var/run/secrets/workload-spiffe-uds" ||
			len(volumes) != 1 || volumes[0].Name != mounts[0].Name || volumes[0].HostPath.Path != "/run/assay/public" {
			t.Errorf("%+v: %+v, %+v", c, mounts, volumes)
		}
	}
	if !strings.Contains(read(t, "../deploy/helm/assay/values.yaml"), "socketDir: /run/assay/public\n") {
		t.Error("the chart has the sockets elsewhere")
	}
}

// The policies are ones that Istio knows.
func TestPoliciesForIstio(t *testing.T) {
	type object struct {
		APIVersion string `yaml:"apiVersion"`
		Kind       string
		Metadata   struct{ Name, Namespace string }
		Spec       map[string]any
	}
	var strict, allow object
	decodeStrict(t, "strict.yaml", &strict)
	decodeStrict(t, "authorization.yaml", &allow)
	var peers security.PeerAuthentication
	asIstio(t, "strict.yaml", strict.Spec, &peers)
	if peers.GetMtls().GetMode() != security.PeerAuthentication_MutualTLS_STRICT || strict.Metadata.Namespace != "istio-system" || peers.GetSelector() != nil {
		t.Errorf("strict.yaml is not STRICT for the whole mesh: %+v", strict)
	}
	var policy security.AuthorizationPolicy
	asIstio(t, "authorization.yaml", allow.Spec, &policy)
	from := policy.GetRules()[0].GetFrom()[0].GetSource()
	if policy.GetAction() != security.AuthorizationPolicy_ALLOW || strings.Join(from.GetPrincipals(), " ") != "example.org/ns/shop/sa/web" {
		t.Errorf("authorization.yaml: %+v", allow)
	}
	for _, o := range []object{strict, allow} {
		if o.APIVersion != "security.istio.io/v1" {
			t.Errorf("%s is of %s", o.Kind, o.APIVersion)
		}
	}
}

// Each file is in the guide.
func TestTheGuideNamesEachFileForIstio(t *testing.T) {
	files, err := filepath.Glob(istioDir + "/*")
	if err != nil || len(files) < 7 {
		t.Fatalf("%v, %v", files, err)
	}
	guide := read(t, "../docs/istio.md")
	for _, file := range files {
		if !strings.Contains(guide, "deploy/istio/"+filepath.Base(file)) {
			t.Errorf("%s is not in docs/istio.md", file)
		}
	}
}

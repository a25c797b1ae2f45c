//go:build kube

package kube

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"github.com/seed-caa81108/assay/test/harness"
)

// find is the object of that kind and name.
func find(t testing.TB, all []*unstructured.Unstructured, kind, name string) *unstructured.Unstructured {
	t.Helper()
	i := slices.IndexFunc(all, func(o *unstructured.Unstructured) bool { return o.GetKind() == kind && o.GetName() == name })
	if i < 0 {
		t.Fatalf("there is no %s %s", kind, name)
	}
	return all[i]
}

// text is a field that is a string.
func text(t testing.TB, o *unstructured.Unstructured, fields ...string) string {
	t.Helper()
	s, ok, err := unstructured.NestedString(o.Object, fields...)
	if !ok || err != nil {
		t.Fatalf("%s %s has no %s: %v", o.GetKind(), o.GetName(), strings.Join(fields, "."), err)
	}
	return s
}

// Every set of values is good for helm, for the API server, and for the programs
// that read the configuration.
func TestTheChartIsAccepted(t *testing.T) {
	files, err := filepath.Glob(chartDir + "/ci/*.yaml")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d files of values, %v", len(files), err)
	}
	s := cluster.NewSpace(t)
	if _, err := s.Core.Namespaces().Patch(t.Context(), s.Namespace, types.MergePatchType,
		[]byte(`{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":"restricted"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Core.Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: istioNamespace}}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			if stdout, stderr, err := helm(t, "lint", "--strict", chartDir, "-f", file); err != nil {
				t.Errorf("helm lint: %v\n%s%s", err, stdout, stderr)
			}
			all := s.Render(file)
			for _, o := range all {
				if err := s.Apply(o, true); err != nil {
					t.Errorf("%s %s: %v", o.GetKind(), o.GetName(), err)
				}
			}
			site := harness.NewSite(t, bins, "")
			serves := strings.TrimSuffix(filepath.Base(file), ".yaml") != "agents"
			for _, daemon := range []string{"server", "agent"} {
				if daemon == "server" && !serves {
					continue
				}
				config := site.Write(daemon+".yaml", text(t, find(t, all, "ConfigMap", "assay-"+daemon), "data", daemon+".yaml"))
				site.Run("assay-"+daemon, "validate", "--config", config)
			}
			if held := find(t, all, "ConfigMap", "assay-bundle"); held.Object["data"] != nil {
				t.Error("the chart has data for the trust bundle: an upgrade would take the server's away")
			}
			// The server's pod is held to the strictest standard that Kubernetes has,
			// except where a container of root's prepares the volume.
			if serves {
				pod := podOf(t, find(t, all, "StatefulSet", "assay-server"))
				err := s.Apply(pod, true)
				if prepared := strings.Contains(fmt.Sprint(pod.Object), "initContainers"); prepared != (err != nil && strings.Contains(err.Error(), "PodSecurity")) {
					t.Errorf("the server's pod by the standard restricted: %v", err)
				}
			}
			if err := s.Apply(podOf(t, find(t, all, "DaemonSet", "assay-agent")), true); err == nil {
				t.Error("the agent's pod passes the standard restricted: then the standard is not enforced here")
			}
		})
	}
}

// podOf is a pod as a controller would make it. There is no controller here that
// makes the claims of a StatefulSet, and no priorities of a cluster's own.
func podOf(t testing.TB, o *unstructured.Unstructured) *unstructured.Unstructured {
	t.Helper()
	template, _, err := unstructured.NestedMap(o.Object, "spec", "template")
	if err != nil {
		t.Fatal(err)
	}
	pod := &unstructured.Unstructured{Object: template}
	pod.SetAPIVersion("v1")
	pod.SetKind("Pod")
	pod.SetName(o.GetName())
	pod.SetNamespace(o.GetNamespace())
	unstructured.RemoveNestedField(pod.Object, "spec", "priorityClassName")
	if o.GetKind() == "StatefulSet" {
		volumes, _, err := unstructured.NestedSlice(pod.Object, "spec", "volumes")
		if err != nil {
			t.Fatal(err)
		}
		volumes = append(volumes, map[string]any{"name": "data", "persistentVolumeClaim": map[string]any{"claimName": "data"}})
		if err := unstructured.SetNestedSlice(pod.Object, volumes, "spec", "volumes"); err != nil {
			t.Fatal(err)
		}
	}
	return pod
}

// The manifests for those without helm are accepted as well. That they are the
// chart's is checked by make manifests-check.
func TestPlainManifestsAreAccepted(t *testing.T) {
	s := cluster.NewSpace(t)
	manifests, err := os.ReadFile("../../deploy/kubernetes/assay.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range decode(t, strings.ReplaceAll(string(manifests), "namespace: assay\n", "namespace: "+s.Namespace+"\n")) {
		if err := s.Apply(o, true); err != nil {
			t.Errorf("%s %s: %v", o.GetKind(), o.GetName(), err)
		}
	}
}

// What the chart can't honour is refused before anything is sent.
func TestTheChartRefuses(t *testing.T) {
	must := []string{"trustDomain=example.org", "bootstrap=2026-11-23", "server.sealKey.existingSecret=seal"}
	template := func(sets ...string) (stdout, stderr string, err error) {
		args := []string{"template", "assay", chartDir}
		for _, set := range sets {
			args = append(args, "--set", set)
		}
		return helm(t, args...)
	}
	if _, stderr, err := template(must...); err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	for i, set := range must {
		key, _, _ := strings.Cut(set, "=")
		want := "'" + key[strings.LastIndex(key, ".")+1:] + "'"
		stdout, stderr, err := template(slices.Delete(slices.Clone(must), i, i+1)...)
		if err == nil || stdout != "" || !strings.Contains(stderr, "missing propert") || !strings.Contains(stderr, want) {
			t.Errorf("without %s: %v\n%s", key, err, stderr)
		}
	}
	for set, want := range map[string]string{
		"trustDomain=":                                     "at '/trustDomain'",
		"trustDomain=spiffe://example.org":                 "at '/trustDomain'",
		"trustDomain=Example.org":                          "at '/trustDomain'",
		"bootstrap=today":                                  "at '/bootstrap'",
		"bootstrap=20261123":                               "at '/bootstrap': got number, want string",
		"server.sealKey.existingSecret=":                   "at '/server/sealKey/existingSecret'",
		"trust_domain=example.org":                         "additional properties 'trust_domain' not allowed",
		"server.replicas=3":                                "additional properties 'replicas' not allowed",
		"agent.hostPath=/x":                                "additional properties 'hostPath' not allowed",
		"agent.privileged=perhaps":                         "at '/agent/privileged': got string, want boolean",
		"agent.socketDir=run":                              "at '/agent/socketDir'",
		"agent.maxUnavailable=0":                           "at '/agent/maxUnavailable'",
		"agent.tolerations=all":                            "at '/agent/tolerations': got string, want array",
		"networkPolicy.enabled=1":                          "at '/networkPolicy/enabled': got number, want boolean",
		"server.service.type=ExternalName":                 "at '/server/service/type'",
		"server.storage.size=much":                         "at '/server/storage/size'",
		"server.config=x":                                  "at '/server/config': got string, want object",
		"cluster=a/b":                                      "at '/cluster'",
		"server.enabled=false":                             "at '/agent/serverAddress': minLength",
		"agent.serverAddress=assay":                        "at '/agent/serverAddress'",
		"server.otherClusters.us1=secret":                  "at '/server/otherClusters/us1': got string, want object",
		"server.otherClusters.us1.x=y":                     "at '/server/otherClusters/us1': missing property 'existingSecret'",
		"server.otherClusters.kubernetes.existingSecret=a": "which is this cluster's own name",
		"istio.enabled=yes":                                "at '/istio/enabled': got string, want boolean",
		"istio.istiodSecret=istiod-tls":                    "at '/istio/istiodSecret'",
		"istio.trustedNodeAccounts[0]=a":                   "at '/istio/trustedNodeAccounts/0'",
		"istio.dns_names[0]=a":                             "additional properties 'dns_names' not allowed",
	} {
		stdout, stderr, err := template(append(slices.Clone(must), set)...)
		if err == nil || stdout != "" || !strings.Contains(stderr, want) {
			t.Errorf("%s: %v\n%s", set, err, stderr)
		}
	}
}

// Agents alone are agents alone, with what a server elsewhere needs.
func TestTheChartWithoutAServer(t *testing.T) {
	stdout, stderr, err := helm(t, "template", "assay", chartDir, "-f", chartDir+"/ci/agents.yaml")
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	all := decode(t, stdout)
	var got []string
	for _, o := range all {
		got = append(got, o.GetKind()+" "+o.GetName())
	}
	slices.Sort(got)
	if want := []string{
		"ClusterRole assay-server", "ClusterRoleBinding assay-server", "ConfigMap assay-agent", "ConfigMap assay-bundle", "DaemonSet assay-agent",
		"NetworkPolicy assay-agent", "Role assay-server", "RoleBinding assay-server", "ServiceAccount assay-agent", "ServiceAccount assay-server",
	}; !slices.Equal(got, want) {
		t.Errorf("there are %q, want %q", got, want)
	}
	if config := text(t, find(t, all, "ConfigMap", "assay-agent"), "data", "agent.yaml"); !strings.Contains(config, "- assay.example.org:8443\n") || strings.Contains(config, ".svc") {
		t.Errorf("the agents look for the server elsewhere:\n%s", config)
	}
}

// What is for a mesh is not there without one, each part of it only if it is wanted.
func TestTheChartHasForAMeshWhatIsWanted(t *testing.T) {
	render := func(flags ...string) string {
		t.Helper()
		args := []string{"template", "assay", chartDir, "-f", chartDir + "/ci/minimal.yaml"}
		for _, flag := range flags {
			args = append(args, "--set", flag)
		}
		stdout, stderr, err := helm(t, args...)
		if err != nil {
			t.Fatalf("%v\n%s", err, stderr)
		}
		return stdout
	}
	site := harness.NewSite(t, bins, "")
	stdout, stderr, err := helm(t, "template", "assay", chartDir, "-f", chartDir+"/ci/minimal.yaml", "-f", "../../deploy/istio/assay.yaml")
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	guide := decode(t, stdout)
	site.Run("assay-server", "validate", "--config", site.Write("server.yaml", text(t, find(t, guide, "ConfigMap", "assay-server"), "data", "server.yaml")))
	find(t, guide, "Role", "assay-server-istiod")
	const listener, roots, secrets, made = "8444", "istio-ca-root-cert", "secrets]", "kind: Secret"
	for _, c := range []struct {
		flags     []string
		has, lack []string
	}{
		{nil, nil, []string{listener, roots, secrets, made, "istio"}},
		{[]string{"istio.rootConfigMaps=true", "istio.istiodSecret=istio-system/istiod-tls"}, nil, []string{listener, roots, secrets, made, "istio"}},
		{[]string{"istio.enabled=true"}, []string{listener, "- assay-server.default.svc", "root_config_maps: false"}, []string{roots, secrets, made, "istiod_secret"}},
		{[]string{"istio.enabled=true", "istio.rootConfigMaps=true"}, []string{roots, "root_config_maps: true"}, []string{secrets, made}},
		{[]string{"istio.enabled=true", "istio.istiodSecret=mesh/tls"}, []string{secrets, made, "resourceNames: [tls]", "namespace: mesh", "istiod_secret: mesh/tls"}, []string{roots}},
		{[]string{"istio.enabled=true", "networkPolicy.enabled=false"}, []string{listener}, []string{"namespaceSelector"}},
	} {
		got := render(c.flags...)
		for _, want := range c.has {
			if !strings.Contains(got, want) {
				t.Errorf("%v: there is no %s", c.flags, want)
			}
		}
		for _, never := range c.lack {
			if strings.Contains(got, never) {
				t.Errorf("%v: there is %s", c.flags, never)
			}
		}
	}
}

// helm runs helm against the space's cluster.
func (s *Space) helm(t testing.TB, args ...string) {
	t.Helper()
	if stdout, stderr, err := helm(t, append(args, "--kubeconfig", s.Kubeconfig(s.AdminToken), "--namespace", s.Namespace)...); err != nil {
		t.Fatalf("helm %s: %v\n%s%s", args[0], err, stdout, stderr)
	}
}

// An upgrade leaves the trust bundle that the server wrote, and what is removed
// is what was installed.
func TestAnUpgradeKeepsTheBundle(t *testing.T) {
	s := cluster.NewSpace(t)
	run := func(args ...string) { t.Helper(); s.helm(t, args...) }
	values := chartDir + "/ci/minimal.yaml"
	run("install", "assay", chartDir, "-f", values)
	held, err := s.Core.ConfigMaps(s.Namespace).Get(t.Context(), "assay-bundle", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	held.Data = map[string]string{"bundle.crt": "roots"}
	if _, err := s.Core.ConfigMaps(s.Namespace).Update(t.Context(), held, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	run("upgrade", "assay", chartDir, "-f", values, "--set", "bootstrap=", "--set", "image.tag=v2")
	held, err = s.Core.ConfigMaps(s.Namespace).Get(t.Context(), "assay-bundle", metav1.GetOptions{})
	if err != nil || held.Data["bundle.crt"] != "roots" {
		t.Errorf("after an upgrade: %v, %v", held.Data, err)
	}
	if got := held.Labels["app.kubernetes.io/version"]; got != "v2" {
		t.Errorf("the upgrade left the version %q", got)
	}
	run("uninstall", "assay")
	for _, o := range s.Render(values) {
		err := s.Core.RESTClient().Get().AbsPath(s.path(o), o.GetName()).Do(t.Context()).Error()
		if !apierrors.IsNotFound(err) {
			t.Errorf("%s %s is left: %v", o.GetKind(), o.GetName(), err)
		}
	}
}

// release is the chart with a mesh in a space, and what istiod's Secret has to be.
type release struct {
	t      *testing.T
	s      *Space
	values []string // without the release's name
	how    []string // flags of helm
	held   *corev1.Secret
}

// eachWayOfHelm runs a test with a helm that has the API server merge, and with one
// that merges itself.
func eachWayOfHelm(t *testing.T, test func(*release)) {
	for name, how := range map[string][]string{
		"applied by the API server": nil,
		"merged by helm":            {"--server-side=false"},
	} {
		t.Run(name, func(t *testing.T) {
			s := cluster.NewSpace(t)
			test(&release{t: t, s: s, values: append([]string{chartDir, "-f", chartDir + "/ci/minimal.yaml"}, s.withMesh()...), how: how})
		})
	}
}

// run runs install or upgrade.
func (r *release) run(what, name string, flags ...string) {
	r.t.Helper()
	r.s.helm(r.t, slices.Concat([]string{what}, r.how, []string{name}, r.values, flags)...)
}

func (r *release) get() *corev1.Secret {
	r.t.Helper()
	held, err := r.s.Core.Secrets(r.s.Namespace).Get(r.t.Context(), "istiod-tls", metav1.GetOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	return held
}

// write does to the Secret what the server does.
func (r *release) write() {
	r.t.Helper()
	r.held = r.get()
	r.held.Data = maps.Clone(noCertificate)
	metav1.SetMetaDataAnnotation(&r.held.ObjectMeta, "helm.sh/resource-policy", "keep")
	if _, err := r.s.Core.Secrets(r.s.Namespace).Update(r.t.Context(), r.held, metav1.UpdateOptions{}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *release) delete() {
	r.t.Helper()
	if err := r.s.Core.Secrets(r.s.Namespace).Delete(r.t.Context(), "istiod-tls", metav1.DeleteOptions{}); err != nil {
		r.t.Fatal(err)
	}
}

// stands wants the Secret to be the one that was written, with its data.
func (r *release) stands(after string) {
	r.t.Helper()
	if is := r.get(); is.UID != r.held.UID || string(is.Data["tls.key"]) != "none" || string(is.Data["tls.crt"]) != "none" {
		r.t.Errorf("after %s: %v", after, is)
	}
}

// istiod's Secret is made for the server, which writes into it. Upgrades leave what
// it wrote; so does the end of the release, and the next one begins with it.
func TestHelmLeavesIstiodsSecretAlone(t *testing.T) {
	eachWayOfHelm(t, func(r *release) {
		r.run("install", "assay")
		if made := r.get(); made.Type != corev1.SecretTypeOpaque || len(made.Data) > 0 {
			r.t.Fatalf("made: %v", made)
		}
		r.write()
		r.run("upgrade", "assay", "--set", "bootstrap=", "--set", "image.tag=v2")
		r.stands("an upgrade")
		r.run("upgrade", "assay", "--set", "image.tag=v2", "--set", "istio.istiodSecret=")
		r.stands("an upgrade without it")
		r.run("upgrade", "assay", "--set", "image.tag=v3")
		r.stands("one that has it again")
		r.s.helm(r.t, "uninstall", "assay")
		r.stands("the end of the release")
		r.run("install", "assay")
		r.stands("the next release")
		r.s.helm(r.t, "uninstall", "assay")
		r.delete()
		r.run("install", "assay")
		r.write()
		r.s.helm(r.t, "uninstall", "assay")
		r.run("install", "second")
		r.stands("a release of another name")
		r.s.helm(r.t, "uninstall", "second")
		r.stands("the end of that")
	})
}

// One that was deleted is made by the next upgrade, or by hand as the documentation
// says; and one that somebody else has made stays as it is.
func TestHelmLeavesIstiodsSecretAloneHoweverItWasMade(t *testing.T) {
	eachWayOfHelm(t, func(r *release) {
		r.run("install", "assay")
		r.delete()
		r.run("upgrade", "assay")
		r.write()
		r.run("upgrade", "assay")
		r.stands("an upgrade of a new one")

		r.delete()
		r.s.makeSecret(r.t, corev1.SecretTypeOpaque, nil)
		r.write()
		r.run("upgrade", "assay")
		r.stands("an upgrade of one that was made by hand")
		r.s.helm(r.t, "uninstall", "assay")
		r.stands("the end of a release that had one")

		// Of its own type, which can't be changed.
		r.delete()
		r.s.makeSecret(r.t, corev1.SecretTypeTLS, noCertificate)
		r.held = r.get()
		r.run("install", "assay")
		r.run("upgrade", "assay")
		r.stands("an upgrade beside one that was there")
		r.s.helm(r.t, "uninstall", "assay")
		r.stands("the end of a release beside it")
	})
}

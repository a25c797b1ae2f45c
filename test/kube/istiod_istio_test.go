//go:build kube && istio

package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	istiov1 "istio.io/api/security/v1alpha1"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/seed-caa81108/assay/test/harness"
)

const istioCharts = "../../out/kube/istio-charts/"

// istio renders a chart of Istio's with values of ours, for the space.
func (s *Space) istio(chart, values string) []*unstructured.Unstructured {
	s.t.Helper()
	stdout, stderr, err := helm(s.t, "template", "istio", istioCharts+chart, "--namespace", s.Namespace, "-f", "../../deploy/istio/"+values,
		"--set", "global.istioNamespace="+s.Namespace)
	if err != nil {
		s.t.Fatalf("helm template: %v\n%s", err, stderr)
	}
	return decode(s.t, stdout)
}

// environment is that of a workload's first container, as far as it is in the chart.
func environment(t testing.TB, o *unstructured.Unstructured) []string {
	t.Helper()
	containers, _, err := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "containers")
	if err != nil || len(containers) == 0 {
		t.Fatalf("%s has no containers: %v", o.GetName(), err)
	}
	var container corev1.Container
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(containers[0].(map[string]any), &container); err != nil {
		t.Fatal(err)
	}
	var env []string
	for _, v := range container.Env {
		if v.ValueFrom == nil {
			env = append(env, v.Name+"="+v.Value)
		}
	}
	return env
}

// istiod is Istio's control plane, as its chart configures it, with the space as its
// namespace.
type istiod struct {
	place
	*harness.Process
	m                  *mesh
	xds, webhooks, web int
}

// istiod starts istiod with values of ours.
func (m *mesh) istiod(values string) *istiod {
	m.t.Helper()
	all := m.istio("istio-control/istio-discovery", values)
	for _, name := range []string{"istio", "istio-sidecar-injector"} {
		if err := m.Apply(find(m.t, all, "ConfigMap", name), false); err != nil {
			m.t.Fatal(err)
		}
	}
	m.knowIstio()
	var ports harness.Ports
	i := &istiod{place: newPlace(m.t), m: m, xds: ports.Free(m.t), webhooks: ports.Free(m.t), web: ports.Free(m.t)}
	i.mount()
	env := append(environment(m.t, find(m.t, all, "Deployment", "istiod")), "POD_NAME=istiod-1", "POD_NAMESPACE="+m.Namespace, "SERVICE_ACCOUNT=istiod")
	on := func(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }
	i.Process = i.start("pilot-discovery", env, "discovery", "--kubeconfig="+m.Kubeconfig(m.AdminToken),
		"--httpAddr="+on(i.web), "--httpsAddr="+on(i.webhooks), "--secureGRPCAddr="+on(i.xds), "--grpcAddr=",
		"--monitoringAddr="+on(ports.Free(m.t)), "--ctrlz_address=127.0.0.1", fmt.Sprintf("--ctrlz_port=%d", ports.Free(m.t)))
	i.Eventually(2*time.Minute, "istiod is ready", func() error {
		resp, err := http.Get("http://" + on(i.web) + "/ready")
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
	return i
}

// knowIstio gives Istio's kinds to the API server, for good.
func (s *Space) knowIstio() {
	s.t.Helper()
	crds, err := os.ReadFile(istioCharts + "base/files/crd-all.gen.yaml")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, o := range decode(s.t, string(crds)) {
		data, err := o.MarshalJSON()
		if err == nil {
			err = s.Core.RESTClient().Post().AbsPath("/apis/apiextensions.k8s.io/v1/customresourcedefinitions").
				SetHeader("Content-Type", "application/json").Body(data).Do(s.t.Context()).Error()
		}
		if err != nil && !apierrors.IsAlreadyExists(err) {
			s.t.Fatalf("%s: %v", o.GetName(), err)
		}
	}
}

// mount puts what is kept for istiod where its kubelet would, and returns the
// certificate.
func (i *istiod) mount() *x509.Certificate {
	i.t.Helper()
	c := &control{Space: i.m.Space, t: i.t, ctx: i.t.Context(), site: i.m.site}
	var pair *tls.Certificate
	var secret *corev1.Secret
	i.m.site.Server.Eventually(time.Minute, "istiod's Secret", func() (err error) {
		pair, secret, err = c.held()
		return err
	})
	i.put("var/run/secrets/istiod/ca/root-cert.pem", i.m.roots())
	for name, content := range secret.Data {
		i.put("var/run/secrets/istiod/tls/"+name, string(content))
	}
	return pair.Leaf
}

// name is what istiod is called in its cluster.
func (i *istiod) name() string { return "istiod." + i.m.Namespace + ".svc" }

func (i *istiod) trust() *tls.Config {
	i.t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(i.m.roots()))
	return &tls.Config{RootCAs: roots, ServerName: i.name(), MinVersion: tls.VersionTLS12}
}

// serves says whether a certificate is on both ports of istiod's.
func (i *istiod) serves(cert *x509.Certificate) error {
	for _, port := range []int{i.xds, i.webhooks} {
		conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), i.trust())
		if err != nil {
			return err
		}
		_ = conn.Close()
		if held := conn.ConnectionState().PeerCertificates[0]; !held.Equal(cert) {
			return fmt.Errorf("it is %x that ends at %v", held.SerialNumber, held.NotAfter)
		}
	}
	return nil
}

// clusters asks for clusters as Envoy does, and returns how many there are.
func (m *mesh) clusters(conn *grpc.ClientConn, node string) (int, error) {
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx, grpc.WaitForReady(true))
	if err != nil {
		return 0, err
	}
	metadata, err := structpb.NewStruct(map[string]any{"NAMESPACE": m.Namespace, "CLUSTER_ID": "Kubernetes", "ISTIO_VERSION": "1.31.0"})
	if err != nil {
		return 0, err
	}
	if err := stream.Send(&discoveryv3.DiscoveryRequest{
		TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster", Node: &corev3.Node{Id: node, Metadata: metadata},
	}); err != nil {
		return 0, err
	}
	resp, err := stream.Recv()
	return len(resp.GetResources()), err
}

// IS-01, IS-02, IS-04: istiod that is no CA serves with the certificate that the
// server keeps for it, takes another without a restart, and believes proxies by their
// tokens and by their certificates.
func TestIstiodServesWithWhatIsKeptForIt(t *testing.T) {
	m := keptMesh(t)
	i := m.istiod("istiod-csr.yaml")
	first := i.mount()
	i.Eventually(time.Minute, "istiod has the certificate", func() error {
		first = i.mount()
		return i.serves(first)
	})
	tlsTo := func(own ...tls.Certificate) credentials.TransportCredentials {
		config := i.trust()
		config.Certificates = own
		return credentials.NewTLS(config)
	}
	target := fmt.Sprintf("127.0.0.1:%d", i.xds)
	ca := istiov1.NewIstioCertificateServiceClient(dial(t, target, tlsTo()))
	if _, err := ca.CreateCertificate(t.Context(), &istiov1.IstioCertificateRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("istiod, asked for a certificate: %v", err)
	}

	m.Account("sleep")
	pod := m.Run(Pod{Name: "sleep-1", Node: m.Node("a").Name, Account: "sleep"})
	a := m.istioAgent(pod, i.xds, func(place) {}, "ISTIOD_SAN="+i.name())
	svid := a.svid("socket", anySVID)
	if n, err := m.clusters(dial(t, "unix://"+a.path(xdsSocket), insecure.NewCredentials()), a.node); err != nil || n == 0 {
		t.Errorf("by its agent the proxy has %d clusters: %v", n, err)
	}
	own := tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, cert := range svid.Certificates {
		own.Certificate = append(own.Certificate, cert.Raw)
	}
	if n, err := m.clusters(dial(t, target, tlsTo(own)), a.node); err != nil || n == 0 {
		t.Errorf("with its certificate the proxy has %d clusters: %v", n, err)
	}
	if _, err := m.clusters(dial(t, target, tlsTo()), a.node); status.Code(err) != codes.Unauthenticated {
		t.Errorf("without token and certificate: %v", err)
	}

	var next *x509.Certificate
	m.site.Server.Eventually(3*time.Minute, "istiod's certificate is renewed", func() error {
		if next = i.mount(); next.Equal(first) {
			return errors.New("it is the first")
		}
		return nil
	})
	i.Eventually(time.Minute, "istiod has the other certificate", func() error {
		next = i.mount()
		return i.serves(next)
	})
}

// inject has istiod's webhook look at a pod, and returns what it makes of it.
func (i *istiod) inject(pod *corev1.Pod) *corev1.Pod {
	i.t.Helper()
	raw, err := json.Marshal(pod)
	if err != nil {
		i.t.Fatal(err)
	}
	review, err := json.Marshal(&admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"},
		Request: &admissionv1.AdmissionRequest{
			UID: "1", Kind: metav1.GroupVersionKind{Version: "v1", Kind: "Pod"}, Namespace: pod.Namespace, Operation: admissionv1.Create,
			Object: runtime.RawExtension{Raw: raw},
		},
	})
	if err != nil {
		i.t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: i.trust()}}
	defer client.CloseIdleConnections()
	resp, err := client.Post(fmt.Sprintf("https://127.0.0.1:%d/inject", i.webhooks), "application/json", bytes.NewReader(review))
	if err != nil {
		i.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var answer admissionv1.AdmissionReview
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Response == nil || !answer.Response.Allowed {
		i.t.Fatalf("%s: %v %v", resp.Status, err, answer.Response)
	}
	patch, err := jsonpatch.DecodePatch(answer.Response.Patch)
	if err == nil {
		raw, err = patch.Apply(raw)
	}
	made := &corev1.Pod{}
	if err == nil {
		err = json.Unmarshal(raw, made)
	}
	if err != nil {
		i.t.Fatal(err)
	}
	return made
}

// proxyOf is the container of Istio's in a pod, which has to have one alone.
func proxyOf(t *testing.T, pod *corev1.Pod) corev1.Container {
	t.Helper()
	var proxies []corev1.Container
	for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
		if c.Name == "istio-proxy" {
			proxies = append(proxies, c)
		}
	}
	if len(proxies) != 1 {
		t.Fatalf("there are %d containers istio-proxy", len(proxies))
	}
	return proxies[0]
}

// valueOf is a variable of a container's environment.
func valueOf(c corev1.Container, name string) string {
	for _, v := range c.Env {
		if v.Name == name {
			return v.Value
		}
	}
	return ""
}

// What istiod makes of pods by the values for SDS: each proxy has the agent's
// directory, read-only, and takes no other socket than Assay's.
func TestIstiodGivesProxiesTheAgentsSocket(t *testing.T) {
	m := keptMesh(t)
	i := m.istiod("istiod-sds.yaml")
	m.Account("web")
	app := corev1.Container{Name: "app", Image: "registry.example/app:1"}
	for what, c := range map[string]struct {
		annotations map[string]string
		container   corev1.Container
	}{
		"sidecar":        {nil, app},
		"former sidecar": {map[string]string{"sidecar.istio.io/nativeSidecar": "false"}, app},
		"gateway":        {map[string]string{"inject.istio.io/templates": "gateway,assay"}, corev1.Container{Name: "istio-proxy", Image: "auto"}},
	} {
		t.Run(what, func(t *testing.T) {
			pod := i.inject(&corev1.Pod{
				TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
				ObjectMeta: metav1.ObjectMeta{Name: "web-1", Namespace: m.Namespace, Annotations: c.annotations, Labels: map[string]string{"sidecar.istio.io/inject": "true"}},
				Spec:       corev1.PodSpec{ServiceAccountName: "web", Containers: []corev1.Container{c.container}},
			})
			proxy := proxyOf(t, pod)
			for name, want := range map[string]string{
				"WORKLOAD_IDENTITY_SOCKET_FILE": "sds.sock", "CA_ADDR": "assay-server.assay.svc:8444",
				"TRUST_DOMAIN": "example.org", "ISTIO_META_CLUSTER_ID": "Kubernetes",
			} {
				if got := valueOf(proxy, name); got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
			mounted := false
			for _, mount := range proxy.VolumeMounts {
				if mount.MountPath == "/var/run/secrets/workload-spiffe-uds" {
					mounted = mount.Name == "workload-socket" && mount.ReadOnly
				}
			}
			if !mounted {
				t.Errorf("it mounts %v", proxy.VolumeMounts)
			}
			for _, v := range pod.Spec.Volumes {
				if v.Name == "workload-socket" && (v.HostPath == nil || v.HostPath.Path != "/run/assay/public" || v.EmptyDir != nil) {
					t.Errorf("the volume is %v", v.VolumeSource)
				}
			}
			if _, err := m.Core.Pods(m.Namespace).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
				t.Errorf("the API server: %v", err)
			}
		})
	}
}

// Istio's charts take the values that the documentation gives, and what they say is
// where Istio's programs look for it.
func TestIstiosChartsTakeTheValues(t *testing.T) {
	s := cluster.NewSpace(t)
	const address = "assay-server.assay.svc:8444"
	for chart, files := range map[string][]string{
		"istio-control/istio-discovery": {"istiod-csr.yaml", "istiod-sds.yaml", "istiod-ambient.yaml"},
		"ztunnel":                       {"ztunnel.yaml"},
	} {
		for _, file := range files {
			all := s.istio(chart, file)
			want, kind, name := "ENABLE_CA_SERVER=false", "Deployment", "istiod"
			if chart == "ztunnel" {
				want, kind, name = "CA_ADDRESS="+address, "DaemonSet", "ztunnel"
			} else {
				if mesh := text(t, find(t, all, "ConfigMap", "istio"), "data", "mesh"); !strings.Contains(mesh, "trustDomain: example.org") {
					t.Errorf("%s: the mesh is\n%s", file, mesh)
				}
				var values struct{ Global struct{ CAAddress string } }
				if err := json.Unmarshal([]byte(text(t, find(t, all, "ConfigMap", "istio-sidecar-injector"), "data", "values")), &values); err != nil || values.Global.CAAddress != address {
					t.Errorf("%s: proxies ask %q for certificates: %v", file, values.Global.CAAddress, err)
				}
			}
			if env := environment(t, find(t, all, kind, name)); !strings.Contains(strings.Join(env, "\n"), want) {
				t.Errorf("%s: the environment has no %s: %v", file, want, env)
			}
		}
	}
}

package kube

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
)

var example = spiffeid.RequireTrustDomainFromString("example.org")

// fakeAPI answers like an API server, or like one that lies. The real one is
// asked in test/kube.
type fakeAPI struct {
	t      *testing.T
	server *httptest.Server
	status authenticationv1.TokenReviewStatus
	pod    *corev1.Pod
	list   []corev1.Pod // on node-1
	node   *corev1.Node
	code   int // of every answer, if it is not 0
	asked  []string
}

// newFake is a cluster in which an agent's token is good.
func newFake(t *testing.T) *fakeAPI {
	f := &fakeAPI{
		t: t,
		status: authenticationv1.TokenReviewStatus{
			Authenticated: true, Audiences: []string{"assay-server"},
			User: authenticationv1.UserInfo{
				Username: "system:serviceaccount:assay:assay-agent",
				Groups:   []string{"system:serviceaccounts", "system:serviceaccounts:assay", "system:authenticated"},
				Extra: map[string]authenticationv1.ExtraValue{
					extraPodName: {"agent-x"}, extraPodUID: {"pod-uid"}, extraNodeName: {"node-1"}, extraNodeUID: {"node-uid"}, extraToken: {"JTI=1"},
				},
			},
		},
		pod: &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "assay", Name: "agent-x", UID: "pod-uid"},
			Spec:       corev1.PodSpec{ServiceAccountName: "assay-agent", NodeName: "node-1"},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning},
		},
		node: &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1", UID: "node-uid", Labels: map[string]string{"zone": "a", "secret": "b"}}},
	}
	f.server = httptest.NewServer(f)
	t.Cleanup(f.server.Close)
	return f
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.asked = append(f.asked, r.Method+" "+r.URL.Path)
	answer := func(kind, version string, object any) {
		data, err := json.Marshal(object)
		if err != nil {
			f.t.Error(err)
		}
		w.Header().Set("Content-Type", "application/json")
		// Objects do not tell their kind by themselves.
		_, _ = w.Write([]byte(strings.Replace(string(data), "{", `{"kind":"`+kind+`","apiVersion":"`+version+`",`, 1)))
	}
	switch {
	case f.code != 0:
		http.Error(w, "the fake refuses", f.code)
	case r.URL.Path == "/apis/authentication.k8s.io/v1/tokenreviews" && r.Method == http.MethodPost:
		answer("TokenReview", "authentication.k8s.io/v1", authenticationv1.TokenReview{Status: f.status})
	case r.URL.Path == "/api/v1/namespaces/assay/pods/agent-x" && f.pod != nil:
		answer("Pod", "v1", f.pod)
	case r.URL.Path == "/api/v1/namespaces/assay/pods" && r.URL.Query().Get("fieldSelector") == "spec.nodeName=node-1":
		answer("PodList", "v1", corev1.PodList{Items: f.list})
	case r.URL.Path == "/api/v1/nodes/node-1" && f.node != nil:
		answer("Node", "v1", f.node)
	default:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`))
	}
}

func (f *fakeAPI) clusters() *Clusters {
	f.t.Helper()
	file := filepath.Join(f.t.TempDir(), "kubeconfig")
	config := `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],` +
		`"clusters":[{"name":"c","cluster":{"server":"` + f.server.URL + `"}}],"users":[{"name":"u","user":{}}]}`
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		f.t.Fatal(err)
	}
	cfg := Config{Clusters: map[string]ClusterConfig{"prod": {Kubeconfig: file, AgentServiceAccounts: []string{"assay/assay-agent"}, NodeLabels: []string{"zone", "absent"}}}}.WithDefaults()
	if err := cfg.Check(example, "/assay/"); err != nil {
		f.t.Fatal(err)
	}
	c, err := Open(cfg, example, "/assay/", "test")
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

func wantReason(t *testing.T, err error, reason, cause string) {
	t.Helper()
	if err == nil || fault.ReasonOf(err) != reason || cause != "" && fault.CauseOf(err) != cause {
		t.Errorf("got %v (%s, by %s), want %s by %s", err, fault.ReasonOf(err), fault.CauseOf(err), reason, cause)
	}
}

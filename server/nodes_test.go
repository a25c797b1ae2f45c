package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/kube"
)

// oneNode is the API server of a cluster with one node and the agent's pod on it,
// which takes every token for that pod's.
type oneNode struct {
	mu      sync.Mutex
	uid     string
	changes map[chan string]bool // events for those who watch nodes
}

func (o *oneNode) node(uid string) *corev1.Node {
	return &corev1.Node{TypeMeta: metav1.TypeMeta{Kind: "Node", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Name: "node-1", UID: types.UID(uid), ResourceVersion: "1"}}
}

func (o *oneNode) pod() *corev1.Pod {
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "assay", Name: "agent-x", UID: "pod-uid", ResourceVersion: "1"},
		Spec:       corev1.PodSpec{ServiceAccountName: "assay-agent", NodeName: "node-1"},
	}
}

// remake makes the node anew under its name, as its kubelet does that finds it
// gone.
func (o *oneNode) remake(uid string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for c := range o.changes {
		c <- event("DELETED", o.node(o.uid))
		c <- event("ADDED", o.node(uid))
	}
	o.uid = uid
}

func event(kind string, object any) string {
	data, err := json.Marshal(map[string]any{"type": kind, "object": object})
	if err != nil {
		panic(err)
	}
	return string(data) + "\n"
}

func (o *oneNode) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	o.mu.Lock()
	uid := o.uid
	o.mu.Unlock()
	answer := func(object any) { _ = json.NewEncoder(w).Encode(object) }
	switch r.URL.Path {
	case "/apis/authentication.k8s.io/v1/tokenreviews":
		answer(authenticationv1.TokenReview{
			TypeMeta: metav1.TypeMeta{Kind: "TokenReview", APIVersion: "authentication.k8s.io/v1"},
			Status: authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{"assay-server"}, User: authenticationv1.UserInfo{
				Username: "system:serviceaccount:assay:assay-agent", Groups: []string{"system:serviceaccounts", "system:serviceaccounts:assay"},
				Extra: map[string]authenticationv1.ExtraValue{"authentication.kubernetes.io/pod-name": {"agent-x"}, "authentication.kubernetes.io/pod-uid": {"pod-uid"}},
			}},
		})
	case "/api/v1/namespaces/assay/pods/agent-x":
		answer(o.pod())
	case "/api/v1/nodes/node-1":
		answer(o.node(uid))
	case "/api/v1/nodes":
		end := o.node("end")
		end.Annotations = map[string]string{metav1.InitialEventsAnnotationKey: "true"}
		o.watch(w, r, event("ADDED", o.node(uid))+event("BOOKMARK", end))
	case "/api/v1/pods":
		end := o.pod()
		end.Annotations = map[string]string{metav1.InitialEventsAnnotationKey: "true"}
		o.watch(w, r, event("ADDED", o.pod())+event("BOOKMARK", end))
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func (o *oneNode) watch(w http.ResponseWriter, r *http.Request, first string) {
	changes := make(chan string, 10)
	if strings.HasSuffix(r.URL.Path, "/nodes") {
		o.mu.Lock()
		o.changes[changes] = true
		o.mu.Unlock()
	}
	for {
		_, _ = fmt.Fprint(w, first)
		w.(http.Flusher).Flush()
		select {
		case first = <-changes:
		case <-r.Context().Done():
			return
		}
	}
}

// A node that is made anew under its name is another one for the cluster. Its
// agent is told to attest anew: as the agent of the one before it would get
// nothing for any pod, for as long as it renewed its certificate.
func TestTheAgentOfANodeThatWasMadeAnewAttestsAnew(t *testing.T) {
	api := &oneNode{uid: "uid-1", changes: map[chan string]bool{}}
	server := httptest.NewServer(api)
	t.Cleanup(server.Close)
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, []byte(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],`+
		`"clusters":[{"name":"c","cluster":{"server":"`+server.URL+`"}}],"users":[{"name":"u","user":{}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	h := start(t, func(c *Config) {
		c.Kubernetes.Clusters = map[string]kube.ClusterConfig{"prod": {Kubeconfig: file, AgentServiceAccounts: []string{"assay/assay-agent"}}}
	})
	attest := func() *agent {
		t.Helper()
		payload, err := proto.Marshal(&agentv1.K8SPsatPayload{Cluster: "prod", Token: "token"})
		if err != nil {
			t.Fatal(err)
		}
		conn, key := h.connect(nil), newKey(t)
		identity, err := attestOver(t, agentv1.NewAgentClient(conn), &agentv1.AttestRequest_Start{Attestor: "k8s_psat", Payload: payload, Csr: newCSR(t, key, nil)})
		if err != nil {
			t.Fatal(err)
		}
		return h.agentOf(identity, key)
	}
	// pods are those that an agent hears of first.
	pods := func(stream syncClient) []*agentv1.Pod {
		t.Helper()
		for {
			for _, msg := range next(t, stream) {
				if msg.GetPods().GetSnapshot() {
					return msg.GetPods().GetPods()
				}
			}
		}
	}
	old := attest()
	stream := openSync(t, old, nil)
	if got := pods(stream); len(got) != 1 {
		t.Fatalf("%d pods, want the agent's own", len(got))
	}
	api.remake("uid-2")
	failed := make(chan error, 1)
	go func() {
		for {
			if _, err := stream.Recv(); err != nil {
				failed <- err
				return
			}
		}
	}()
	select {
	case err := <-failed:
		if err = fault.FromStatus(err); fault.KindOf(err) != fault.Unauthenticated || fault.ReasonOf(err) != "agent_node_replaced" {
			t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the agent is not told")
	}
	anew := attest()
	if !strings.HasSuffix(anew.id.Path(), "/prod/uid-2") {
		t.Errorf("the agent is %s", anew.id)
	}
	if got := pods(openSync(t, anew, nil)); len(got) != 1 {
		t.Errorf("%d pods, want the agent's own", len(got))
	}
}

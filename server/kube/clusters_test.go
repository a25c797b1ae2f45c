package kube

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/pkg/fault"
)

func TestAnAgentsTokenNamesItsNode(t *testing.T) {
	f := newFake(t)
	got, err := f.clusters().AgentNode(t.Context(), "prod", "token")
	if err != nil {
		t.Fatal(err)
	}
	labels := got.Labels
	got.Labels = nil
	want := Node{Cluster: "prod", Name: "node-1", UID: "node-uid", Namespace: "assay", ServiceAccount: "assay-agent", PodName: "agent-x", PodUID: "pod-uid", Token: "JTI=1"}
	if got.Cluster != want.Cluster || got.Name != want.Name || got.UID != want.UID || got.Namespace != want.Namespace ||
		got.ServiceAccount != want.ServiceAccount || got.PodName != want.PodName || got.PodUID != want.PodUID || got.Token != want.Token {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if !maps.Equal(labels, map[string]string{"zone": "a"}) {
		t.Errorf("labels %v", labels)
	}
	// Older API servers name no node and no credential in their reviews.
	for _, key := range []string{extraNodeName, extraNodeUID, extraToken} {
		delete(f.status.User.Extra, key)
	}
	if got, err := f.clusters().AgentNode(t.Context(), "prod", "token"); err != nil || got.UID != "node-uid" || got.Token != "" {
		t.Errorf("from an older one: %+v, %v", got, err)
	}
}

// NEG-15, NEG-16: whatever is wrong with a review or with the pod, the agent
// hears the same, and the log hears what it was.
func TestTokensThatProveNoNode(t *testing.T) {
	past := metav1.NewTime(time.Now().Add(-time.Minute))
	for name, tc := range map[string]struct {
		spoil func(*fakeAPI)
		cause string
	}{
		"not authenticated":             {func(f *fakeAPI) { f.status.Authenticated = false }, "token_invalid"},
		"an error beside authenticated": {func(f *fakeAPI) { f.status.Error = "x" }, "token_invalid"},
		"no audiences":                  {func(f *fakeAPI) { f.status.Audiences = nil }, "audience"},
		"another audience":              {func(f *fakeAPI) { f.status.Audiences = []string{"api"} }, "audience"},
		"a part of the audience":        {func(f *fakeAPI) { f.status.Audiences = []string{"assay-server2", "assay"} }, "audience"},
		"three parts":                   {func(f *fakeAPI) { f.status.User.Username = "system:serviceaccount:assay" }, "no_service_account"},
		"five parts":                    {func(f *fakeAPI) { f.status.User.Username = "system:serviceaccount:assay:assay-agent:x" }, "no_service_account"},
		"a user":                        {func(f *fakeAPI) { f.status.User.Username = "assay:assay-agent" }, "no_service_account"},
		"not in the group":              {func(f *fakeAPI) { f.status.User.Groups = []string{"system:authenticated"} }, "no_service_account"},
		"in the group of another":       {func(f *fakeAPI) { f.status.User.Groups[1] = "system:serviceaccounts:other" }, "no_service_account"},
		"another account": {func(f *fakeAPI) {
			f.status.User.Username = "system:serviceaccount:assay:default"
		}, "service_account"},
		"another namespace": {func(f *fakeAPI) {
			f.status.User.Username, f.status.User.Groups[1] = "system:serviceaccount:evil:assay-agent", "system:serviceaccounts:evil"
		}, "service_account"},
		"no pod":                {func(f *fakeAPI) { delete(f.status.User.Extra, extraPodUID) }, "not_bound"},
		"an empty pod":          {func(f *fakeAPI) { f.status.User.Extra[extraPodName] = authenticationv1.ExtraValue{""} }, "not_bound"},
		"two pods":              {func(f *fakeAPI) { f.status.User.Extra[extraPodUID] = authenticationv1.ExtraValue{"a", "pod-uid"} }, "not_bound"},
		"two nodes":             {func(f *fakeAPI) { f.status.User.Extra[extraNodeName] = authenticationv1.ExtraValue{"node-1", "b"} }, "not_bound"},
		"a pod that is gone":    {func(f *fakeAPI) { f.pod = nil }, "pod_gone"},
		"a pod that is another": {func(f *fakeAPI) { f.pod.UID = "new" }, "pod_replaced"},
		"a pod's other account": {func(f *fakeAPI) { f.pod.Spec.ServiceAccountName = "default" }, "service_account"},
		"a pod on no node":      {func(f *fakeAPI) { f.pod.Spec.NodeName = "" }, "node_mismatch"},
		"a pod on another node": {func(f *fakeAPI) { f.pod.Spec.NodeName = "node-2" }, "node_mismatch"},
		"a pod that has ended":  {func(f *fakeAPI) { f.pod.Status.Phase = corev1.PodFailed }, "pod_ended"},
		"a pod that succeeded":  {func(f *fakeAPI) { f.pod.Status.Phase = corev1.PodSucceeded }, "pod_ended"},
		"a pod past deletion":   {func(f *fakeAPI) { f.pod.DeletionTimestamp = &past }, "pod_deleted"},
		"a node that is gone":   {func(f *fakeAPI) { f.node = nil }, "node_gone"},
		"a node made anew":      {func(f *fakeAPI) { f.node.UID = "new" }, "node_mismatch"},
		"a node without a UID":  {func(f *fakeAPI) { f.node.UID = "" }, "node_mismatch"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			tc.spoil(f)
			got, err := f.clusters().AgentNode(t.Context(), "prod", "token")
			wantReason(t, err, "psat_rejected", tc.cause)
			if got.UID != "" || !errors.Is(err, fault.Denied) || fault.SafeText(err) != fault.SafeText(rejected(errNoCluster)) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
	f := newFake(t)
	_, err := f.clusters().AgentNode(t.Context(), "other", "token")
	wantReason(t, err, "psat_rejected", "cluster_unknown")
	if len(f.asked) > 0 {
		t.Errorf("an unknown cluster was asked for: %v", f.asked)
	}
	// A pod that is being stopped is still one.
	soon := metav1.NewTime(time.Now().Add(time.Minute))
	f.pod.DeletionTimestamp = &soon
	if _, err := f.clusters().AgentNode(t.Context(), "prod", "token"); err != nil {
		t.Errorf("a pod that is being stopped: %v", err)
	}
}

// That a cluster gives no answer is nobody's refusal: agents come again.
func TestAClusterThatGivesNoAnswer(t *testing.T) {
	for code, reason := range map[int]string{
		http.StatusForbidden: "kubernetes_forbidden", http.StatusUnauthorized: "kubernetes_forbidden", http.StatusInternalServerError: "kubernetes_unavailable",
	} {
		f := newFake(t)
		f.code = code
		_, err := f.clusters().AgentNode(t.Context(), "prod", "token")
		wantReason(t, err, reason, "")
		if !errors.Is(err, fault.NotReady) || strings.Contains(fault.SafeText(err), "the fake") {
			t.Errorf("%d: %v", code, err)
		}
	}
	f := newFake(t)
	c := f.clusters()
	f.server.Close()
	_, err := c.AgentNode(t.Context(), "prod", "token")
	wantReason(t, err, "kubernetes_unavailable", "")
}

// Who answers for an API server decides who is whom.
func TestAnAPIServerThatIsNotVerifiedIsWarnedOf(t *testing.T) {
	for cluster, warned := range map[string]bool{
		`{"server":"https://127.0.0.1:1"}`: false, `{"server":"http://127.0.0.1:1"}`: true,
		`{"server":"https://127.0.0.1:1","insecure-skip-tls-verify":true}`: true,
	} {
		file := filepath.Join(t.TempDir(), "kubeconfig")
		if err := os.WriteFile(file, []byte(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],`+
			`"clusters":[{"name":"c","cluster":`+cluster+`}],"users":[{"name":"u","user":{}}]}`), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Open(Config{Clusters: map[string]ClusterConfig{"prod": {Kubeconfig: file}}}.WithDefaults(), example, "/assay/", "test")
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Warnings(); (len(got) == 1) != warned {
			t.Errorf("%s: %q", cluster, got)
		}
	}
}

func TestClustersThatCannotBeConfigured(t *testing.T) {
	good := func() ClusterConfig { return ClusterConfig{AgentServiceAccounts: []string{"assay/assay-agent"}} }
	for name, spoil := range map[string]func() (string, ClusterConfig){
		"name":                  func() (string, ClusterConfig) { return "a/b", good() },
		"long name":             func() (string, ClusterConfig) { return strings.Repeat("x", 64), good() },
		"dots":                  func() (string, ClusterConfig) { return "..", good() },
		"no accounts":           func() (string, ClusterConfig) { return "prod", ClusterConfig{} },
		"account's namespace":   func() (string, ClusterConfig) { return "prod", ClusterConfig{AgentServiceAccounts: []string{"agent"}} },
		"account's name":        func() (string, ClusterConfig) { return "prod", ClusterConfig{AgentServiceAccounts: []string{"a/b/c"}} },
		"relative kubeconfig":   func() (string, ClusterConfig) { c := good(); c.Kubeconfig = "x"; return "prod", c },
		"a label with a colon":  func() (string, ClusterConfig) { c := good(); c.NodeLabels = []string{"a:b"}; return "prod", c },
		"an account of no name": func() (string, ClusterConfig) { c := good(); c.AgentServiceAccounts = []string{"a/"}; return "prod", c },
	} {
		cluster, c := spoil()
		if err := (Config{Clusters: map[string]ClusterConfig{cluster: c}}).WithDefaults().Check(example, "/assay/"); fault.ReasonOf(err) != "config_kubernetes" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := (Config{Clusters: map[string]ClusterConfig{"prod-1.eu_west": good()}}).WithDefaults().Check(example, "/assay/"); err != nil {
		t.Error(err)
	}
	missing := good()
	missing.Kubeconfig = "/nowhere/kubeconfig"
	for _, c := range []ClusterConfig{missing, good()} { // there is no cluster around a test
		if _, err := Open(Config{Clusters: map[string]ClusterConfig{"prod": c}}.WithDefaults(), example, "/assay/", "test"); fault.ReasonOf(err) != "config_kubernetes" {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// However many come to the agents' port with tokens, those of a mesh are reviewed
// at once: nobody has proved anything there yet. // NEG-20
func TestAgentsTokensDoNotHoldUpAMesh(t *testing.T) {
	f := newFake(t)
	f.server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","status":{}}`))
	})
	c := f.clusters()
	agents, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	rate, full := c.byName["prod"].api.tokens.GetRateLimiter(), make(chan struct{}, askBurst+25*askRate)
	for range cap(full) {
		all.Go(func() {
			if rate.Wait(agents) != nil {
				full <- struct{}{}
			}
		})
	}
	<-full // what agents may ask in twenty seconds is on its way
	proxies, cancelProxies := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancelProxies()
	if _, err := c.Review(proxies, "prod", "token", []string{"istio-ca"}); fault.ReasonOf(err) != "token_invalid" {
		t.Error(err)
	}
}

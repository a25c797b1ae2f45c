//go:build kube

package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/seed-caa81108/assay/test/harness"
	"github.com/seed-caa81108/assay/test/istioclient"
)

// mesh is a server that is the CA of a mesh whose tokens the cluster's API server
// reviews.
type mesh struct {
	*Space
	t    *testing.T
	site *harness.Site
	port int
}

func newMesh(t *testing.T) *mesh { return newMeshWith(t, "") }

// newMeshWith is newMesh with more in the istio part.
func newMeshWith(t *testing.T, more string) *mesh {
	t.Helper()
	s := cluster.NewSpace(t)
	var ports harness.Ports
	m := &mesh{Space: s, t: t, port: ports.Free(t)}
	m.Account("ztunnel")
	m.site = s.site(t, fmt.Sprintf("istio:\n  listen: 127.0.0.1:%d\n  dns_names: [assay-server.assay.svc]\n  ip_addresses: [127.0.0.1]\n"+
		"  trusted_node_accounts: [%s/ztunnel]\n  clusters:\n    test: {issuer: %q}\n%s", m.port, s.Namespace, issuer, more))
	return m
}

// proxy is istio-agent's client in a pod, with a token as its kubelet gives it.
func (m *mesh) proxy(account string, pod *corev1.Pod) *istioclient.Client {
	m.t.Helper()
	token := m.Token(account, "istio-ca", pod)
	return m.with(account, func() (string, error) { return token, nil })
}

func (m *mesh) with(account string, token func() (string, error)) *istioclient.Client {
	m.t.Helper()
	roots := []byte(m.site.CLI("bundle", "show"))
	c := &istioclient.Client{
		Address: fmt.Sprintf("127.0.0.1:%d", m.port), Roots: func() []byte { return roots }, Token: token,
		ClusterID: "Kubernetes", Identity: m.id(account), NewKey: istioclient.P256,
	}
	m.t.Cleanup(c.Close)
	return c
}

// ztunnel is the proxy of a node, asking for the pods of an account.
func (m *mesh) ztunnel(pod *corev1.Pod, account string) *istioclient.Client {
	m.t.Helper()
	c := m.proxy("ztunnel", pod)
	c.ZTunnel = true
	if account != "" {
		c.Impersonate = m.id(account)
	}
	return c
}

func (m *mesh) id(account string) string {
	return "spiffe://example.org/ns/" + m.Namespace + "/sa/" + account
}

// refused wants one call that is refused, with the true reason in the audit log
// alone.
func (m *mesh) refused(what string, c *istioclient.Client, reason string) {
	m.t.Helper()
	_, err := c.Fetch(m.t.Context())
	why := m.lastReason()
	if status.Code(err) != codes.Unauthenticated || c.Calls != 1 || why != reason || strings.Contains(status.Convert(err).Message(), reason) {
		m.t.Errorf("%s: %v after %d calls, and the audit log says %s; want %s", what, err, c.Calls, why, reason)
	}
	c.Calls = 0
}

func (m *mesh) issued(what string, c *istioclient.Client) {
	m.t.Helper()
	if _, err := c.Fetch(m.t.Context()); err != nil {
		m.t.Errorf("%s: %v", what, err)
	}
	c.Calls = 0
}

// lastReason is the true reason of the newest refusal.
func (m *mesh) lastReason() string {
	m.t.Helper()
	var reason string
	for raw := range strings.Lines(readFile(m.t, m.site.Audit())) {
		var line struct {
			Action string `json:"action"`
			Result struct{ Code, Reason, Cause string }
		}
		if json.Unmarshal([]byte(raw), &line) == nil && line.Action == "x509_svid.issue" && line.Result.Code != "ok" {
			if reason = line.Result.Cause; reason == "" {
				reason = line.Result.Reason
			}
		}
	}
	return reason
}

// CA-01, CA-07, CA-08, CA-09, NEG-31: tokens as the API server makes them for
// pods, and the ones that prove nothing.
func TestSidecarsOfARealCluster(t *testing.T) {
	m := newMesh(t)
	m.Account("sleep")
	pod := m.Run(Pod{Name: "sleep-1", Node: m.Node("a").Name, Account: "sleep"})
	sidecar := m.proxy("sleep", pod)
	sidecar.NewKey = nil // RSA, as istio-agent does by default
	m.issued("a sidecar", sidecar)
	for id, reason := range map[string]string{"": "", "other": "cluster_unknown"} {
		c := m.proxy("sleep", pod)
		if c.ClusterID = id; reason == "" {
			m.issued("without a cluster ID", c)
		} else {
			m.refused("with another cluster ID", c, reason)
		}
	}
	for what, c := range map[string]struct{ token, reason string }{
		"for another audience":  {m.Token("sleep", "vault", pod), "audience"},
		"for the API server":    {m.Token("sleep", "", pod), "audience"},
		"for no pod":            {m.Token("sleep", "istio-ca", nil), "not_bound"},
		"of an account, forged": {forge(m.Token("sleep", "istio-ca", pod)), "token_invalid"},
	} {
		m.refused("a token "+what, m.with("sleep", func() (string, error) { return c.token, nil }), c.reason)
	}
	other := m.proxy("sleep", pod)
	other.Identity = m.id("admin")
	if _, err := other.Fetch(t.Context()); status.Code(err) != codes.InvalidArgument || other.Calls != 1 {
		t.Errorf("another's name: %v after %d calls", err, other.Calls)
	}
	// The pod goes, and with it what its token proves; that is cached for seconds.
	m.Delete(pod)
	m.site.Server.Eventually(time.Minute, "the token of a pod that is gone is refused", func() error {
		if _, err := sidecar.Fetch(t.Context()); status.Code(err) != codes.Unauthenticated {
			return fmt.Errorf("the code is %s", status.Code(err))
		}
		return nil
	})
}

// forge makes the signature of a token one of other bytes.
func forge(token string) string {
	return token[:len(token)-8] + "AAAAAAAA"
}

// ZT-01 to ZT-06, ZT-08, NEG-32: a node proxy gets what runs on its node.
func TestNodeProxiesGetThePodsOfTheirNode(t *testing.T) {
	m := newMesh(t)
	a, b := m.Node("a").Name, m.Node("b").Name
	for _, account := range []string{"web", "db", "done", "failed", "leaving", "idle", "a.b", "axb"} {
		m.Account(account)
	}
	here, there := m.Run(Pod{Name: "ztunnel-a", Node: a, Account: "ztunnel"}), m.Run(Pod{Name: "ztunnel-b", Node: b, Account: "ztunnel"})
	web := m.Run(Pod{Name: "web-1", Node: a, Account: "web"})
	m.Run(Pod{Name: "db-1", Node: b, Account: "db"})
	m.Run(Pod{Name: "axb-1", Node: a, Account: "axb"})
	for name, phase := range map[string]corev1.PodPhase{"done": corev1.PodSucceeded, "failed": corev1.PodFailed} {
		pod := m.Run(Pod{Name: name + "-1", Node: a, Account: name})
		pod.Status.Phase = phase
		if _, err := m.Core.Pods(m.Namespace).UpdateStatus(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	leaving := m.Run(Pod{Name: "leaving-1", Node: a, Account: "leaving"})
	if err := m.Core.Pods(m.Namespace).Delete(t.Context(), leaving.Name, metav1.DeleteOptions{}); err != nil { // with its time to stop
		t.Fatal(err)
	}

	m.issued("a pod on the node", m.ztunnel(here, "web"))
	m.issued("a pod on the other node, from there", m.ztunnel(there, "db"))
	m.issued("itself", m.ztunnel(here, ""))
	for what, c := range map[string]struct {
		proxy  *istioclient.Client
		reason string
	}{
		"a pod on another node":   {m.ztunnel(here, "db"), "no_such_workload_on_node"},
		"the same, from there":    {m.ztunnel(there, "web"), "no_such_workload_on_node"},
		"no pod":                  {m.ztunnel(here, "idle"), "no_such_workload_on_node"},
		"a pod that succeeded":    {m.ztunnel(here, "done"), "no_such_workload_on_node"},
		"a pod that failed":       {m.ztunnel(here, "failed"), "no_such_workload_on_node"},
		"a pod that is leaving":   {m.ztunnel(here, "leaving"), "no_such_workload_on_node"},
		"a dot is no wildcard":    {m.ztunnel(here, "a.b"), "no_such_workload_on_node"},
		"no node proxy":           {m.impersonating(m.proxy("web", web), m.id("axb")), "node_account_unknown"},
		"another trust domain":    {m.impersonating(m.ztunnel(here, ""), "spiffe://other.org/ns/"+m.Namespace+"/sa/web"), "impersonation_foreign"},
		"upper case":              {m.impersonating(m.ztunnel(here, ""), strings.ToUpper(m.id("web"))), "impersonation_malformed"},
		"three segments":          {m.impersonating(m.ztunnel(here, ""), "spiffe://example.org/ns/"+m.Namespace+"/sa"), "impersonation_malformed"},
		"six segments":            {m.impersonating(m.ztunnel(here, ""), m.id("web")+"/x/y"), "impersonation_malformed"},
		"percent":                 {m.impersonating(m.ztunnel(here, ""), "spiffe://example.org/ns/"+m.Namespace+"/sa/web%2Fx"), "impersonation_malformed"},
		"no scheme":               {m.impersonating(m.ztunnel(here, ""), m.Namespace+"/web"), "impersonation_malformed"},
		"two at once":             {m.impersonating(m.ztunnel(here, ""), m.id("web")+","+m.id("db")), "impersonation_malformed"},
		"dots":                    {m.impersonating(m.ztunnel(here, ""), "spiffe://example.org/ns/../sa/web"), "impersonation_malformed"},
		"a request for another":   {m.naming(m.ztunnel(here, "web"), m.id("db")), "csr_identity_mismatch"},
		"a token bound to no pod": {m.ztunnel(nil, "web"), "not_bound"},
	} {
		m.refused(what, c.proxy, c.reason)
	}
	// A ztunnel that is replaced leaves its token behind.
	left := m.ztunnel(here, "web")
	m.Delete(here)
	again := m.Run(Pod{Name: "ztunnel-a", Node: b, Account: "ztunnel"})
	m.site.Server.Eventually(time.Minute, "the token of a pod that was replaced is refused", func() error {
		if _, err := left.Fetch(t.Context()); status.Code(err) != codes.Unauthenticated {
			return fmt.Errorf("the code is %s", status.Code(err))
		}
		return nil
	})
	m.issued("the later one, where it is now", m.ztunnel(again, "db"))
}

// impersonating asks for another identity, which its request names as well, as far
// as a request can.
func (m *mesh) impersonating(c *istioclient.Client, id string) *istioclient.Client {
	c.ZTunnel, c.Impersonate = true, id
	return c
}

// naming has the request name another identity than the metadata.
func (m *mesh) naming(c *istioclient.Client, id string) *istioclient.Client {
	c.Names = id
	return c
}

// ZT-07: ztunnel asks as a pod begins, and nobody is told no because the server
// has not seen the pod yet.
func TestPodsThatBegin(t *testing.T) {
	m := newMesh(t)
	node := m.Node("a").Name
	ztunnel := m.Run(Pod{Name: "ztunnel-a", Node: node, Account: "ztunnel"})
	for i := range 20 {
		account := fmt.Sprintf("web-%d", i)
		m.Account(account)
		c := m.ztunnel(ztunnel, account)
		m.Bind(Pod{Name: account, Node: node, Account: account})
		m.issued("a pod that was bound just now", c)
	}
}

// CA-13, CA-15, NEG-33: without an API server nobody new is believed; who is told
// so comes again, and then it goes on. A server that has no answer for a token is
// ready all the same: its agents' streams go on.
func TestProxiesWhileTheAPIServerIsAway(t *testing.T) {
	m := newMesh(t)
	m.Account("sleep")
	pod := m.Run(Pod{Name: "sleep-1", Node: m.Node("a").Name, Account: "sleep"})
	known, fresh := m.proxy("sleep", pod), m.proxy("sleep", pod)
	m.issued("before", known)

	// It takes calls and does not answer.
	m.api.Signal(syscall.SIGSTOP)
	t.Cleanup(func() { m.api.Signal(syscall.SIGCONT) })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := fresh.Once(ctx); status.Code(err) != codes.Unavailable {
		t.Errorf("while it does not answer: %v", err)
	}
	m.api.Signal(syscall.SIGCONT)

	m.Stop()
	fresh.Calls = 0
	if _, err := fresh.Fetch(t.Context()); status.Code(err) != codes.Unavailable || fresh.Calls != 5 {
		t.Errorf("while it is away: %v after %d calls", err, fresh.Calls)
	}
	m.site.Server.Eventually(time.Minute, "its breaker opens", func() error {
		_, _ = fresh.Once(t.Context())
		if open := harness.Metric(t, m.site.Ops, `assay_istio_token_review_breaker_open{cluster="test"}`); open != 1 {
			return fmt.Errorf("it is %v", open)
		}
		return nil
	})
	m.site.Server.WaitReady(m.site.Ops)
	m.Restart(t)
	m.site.Server.Eventually(time.Minute, "the API server is asked again", func() error {
		_, err := fresh.Fetch(t.Context())
		return err
	})
	if open := harness.Metric(t, m.site.Ops, `assay_istio_token_review_breaker_open{cluster="test"}`); open != 0 {
		t.Errorf("the breaker is %v", open)
	}
}

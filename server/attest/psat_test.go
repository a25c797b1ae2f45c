package attest_test

import (
	"context"
	"crypto"
	"crypto/elliptic"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/attest"
	"github.com/seed-caa81108/assay/server/kube"
)

// clusterOf answers for one cluster, whatever the token.
type clusterOf struct {
	node  kube.Node
	err   error
	asked int
}

func (c *clusterOf) AgentNode(_ context.Context, cluster, _ string) (kube.Node, error) {
	c.asked++
	c.node.Cluster = cluster
	return c.node, c.err
}

func psatEvidence(t *testing.T, key crypto.PublicKey, cluster, token string) attest.Evidence {
	t.Helper()
	payload, err := proto.Marshal(&agentv1.K8SPsatPayload{Cluster: cluster, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	return attest.Evidence{Payload: payload, PublicKey: key}
}

func newPsat(t *testing.T, c *clusterOf) *attest.K8SPsat {
	t.Helper()
	return attest.NewK8SPsat(attest.K8SPsatConfig{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), ReservedPrefix: "/assay/", Clusters: c, Records: records(t),
	})
}

func TestAPodsTokenMakesTheAgentOfItsNode(t *testing.T) {
	c := &clusterOf{node: kube.Node{
		Name: "node-1", UID: "0b8e9a6c-3c1e-4ad4-9ad6-6a3f0a9a7f10", Labels: map[string]string{"topology.kubernetes.io/zone": "a"},
		Namespace: "assay", ServiceAccount: "assay-agent", PodName: "agent-x", PodUID: "p", Token: "JTI=1",
	}}
	k := newPsat(t, c)
	got, err := k.Attest(t.Context(), psatEvidence(t, ecKey(t, elliptic.P256()).Public(), "prod", "token"), nil)
	if err != nil || !got.CanReattest || got.AgentID.Path() != "/assay/agent/k8s_psat/prod/0b8e9a6c-3c1e-4ad4-9ad6-6a3f0a9a7f10" {
		t.Fatalf("%+v, %v", got, err)
	}
	var texts []string
	for _, s := range got.Selectors {
		texts = append(texts, s.String())
	}
	for _, want := range []string{
		"k8s_psat:cluster:prod", "k8s_psat:agent_ns:assay", "k8s_psat:agent_sa:assay-agent", "k8s_psat:agent_pod_name:agent-x", "k8s_psat:agent_pod_uid:p",
		"k8s_psat:agent_node_name:node-1", "k8s_psat:agent_node_uid:" + c.node.UID, "k8s_psat:agent_node_label:topology.kubernetes.io/zone:a",
	} {
		if !strings.Contains(strings.Join(texts, " ")+" ", want+" ") {
			t.Errorf("%s is missing from %v", want, texts)
		}
	}
}

// NEG-16: a token that was copied from an agent is refused with a key of the
// thief's, and the agent itself comes back with its own.
func TestATokenServesOneKey(t *testing.T) {
	c := &clusterOf{node: kube.Node{Name: "node-1", UID: "uid", Token: "JTI=1"}}
	k := newPsat(t, c)
	key := ecKey(t, elliptic.P256()).Public()
	prove := func(key crypto.PublicKey, reason string) {
		t.Helper()
		_, err := k.Attest(t.Context(), psatEvidence(t, key, "prod", "token"), nil)
		if reason == "" && err != nil || reason != "" && (fault.ReasonOf(err) != reason || fault.CauseOf(err) != "evidence_used") {
			t.Fatalf("%v, want %q", err, reason)
		}
	}
	prove(key, "")
	prove(ecKey(t, elliptic.P256()).Public(), "psat_rejected")
	prove(key, "")
	c.node.Token = "JTI=2" // the kubelet replaced it
	prove(ecKey(t, elliptic.P256()).Public(), "")
	c.node.Token = "" // an API server that does not name tokens
	prove(ecKey(t, elliptic.P256()).Public(), "")
	prove(ecKey(t, elliptic.P256()).Public(), "")
}

// NEG-17, NEG-15: what can be read in two ways is refused, and a cluster's
// refusal makes no agent.
func TestPsatEvidenceThatIsRefused(t *testing.T) {
	c := &clusterOf{node: kube.Node{UID: "uid"}}
	k := newPsat(t, c)
	key := ecKey(t, elliptic.P256()).Public()
	good := psatEvidence(t, key, "prod", "token").Payload
	for name, tc := range map[string]struct {
		payload []byte
		reason  string
	}{
		"a field twice":    {append(append([]byte{}, good...), good...), "payload_ambiguous"},
		"an unknown field": {append(append([]byte{}, good...), 0x7a, 1, 'x'), "payload_ambiguous"},
		"no message":       {[]byte{0xff}, "payload_malformed"},
		"no token":         {psatEvidence(t, key, "prod", "").Payload, "psat_rejected"},
		"a long token":     {psatEvidence(t, key, "prod", strings.Repeat("x", 16<<10+1)).Payload, "psat_rejected"},
	} {
		if _, err := k.Attest(t.Context(), attest.Evidence{Payload: tc.payload, PublicKey: key}, nil); fault.ReasonOf(err) != tc.reason {
			t.Errorf("%s: %v", name, err)
		}
	}
	if c.asked != 0 {
		t.Errorf("the cluster was asked %d times", c.asked)
	}
	c.err = fault.New(fault.Denied, "psat_rejected", "no")
	got, err := k.Attest(t.Context(), psatEvidence(t, key, "prod", "token"), nil)
	if fault.ReasonOf(err) != "psat_rejected" || !got.AgentID.IsZero() {
		t.Errorf("%+v, %v", got, err)
	}
}

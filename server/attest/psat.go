package attest

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/selector"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
	"github.com/seed-caa81108/assay/server/kube"
)

// maxPsat bounds a token; real ones have about 1.5 KB.
const maxPsat = 16 << 10

// clusters know which node the holder of a pod's token is the agent of.
type clusters interface {
	AgentNode(ctx context.Context, cluster, token string) (kube.Node, error)
}

// K8SPsatConfig is what a K8SPsat needs.
type K8SPsatConfig struct {
	TrustDomain spiffeid.TrustDomain
	// ReservedPrefix is "/assay/" or "/spire/".
	ReservedPrefix string
	Clusters       clusters
	Records        nodeRecords
}

// K8SPsat attests a node of a Kubernetes cluster by the projected ServiceAccount
// token of the agent's pod on it. The payload is an agentv1.K8SPsatPayload.
type K8SPsat struct{ cfg K8SPsatConfig }

// NewK8SPsat returns the attestor "k8s_psat".
func NewK8SPsat(cfg K8SPsatConfig) *K8SPsat { return &K8SPsat{cfg: cfg} }

// Attest asks the cluster whose the token is. The agent is named by cluster and
// node UID, so a node keeps its agent over new pods, and one that is made anew
// under its old name is another. The same token may attest again with the key
// that it came with first, and with no other: that would be a copy.
func (k *K8SPsat) Attest(ctx context.Context, e Evidence, _ func(context.Context, []byte) ([]byte, error)) (Result, error) {
	var p agentv1.K8SPsatPayload
	if err := readOnce(e.Payload, &p); err != nil {
		return Result{}, err
	}
	if p.GetToken() == "" || len(p.GetToken()) > maxPsat {
		return Result{}, psatRejected(errors.New("there is no token, or a longer one than any is"))
	}
	node, err := k.cfg.Clusters.AgentNode(ctx, p.GetCluster(), p.GetToken())
	if err != nil {
		return Result{}, err
	}
	id, err := spiffeid.FromPath(k.cfg.TrustDomain, k.cfg.ReservedPrefix+"agent/"+agentv1.AttestorK8SPsat+"/"+node.Cluster+"/"+node.UID)
	if err != nil {
		return Result{}, fmt.Errorf("build agent id: %w", err)
	}
	key, err := KeyHash(e.PublicKey)
	if err != nil {
		return Result{}, err
	}
	selectors := psatSelectors(node)
	// From here on the caller is that node, whatever becomes of it.
	result := Result{AgentID: id, Selectors: selectors, CanReattest: true}
	err = k.cfg.Records.RecordAttested(ctx, id, agentv1.AttestorK8SPsat, selectors, key, node.Token)
	if fault.ReasonOf(err) == "evidence_used" {
		err = psatRejected(err)
	}
	return result, err
}

// psatSelectors are what node aliases can go by. What somebody else than the
// cluster's own parts decides, such as labels, is there only if the
// configuration asks for it.
func psatSelectors(n kube.Node) selector.Set {
	values := []string{
		"cluster:" + n.Cluster, "agent_ns:" + n.Namespace, "agent_sa:" + n.ServiceAccount,
		"agent_pod_name:" + n.PodName, "agent_pod_uid:" + n.PodUID, "agent_node_name:" + n.Name, "agent_node_uid:" + n.UID,
	}
	for key, value := range n.Labels {
		values = append(values, "agent_node_label:"+key+":"+value)
	}
	slices.Sort(values)
	list := make([]selector.Selector, len(values))
	for i, value := range values {
		list[i] = selector.Selector{Type: agentv1.AttestorK8SPsat, Value: value}
	}
	return selector.NewSet(list...)
}

func psatRejected(cause error) error {
	return fault.Wrap(fault.Denied, cause, "psat_rejected", "the server does not take this pod's token; its log says why")
}

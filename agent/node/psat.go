package node

import (
	"bytes"
	"context"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
	agentv1 "github.com/seed-caa81108/assay/proto/agent/v1"
)

// maxPsat bounds the file; tokens have about 1.5 KB.
const maxPsat = 16 << 10

// K8SPsat is how a node of a Kubernetes cluster proves itself: by the projected
// ServiceAccount token of the agent's pod. The kubelet replaces it now and then,
// so it is read anew at each attestation.
type K8SPsat struct {
	Cluster   string
	TokenFile string
}

func (k K8SPsat) isSet() bool { return k.Cluster != "" }

// read returns the token. Others on the node may be able to read the file: the
// kubelet decides its mode.
func (k K8SPsat) read() (string, error) {
	data, err := durable.ReadTrusted(k.TokenFile, maxPsat)
	if err != nil {
		return "", fmt.Errorf("read k8s_psat.token_file: %w", err)
	}
	token := bytes.TrimSpace(data)
	if len(token) == 0 {
		return "", fault.New(fault.Precondition, "psat_missing", k.TokenFile+" is empty: project a ServiceAccount token for the server's audience there")
	}
	return string(token), nil
}

// joinByPod attests by the pod's token.
func (n *Node) joinByPod(ctx context.Context) error {
	token, err := n.cfg.K8SPsat.read()
	if err != nil {
		return err
	}
	return n.attestBy(ctx, evidence{
		attestor: agentv1.AttestorK8SPsat,
		payload: func(context.Context) ([]byte, error) {
			return proto.Marshal(&agentv1.K8SPsatPayload{Cluster: n.cfg.K8SPsat.Cluster, Token: token})
		},
	})
}

package istioca

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/seed-caa81108/assay/pkg/fault"
	"github.com/seed-caa81108/assay/pkg/name"
	"github.com/seed-caa81108/assay/server/kube"
)

// Keys of a request's metadata.
const (
	keySigner      = "CertSigner"
	keyCluster     = "ClusterID"
	keyImpersonate = "ImpersonatedIdentity"
)

// By which rule a certificate is issued, in the audit log.
const (
	ruleToken = "istio_token"
	ruleNode  = "istio_node_proxy"
)

// grant is what a caller may have.
type grant struct {
	id   spiffeid.ID
	ttl  time.Duration // zero: as long as others
	rule string
}

// authorize decides whose certificate a caller gets: its own, or that of a pod on
// its node. What a node proxy is refused is errImpersonation, whatever the step.
func (s *Service) authorize(ctx context.Context, from *source, caller kube.Account, metadata *structpb.Struct) (grant, error) {
	fields := metadata.GetFields()
	if signer, ok := fields[keySigner]; ok && !isText(signer, "") {
		return grant{}, fault.New(fault.Invalid, "cert_signer_unknown", "the request names a signer (CertSigner): there is one authority here, leave ISTIO_META_CERT_SIGNER out")
	}
	if id, ok := fields[keyCluster]; ok && !isText(id, "") && !isText(id, from.cfg.ClusterID) {
		return grant{}, notAuthenticated(refused("cluster_unknown", "the ClusterID of the request is not that of the token's cluster"))
	}
	wanted, ok := fields[keyImpersonate]
	if !ok {
		return s.own(ctx, caller)
	}
	g, err := s.impersonated(ctx, caller, wanted)
	if err != nil && fault.KindOf(err) != fault.NotReady {
		err = notImpersonated(err)
	}
	return g, err
}

// notImpersonated is what node proxies hear, in Istio's words.
func notImpersonated(cause error) error {
	return fault.Wrap(fault.Unauthenticated, cause, "impersonation_failed", "request impersonation authentication failure")
}

func isText(v *structpb.Value, text string) bool {
	kind, ok := v.GetKind().(*structpb.Value_StringValue)
	return ok && kind.StringValue == text
}

// own is what a ServiceAccount's pods get.
func (s *Service) own(ctx context.Context, caller kube.Account) (grant, error) {
	if err := s.clusters.CheckBound(ctx, caller); fault.KindOf(err) == fault.NotReady {
		return grant{}, err
	} else if err != nil {
		return grant{}, notAuthenticated(err)
	}
	return s.grant(caller.Cluster, caller.Namespace, caller.Name, ruleToken)
}

func (s *Service) grant(cluster, namespace, account, rule string) (grant, error) {
	id, ttl, ok := s.clusters.AccountIdentity(cluster, namespace, account)
	if !ok {
		return grant{}, fault.New(fault.Denied, "identity_excluded", "kubernetes.rules keep identities from this ServiceAccount")
	}
	return grant{id, ttl, rule}, nil
}

// impersonated is what a node proxy gets for a pod. The steps are:
//
//  1. the caller's ServiceAccount is one of trusted_node_accounts;
//  2. what it wants is an identity of this mesh: /ns/<namespace>/sa/<name>;
//  3. its own pod, to which its token is bound, runs on a node;
//  4. a pod of the wanted ServiceAccount runs on the same node.
func (s *Service) impersonated(ctx context.Context, caller kube.Account, wanted *structpb.Value) (grant, error) {
	if !slices.Contains(s.cfg.TrustedNodeAccounts, caller.Namespace+"/"+caller.Name) {
		return grant{}, refused("node_account_unknown", "the caller's ServiceAccount is not one of istio.trusted_node_accounts")
	}
	text, ok := wanted.GetKind().(*structpb.Value_StringValue)
	if !ok {
		return grant{}, refused("impersonation_malformed", "the identity that is asked for is no text")
	}
	namespace, name, err := s.split(text.StringValue)
	if err != nil {
		return grant{}, err
	}
	node, err := s.clusters.NodeOf(ctx, caller)
	if err != nil {
		return grant{}, err
	}
	if err := s.clusters.RunsOn(ctx, caller.Cluster, node, namespace, name); err != nil {
		return grant{}, err
	}
	return s.grant(caller.Cluster, namespace, name, ruleNode)
}

// split takes an identity of the mesh apart.
func (s *Service) split(text string) (namespace, account string, err error) {
	id, err := name.ParseID(text)
	if err != nil {
		return "", "", refused("impersonation_malformed", "the identity that is asked for is no SPIFFE ID")
	}
	if id.TrustDomain() != s.td {
		return "", "", refused("impersonation_foreign", "the identity that is asked for is of another trust domain")
	}
	parts := strings.Split(id.Path(), "/") // begins with an empty one
	if len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" || !accountName.MatchString(parts[2]+"/"+parts[4]) {
		return "", "", refused("impersonation_malformed", "the identity that is asked for is not /ns/<namespace>/sa/<name>")
	}
	return parts[2], parts[4], nil
}

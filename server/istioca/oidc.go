package istioca

import (
	"context"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/seed-caa81108/assay/server/kube"
)

// maxSkew is how far ahead the clock of who made a token may be.
const maxSkew = time.Minute

// oidc verifies tokens by the keys that their cluster publishes.
type oidc struct {
	cluster   string
	issuer    string
	audiences []string
	keys      *keySet
}

func newOIDC(cluster string, cfg ClusterConfig, audiences []string) (*oidc, error) {
	keys, err := newKeySet("istio.clusters."+cluster+".oidc", *cfg.OIDC)
	if err != nil {
		return nil, err
	}
	return &oidc{cluster: cluster, issuer: cfg.Issuer, audiences: audiences, keys: keys}, nil
}

// bound is what a ServiceAccount's token says besides the standard claims.
type bound struct {
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		ServiceAccount struct {
			Name string `json:"name"`
		} `json:"serviceaccount"`
		Pod  object `json:"pod"`
		Node object `json:"node"`
	} `json:"kubernetes.io"`
}

type object struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// known implements verifier: a signature is verified sooner than it is found.
func (*oidc) known(token) (kube.Account, error, bool) { return kube.Account{}, nil, false }

func (o *oidc) verify(ctx context.Context, t token) (kube.Account, error) {
	allowed := make([]jose.SignatureAlgorithm, len(algorithms))
	for i, a := range algorithms {
		allowed[i] = jose.SignatureAlgorithm(a)
	}
	parsed, err := jwt.ParseSigned(t.text, allowed)
	if err != nil || len(parsed.Headers) != 1 {
		return kube.Account{}, refused("token_malformed", "the token is no JSON Web Token of a ServiceAccount")
	}
	key, err := o.keys.find(ctx, parsed.Headers[0].KeyID)
	if err != nil {
		return kube.Account{}, err
	}
	var says jwt.Claims
	var more bound
	if err := parsed.Claims(key, &says, &more); err != nil {
		return kube.Account{}, refused("token_invalid", "the token is not signed by its cluster's key")
	}
	if err := o.check(says, time.Now()); err != nil {
		return kube.Account{}, err
	}
	namespace, name, ok := kube.SplitSubject(says.Subject)
	k := more.Kubernetes
	switch {
	case !ok || k.Namespace != "" && k.Namespace != namespace || k.ServiceAccount.Name != "" && k.ServiceAccount.Name != name:
		return kube.Account{}, refused("no_service_account", "the token is no ServiceAccount's, or of two")
	case (k.Pod.Name == "") != (k.Pod.UID == ""):
		return kube.Account{}, refused("not_bound", "the token names half a pod")
	}
	return kube.Account{
		Cluster: o.cluster, Namespace: namespace, Name: name, PodName: k.Pod.Name, PodUID: k.Pod.UID,
		NodeName: k.Node.Name, NodeUID: k.Node.UID, Token: says.ID,
	}, nil
}

// check holds the standard claims to what is expected (RFC 7519 section 4.1).
func (o *oidc) check(says jwt.Claims, now time.Time) error {
	switch {
	case says.Issuer != o.issuer:
		return refused("issuer", "the token is of another issuer than its cluster's")
	case !slices.ContainsFunc(says.Audience, func(a string) bool { return slices.Contains(o.audiences, a) }):
		return refused("audience", "the token is not for one of istio.audiences")
	case says.Expiry == nil || !now.Before(says.Expiry.Time()):
		return refused("token_expired", "the token has expired, or has no end")
	case says.NotBefore != nil && says.NotBefore.Time().After(now.Add(maxSkew)), says.IssuedAt != nil && says.IssuedAt.Time().After(now.Add(maxSkew)):
		return refused("token_early", "the token is of a time to come: see the clocks")
	}
	return nil
}

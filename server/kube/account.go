package kube

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// Account is a ServiceAccount, as a token of its proves it, and what that token
// is bound to.
type Account struct {
	Cluster, Namespace, Name string
	// PodName and PodUID are of the pod that the token was made for; empty: for
	// none.
	PodName, PodUID string
	// NodeName and NodeUID are those of the pod's node; empty if the API server
	// does not say, as older ones don't.
	NodeName, NodeUID string
	// Token names the token; empty if the API server does not.
	Token string
	// Reviewed says that the API server has said all this a moment ago. Else the
	// token says it, under its cluster's signature, and its pod may be gone.
	Reviewed bool
}

// Extra names of a TokenReview's user, and what all ServiceAccounts are.
const (
	extraPodName     = "authentication.kubernetes.io/pod-name"
	extraPodUID      = "authentication.kubernetes.io/pod-uid"
	extraNodeName    = "authentication.kubernetes.io/node-name"
	extraNodeUID     = "authentication.kubernetes.io/node-uid"
	extraToken       = "authentication.kubernetes.io/credential-id"
	accountPrefix    = "system:serviceaccount:"
	accountsGroup    = "system:serviceaccounts"
	accountsGroupFor = "system:serviceaccounts:"
)

// Review has a cluster's API server say whose a token is, if it is for one of
// the audiences. That it is nobody's is fault.Denied, that there is no answer
// fault.NotReady. The caller bounds how many are under way.
func (c *Clusters) Review(ctx context.Context, cluster, token string, audiences []string) (Account, error) {
	cl := c.byName[cluster]
	if cl == nil {
		return Account{}, errNoCluster
	}
	return cl.account(ctx, cl.api.proxies, token, audiences)
}

var errNoCluster = refused("cluster_unknown", "kubernetes.clusters has no cluster of that name")

func (c *cluster) account(ctx context.Context, by rest.Interface, token string, audiences []string) (Account, error) {
	status, err := c.api.review(ctx, by, token, audiences)
	if err != nil {
		return Account{}, err
	}
	account, err := readReview(status, audiences)
	account.Cluster, account.Reviewed = c.name, err == nil
	return account, err
}

// readReview takes from a review what it proves. No claim may be there twice:
// two that differ could be read in two ways.
func readReview(s authenticationv1.TokenReviewStatus, audiences []string) (Account, error) {
	if s.Error != "" || !s.Authenticated {
		return Account{}, refused("token_invalid", "the API server does not take the token")
	}
	// A reviewer that does not know audiences leaves them out, having checked
	// none: then the token may be one for the API server itself.
	if !slices.ContainsFunc(s.Audiences, func(a string) bool { return slices.Contains(audiences, a) }) {
		return Account{}, refused("audience", "the API server does not say that the token is for the audience "+strings.Join(audiences, " or "))
	}
	namespace, name, ok := SplitSubject(s.User.Username)
	if !ok || !slices.Contains(s.User.Groups, accountsGroup) || !slices.Contains(s.User.Groups, accountsGroupFor+namespace) {
		return Account{}, refused("no_service_account", "the token is no ServiceAccount's")
	}
	bound := Account{Namespace: namespace, Name: name}
	for key, into := range map[string]*string{
		extraPodName: &bound.PodName, extraPodUID: &bound.PodUID, extraNodeName: &bound.NodeName, extraNodeUID: &bound.NodeUID, extraToken: &bound.Token,
	} {
		switch values := s.User.Extra[key]; {
		case len(values) == 1 && values[0] != "":
			*into = values[0]
		case len(values) > 0:
			return Account{}, refused("not_bound", "a claim of the token is there twice, or empty")
		}
	}
	if (bound.PodName == "") != (bound.PodUID == "") {
		return Account{}, refused("not_bound", "the token names half a pod")
	}
	return bound, nil
}

// SplitSubject takes the name of a token's subject apart if it is that of a
// ServiceAccount: system:serviceaccount:<namespace>:<name>.
func SplitSubject(subject string) (namespace, name string, ok bool) {
	account, ok := strings.CutPrefix(subject, accountPrefix)
	namespace, name, split := strings.Cut(account, ":")
	if !ok || !split || !label.MatchString(namespace) || !subdomain.MatchString(name) {
		return "", "", false
	}
	return namespace, name, true
}

// checkPod holds the pod that the API server has to the token.
func (a Account) checkPod(pod *corev1.Pod, now time.Time) error {
	switch {
	case string(pod.UID) != a.PodUID:
		return refused("pod_replaced", "the token is of an earlier pod of that name")
	case pod.Spec.ServiceAccountName != a.Name:
		return refused("service_account", "the pod has another ServiceAccount than its token")
	case pod.Spec.NodeName == "" || a.NodeName != "" && a.NodeName != pod.Spec.NodeName:
		return refused("node_mismatch", "the pod is on another node than its token says")
	case pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed:
		return refused("pod_ended", "the token's pod has ended")
	// The timestamp is when the time that the pod has to stop is over.
	case pod.DeletionTimestamp != nil && now.After(pod.DeletionTimestamp.Time):
		return refused("pod_deleted", "the token's pod was deleted")
	}
	return nil
}

func gone(err error, reason, text string) error {
	if errors.Is(err, errGone) {
		return refused(reason, text)
	}
	return err
}

func refused(reason, text string) error { return fault.New(fault.Denied, reason, text) }

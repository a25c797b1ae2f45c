package kube

import (
	"context"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// AccountIdentity is Identity for the pods of a ServiceAccount.
func (c *Clusters) AccountIdentity(cluster, namespace, account string) (id spiffeid.ID, ttl time.Duration, ok bool) {
	return c.Identity(cluster, &Pod{Namespace: namespace, ServiceAccount: account})
}

// CheckBound says whether the pod that a token is bound to is over: then
// fault.Denied. One that is not known may be new: a review has said that it is
// there; for a token that was not reviewed its cluster's API server is asked, and
// if that can't answer it is fault.NotReady. Of a cluster that is not watched, and
// of a token without a pod, nothing is known.
func (c *Clusters) CheckBound(ctx context.Context, a Account) error {
	cl := c.byName[a.Cluster]
	if cl == nil || a.PodName == "" {
		return nil
	}
	pod, err := cl.index.podNow(a.Namespace, a.PodName, time.Now())
	if a.Reviewed && (pod == nil || pod.UID != a.PodUID) {
		return nil
	}
	if err != nil || pod == nil || pod.UID != a.PodUID {
		if pod, err = cl.api.podNow(ctx, a); err != nil {
			return err
		}
	}
	return pod.checkAccount(a, time.Now())
}

// podNow is the pod that a token is bound to, by the API server.
func (a *api) podNow(ctx context.Context, of Account) (*Pod, error) {
	found, err := a.pod(ctx, of.Namespace, of.PodName)
	if err != nil {
		return nil, gone(err, "pod_gone", "the token's pod is not there any more")
	}
	return newPod(found), nil
}

// checkAccount holds a pod to a token that says it is bound to it.
func (p *Pod) checkAccount(a Account, now time.Time) error {
	switch {
	case p.UID != a.PodUID:
		return refused("pod_replaced", "the token is of an earlier pod of that name")
	case p.ServiceAccount != a.Name:
		return refused("service_account", "the pod has another ServiceAccount than its token")
	case a.NodeName != "" && p.Node != "" && a.NodeName != p.Node:
		return refused("node_mismatch", "the pod is on another node than its token says")
	case p.Ended:
		return refused("pod_ended", "the token's pod has ended")
	case !p.lives(now):
		return refused("pod_deleted", "the token's pod was deleted")
	}
	return nil
}

// NodeOf returns the name of the node on which the pod runs that a token is
// bound to: by what is known of the cluster's pods, and where that does not have
// it (yet), by its API server. That there is none is fault.Denied, that it can't
// be told fault.NotReady.
func (c *Clusters) NodeOf(ctx context.Context, a Account) (string, error) {
	cl := c.byName[a.Cluster]
	switch {
	case cl == nil:
		return "", errNoCluster
	case a.PodName == "":
		return "", refused("not_bound", "the token is not bound to one pod")
	}
	pod := cl.index.pod(a.Namespace, a.PodName)
	if pod == nil || pod.UID != a.PodUID || pod.Node == "" {
		var err error
		if pod, err = cl.api.podNow(ctx, a); err != nil {
			return "", err
		}
	}
	if err := pod.checkAccount(a, time.Now()); err != nil {
		return "", err
	}
	if pod.Node == "" {
		return "", refused("node_mismatch", "the token's pod is on no node")
	}
	return pod.Node, nil
}

// RunsOn says whether a pod of a ServiceAccount runs on the node: nil, or
// fault.Denied. One that is being deleted does not count. A pod that is not known
// yet is looked for at the API server, so that nobody is told no who asks as his
// pod begins; if that can't answer it is fault.NotReady.
func (c *Clusters) RunsOn(ctx context.Context, cluster, node, namespace, account string) error {
	cl := c.byName[cluster]
	if cl == nil {
		return errNoCluster
	}
	runs := func(p *Pod) bool {
		return p.Node == node && p.Namespace == namespace && p.ServiceAccount == account && !p.Ended && p.DeletedAt.IsZero()
	}
	known, err := cl.index.anyOn(node, runs, time.Now())
	if err != nil || known {
		return err
	}
	pods, err := cl.api.podsOn(ctx, namespace, node)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(pods, func(p corev1.Pod) bool { return runs(newPod(&p)) }) {
		return nil
	}
	return refused("no_such_workload_on_node", "no pod of that ServiceAccount runs on the caller's node, by the cluster's API server")
}

// pod returns the pod of this name, nil if none is known.
func (x *index) pod(namespace, name string) *Pod {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.pods[namespace+"/"+name]
}

// podNow is pod, or why the index can't be gone by.
func (x *index) podNow(namespace, name string, now time.Time) (*Pod, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.pods[namespace+"/"+name], x.usable(now)
}

// anyOn says whether a pod on a node, by the node's name, is what is looked for;
// or why the index can't be gone by.
func (x *index) anyOn(node string, is func(*Pod) bool, now time.Time) (bool, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.usable(now); err != nil {
		return false, err
	}
	for _, p := range x.by[node] {
		if is(p) {
			return true, nil
		}
	}
	return false, nil
}

// podsOn asks for the pods of a namespace on a node.
func (a *api) podsOn(ctx context.Context, namespace, node string) ([]corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var list corev1.PodList
	o := metav1.ListOptions{FieldSelector: "spec.nodeName=" + node}
	err := a.core.Get().Namespace(namespace).Resource("pods").VersionedParams(&o, metav1.ParameterCodec).Do(ctx).Into(&list)
	if err != nil {
		return nil, a.unavailable(err, "list pods")
	}
	return list.Items, nil
}

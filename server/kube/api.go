package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	// askTimeout bounds one question to an API server.
	askTimeout = 10 * time.Second
	// A server asks for each agent that attests, three times; a fleet that
	// starts at once must not wait for a client's own limit.
	askRate, askBurst = 200, 400
	// meshRate is likewise for the tokens of a mesh's proxies.
	meshRate, meshBurst = 1000, 2000
)

// api is a cluster's API server.
type api struct {
	cluster string
	core    rest.Interface
	tokens  rest.Interface // authentication.k8s.io
	// proxies is tokens for those of a mesh's proxies. Whoever reaches the agents'
	// port can use up the rate of tokens, and proxies would get no certificates.
	proxies rest.Interface
}

// newAPI prepares a connection. Nothing is asked yet: a cluster that is away
// does not keep the server from starting.
func newAPI(cluster string, cfg *rest.Config, agent string) (*api, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, authenticationv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("build scheme: %w", err)
		}
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	client := func(path string, version schema.GroupVersion, perSecond float32, burst int) (rest.Interface, error) {
		c := rest.CopyConfig(cfg)
		c.APIPath, c.GroupVersion, c.UserAgent = path, &version, agent
		c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
		c.ContentType = runtime.ContentTypeProtobuf
		c.QPS, c.Burst = perSecond, burst
		return rest.RESTClientFor(c)
	}
	a := &api{cluster: cluster}
	var err error
	if a.core, err = client("/api", corev1.SchemeGroupVersion, askRate, askBurst); err == nil {
		a.tokens, err = client("/apis", authenticationv1.SchemeGroupVersion, askRate, askBurst)
	}
	if err == nil {
		a.proxies, err = client("/apis", authenticationv1.SchemeGroupVersion, meshRate, meshBurst)
	}
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "config_kubernetes",
			"kubernetes.clusters."+cluster+": what its kubeconfig says can't be used: see the cause, and try it with kubectl")
	}
	return a, nil
}

// restConfig says how a cluster is reached.
func restConfig(cluster, kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		cfg, err := rest.InClusterConfig()
		if err != nil {
			return nil, fault.Wrap(fault.Precondition, err, "config_kubernetes",
				"kubernetes.clusters."+cluster+" has no kubeconfig and the server runs in no cluster: set kubeconfig")
		}
		return cfg, nil
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "config_kubernetes",
			"kubernetes.clusters."+cluster+".kubeconfig: "+kubeconfig+" can't be used: try it with kubectl")
	}
	return cfg, nil
}

// review has the API server say what a token is worth for any of the audiences.
func (a *api) review(ctx context.Context, by rest.Interface, token string, audiences []string) (authenticationv1.TokenReviewStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: audiences}}
	var answer authenticationv1.TokenReview
	err := by.Post().Resource("tokenreviews").Body(review).Do(ctx).Into(&answer)
	if err != nil {
		return authenticationv1.TokenReviewStatus{}, a.unavailable(err, "create TokenReviews")
	}
	return answer.Status, nil
}

// errGone says that the API server knows no such object.
var errGone = errors.New("there is no such object")

func (a *api) pod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	pod := &corev1.Pod{}
	return pod, a.get(ctx, a.core.Get().Namespace(namespace).Resource("pods").Name(name), pod, "get pods")
}

func (a *api) node(ctx context.Context, name string) (*corev1.Node, error) {
	node := &corev1.Node{}
	return node, a.get(ctx, a.core.Get().Resource("nodes").Name(name), node, "get nodes")
}

func (a *api) get(ctx context.Context, r *rest.Request, into runtime.Object, right string) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	err := r.Do(ctx).Into(into)
	if apierrors.IsNotFound(err) {
		return errGone
	}
	if err != nil {
		return a.unavailable(err, right)
	}
	return nil
}

// unavailable words an answer that is none. What it says goes to agents too.
func (a *api) unavailable(err error, right string) error {
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		return fault.Wrap(fault.NotReady, err, "kubernetes_forbidden", "the cluster "+a.cluster+" does not let the server "+right+": give it that right")
	}
	return fault.Wrap(fault.NotReady, err, "kubernetes_unavailable", "the API server of cluster "+a.cluster+" gives no answer: retry")
}

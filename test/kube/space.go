//go:build kube

package kube

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authenticationclient "k8s.io/client-go/kubernetes/typed/authentication/v1"
	authorizationclient "k8s.io/client-go/kubernetes/typed/authorization/v1"
	coreclient "k8s.io/client-go/kubernetes/typed/core/v1"
	rbacclient "k8s.io/client-go/kubernetes/typed/rbac/v1"
)

// Space is what one test has of a cluster: a namespace of its own, and what
// the test makes elsewhere and is removed when it ends.
type Space struct {
	*Cluster
	// Namespace is the space's name, which nodes and roles begin with.
	Namespace string
	// Core and Reviews are an administrator's clients.
	Core    *coreclient.CoreV1Client
	Reviews *authenticationclient.AuthenticationV1Client

	t     testing.TB
	roles *rbacclient.RbacV1Client
}

// NewSpace makes a namespace with a name that the cluster has not yet.
func (c *Cluster) NewSpace(t testing.TB) *Space {
	t.Helper()
	return c.space(t, metav1.ObjectMeta{GenerateName: "test-"})
}

// Twin makes a namespace of the same name in another cluster.
func (s *Space) Twin(t testing.TB, c *Cluster) *Space {
	t.Helper()
	return c.space(t, metav1.ObjectMeta{Name: s.Namespace})
}

func (c *Cluster) space(t testing.TB, namespace metav1.ObjectMeta) *Space {
	t.Helper()
	s := &Space{Cluster: c, t: t}
	var err error
	if s.Core, err = coreclient.NewForConfig(c.Config(c.AdminToken)); err != nil {
		t.Fatal(err)
	}
	if s.Reviews, err = authenticationclient.NewForConfig(c.Config(c.AdminToken)); err != nil {
		t.Fatal(err)
	}
	if s.roles, err = rbacclient.NewForConfig(c.Config(c.AdminToken)); err != nil {
		t.Fatal(err)
	}
	made, err := s.Core.Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: namespace}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("create a namespace: %v", err)
	}
	s.Namespace = made.Name
	// With no controller to empty it, the namespace stays; its pods go, since
	// watches of whole nodes or clusters see them.
	s.cleanup("pods", func(ctx context.Context) error {
		now := int64(0)
		return s.Core.Pods(s.Namespace).DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{})
	})
	return s
}

// Account makes a service account that may do what rules say, in the whole
// cluster, from when it returns.
func (s *Space) Account(name string, rules ...rbacv1.PolicyRule) *corev1.ServiceAccount {
	s.t.Helper()
	account, err := s.Core.ServiceAccounts(s.Namespace).Create(s.t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatalf("create service account %s: %v", name, err)
	}
	if len(rules) == 0 {
		return account
	}
	meta := metav1.ObjectMeta{Name: s.Namespace + "-" + name}
	if _, err := s.roles.ClusterRoles().Create(s.t.Context(), &rbacv1.ClusterRole{ObjectMeta: meta, Rules: rules}, metav1.CreateOptions{}); err != nil {
		s.t.Fatalf("create the role of %s: %v", name, err)
	}
	s.cleanup("role", func(ctx context.Context) error {
		return s.roles.ClusterRoles().Delete(ctx, meta.Name, metav1.DeleteOptions{})
	})
	if _, err := s.roles.ClusterRoleBindings().Create(s.t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta,
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: meta.Name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: s.Namespace, Name: name}},
	}, metav1.CreateOptions{}); err != nil {
		s.t.Fatalf("bind the role of %s: %v", name, err)
	}
	s.cleanup("role binding", func(ctx context.Context) error {
		return s.roles.ClusterRoleBindings().Delete(ctx, meta.Name, metav1.DeleteOptions{})
	})
	s.awaitRights(name, rules)
	return account
}

// awaitRights waits until the API server goes by the role of an account, so that
// a refusal is not for rights that come in a moment.
func (s *Space) awaitRights(account string, rules []rbacv1.PolicyRule) {
	s.t.Helper()
	client, err := authorizationclient.NewForConfig(s.Config(s.AdminToken))
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	allowed := func(of authorizationv1.ResourceAttributes) {
		s.t.Helper()
		of.Namespace = s.Namespace // where a Role is as good
		review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User: "system:serviceaccount:" + s.Namespace + ":" + account, ResourceAttributes: &of,
		}}
		if err := poll(ctx, nil, func() error {
			answer, err := client.SubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
			if err == nil && !answer.Status.Allowed {
				err = fmt.Errorf("%+v is not allowed", of)
			}
			return err
		}); err != nil {
			s.t.Fatal(err)
		}
	}
	for _, rule := range rules {
		names := rule.ResourceNames
		if len(names) == 0 {
			names = []string{""}
		}
		for _, resource := range rule.Resources {
			for _, name := range names {
				for _, verb := range rule.Verbs {
					allowed(authorizationv1.ResourceAttributes{Group: rule.APIGroups[0], Resource: resource, Name: name, Verb: verb})
				}
			}
		}
	}
}

// as is a client of who has token.
func (s *Space) as(t testing.TB, token string) *coreclient.CoreV1Client {
	t.Helper()
	client, err := coreclient.NewForConfig(s.Config(token))
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// Token makes a token of a service account, for an hour; no audience means the
// API server's own. With a pod, the token is bound to it: it ends with the pod.
func (s *Space) Token(account, audience string, pod *corev1.Pod) string {
	s.t.Helper()
	var spec authenticationv1.TokenRequestSpec
	if audience != "" {
		spec.Audiences = []string{audience}
	}
	if pod != nil {
		spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}
	}
	answer, err := s.Core.ServiceAccounts(s.Namespace).CreateToken(s.t.Context(), account, &authenticationv1.TokenRequest{Spec: spec}, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatalf("create a token of %s: %v", account, err)
	}
	return answer.Status.Token
}

// Kubeconfig writes a kubeconfig for who has token and returns its path.
func (s *Space) Kubeconfig(token string) string {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: test
contexts:
- name: test
  context: {cluster: test, user: test}
clusters:
- name: test
  cluster: {server: %q, certificate-authority: %q}
users:
- name: test
  user: {token: %q}
`, s.URL, s.caFile(), token), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// cleanup calls remove at the test's end, also after the test left the API
// server stopped.
func (s *Space) cleanup(what string, remove func(context.Context) error) {
	s.t.Cleanup(func() {
		select {
		case <-s.api.Done():
			s.Restart(s.t)
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := remove(ctx); err != nil {
			s.t.Errorf("remove the %s of %s: %v", what, s.Namespace, err)
		}
	})
}

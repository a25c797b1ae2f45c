//go:build kube

package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// audience is one that the API server knows nothing of.
const audience = "assay-server"

// review asks the API server what a token is worth for an audience.
func review(ctx context.Context, s *Space, token, audience string) (authenticationv1.TokenReviewStatus, error) {
	answer, err := s.Reviews.TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return authenticationv1.TokenReviewStatus{}, err
	}
	return answer.Status, nil
}

func TestReviewNamesPodAndNode(t *testing.T) {
	s := cluster.NewSpace(t)
	node := s.Node("a")
	account := s.Account("web")
	pod := s.Run(Pod{Name: "web-1", Node: node.Name, Account: account.Name})

	got, err := review(t.Context(), s, s.Token(account.Name, audience, pod), audience)
	if err != nil || !got.Authenticated {
		t.Fatalf("review: %+v, %v", got, err)
	}
	if want := "system:serviceaccount:" + s.Namespace + ":web"; got.User.Username != want || got.User.UID != string(account.UID) {
		t.Errorf("the token is of %s %s, want %s %s", got.User.Username, got.User.UID, want, account.UID)
	}
	if !slices.Equal(got.Audiences, []string{audience}) {
		t.Errorf("audiences %v", got.Audiences)
	}
	for claim, want := range map[string]string{
		"pod-name": pod.Name, "pod-uid": string(pod.UID), "node-name": node.Name, "node-uid": string(node.UID),
	} {
		if values := got.User.Extra["authentication.kubernetes.io/"+claim]; !slices.Equal(values, authenticationv1.ExtraValue{want}) {
			t.Errorf("%s is %v, want %s", claim, values, want)
		}
	}
}

func TestReviewRefusesOtherAudiences(t *testing.T) {
	s := cluster.NewSpace(t)
	account := s.Account("web")
	for _, c := range []struct{ made, asked string }{
		{"somebody-else", audience},
		{audience, issuer},
		{"", audience}, // one for the API server itself
	} {
		got, err := review(t.Context(), s, s.Token(account.Name, c.made, nil), c.asked)
		if err != nil || got.Authenticated || got.Error == "" {
			t.Errorf("a token for %q, asked for %q: %+v, %v", c.made, c.asked, got, err)
		}
	}
}

func TestBoundTokenEndsWithItsPod(t *testing.T) {
	s := cluster.NewSpace(t)
	account := s.Account("web")
	pod := s.Run(Pod{Name: "web-1", Node: s.Node("a").Name, Account: account.Name})
	bound, unbound := s.Token(account.Name, audience, pod), s.Token(account.Name, audience, nil)
	valid := func(token string) error {
		got, err := review(t.Context(), s, token, audience)
		if err != nil {
			return err
		}
		if !got.Authenticated {
			return fmt.Errorf("not authenticated: %s", got.Error)
		}
		return nil
	}
	if err := errors.Join(valid(bound), valid(unbound)); err != nil {
		t.Fatal(err)
	}

	s.Delete(pod)
	// The API server remembers its own answers for about ten seconds.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := poll(ctx, nil, func() error {
		if valid(bound) == nil {
			return errors.New("the token of a deleted pod is valid")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if err := valid(unbound); err != nil {
		t.Errorf("the account's other token: %v", err)
	}
}

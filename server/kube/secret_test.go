package kube

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// secretAPI is an API server with one Secret, which may be missing.
type secretAPI struct {
	t      *testing.T
	held   *corev1.Secret
	refuse *metav1.Status // of writes
}

func (s *secretAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	status := s.refuse
	if r.Method == http.MethodGet {
		status = nil
		if s.held == nil {
			status = &metav1.Status{Code: http.StatusNotFound, Reason: metav1.StatusReasonNotFound}
		}
	}
	if status != nil {
		status.TypeMeta, status.Status = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, "Failure"
		w.WriteHeader(int(status.Code))
		_ = json.NewEncoder(w).Encode(status)
		return
	}
	if r.Method != http.MethodGet {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			s.t.Error(err)
		}
		s.held = &corev1.Secret{}
		if _, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, s.held); err != nil {
			s.t.Error(err)
		}
	}
	s.held.TypeMeta = metav1.TypeMeta{Kind: "Secret", APIVersion: "v1"}
	_ = json.NewEncoder(w).Encode(s.held)
}

func TestASecretIsKept(t *testing.T) {
	f := newFake(t)
	s := &secretAPI{t: t}
	f.server.Config.Handler = s
	c := f.clusters()
	read := func() TLSSecret {
		t.Helper()
		held, err := c.TLSSecret(t.Context(), "prod", "istio-system", "istiod-tls")
		if err != nil {
			t.Fatal(err)
		}
		return held
	}
	put := func(was TLSSecret, reason string) error {
		t.Helper()
		will := TLSSecret{Chain: []byte("chain"), Key: []byte("CANARY-key"), Roots: []byte("roots")}
		err := c.PutTLSSecret(t.Context(), "prod", "istio-system", "istiod-tls", was, will)
		if (err != nil || reason != "") && fault.ReasonOf(err) != reason {
			t.Errorf("got %v, want %q", err, reason)
		}
		return err
	}
	missing := func(err error) {
		t.Helper()
		if fault.ReasonOf(err) != "kubernetes_secret_missing" || !strings.Contains(err.Error(), "kubectl -n istio-system create secret generic istiod-tls") {
			t.Errorf("a Secret that is not there: %v", err)
		}
	}
	_, err := c.TLSSecret(t.Context(), "prod", "istio-system", "istiod-tls")
	missing(err)
	s.held = &corev1.Secret{Type: corev1.SecretTypeOpaque}
	none := read()
	if len(none.Chain)+len(none.Key)+len(none.Roots) > 0 {
		t.Errorf("there is %+v", none)
	}
	s.refuse = &metav1.Status{Code: 404, Reason: metav1.StatusReasonNotFound} // it went in between
	missing(put(none, "kubernetes_secret_missing"))
	s.refuse = nil
	_ = put(none, "")
	if s.held.Type != corev1.SecretTypeOpaque || string(s.held.Data["tls.crt"]) != "chain" || string(s.held.Data["tls.key"]) != "CANARY-key" || string(s.held.Data["ca.crt"]) != "roots" {
		t.Fatalf("made %+v", s.held)
	}
	if s.held.Annotations["helm.sh/resource-policy"] != "keep" {
		t.Errorf("helm may delete it: %v", s.held.Annotations)
	}
	s.held.Type = corev1.SecretTypeTLS
	s.held.Data["tls.key"], s.held.Data["other"], s.held.Labels = nil, []byte("kept"), map[string]string{"kept": "true"}
	_ = put(read(), "")
	if s.held.Type != corev1.SecretTypeTLS || string(s.held.Data["tls.key"]) != "CANARY-key" || string(s.held.Data["other"]) != "kept" || s.held.Labels["kept"] != "true" {
		t.Errorf("changed to %+v", s.held)
	}
	for _, refused := range []struct {
		metav1.Status
		reason string
	}{
		{metav1.Status{Code: 409, Reason: metav1.StatusReasonConflict}, "kubernetes_conflict"},
		{metav1.Status{Code: 403, Reason: metav1.StatusReasonForbidden}, "kubernetes_forbidden"},
		{metav1.Status{Code: 422, Reason: metav1.StatusReasonInvalid, Message: "CANARY-key is quoted"}, "kubernetes_secret_refused"},
	} {
		s.refuse = &refused.Status
		if err := put(read(), refused.reason); strings.Contains(err.Error(), "CANARY") { // NEG-18
			t.Errorf("the key is in %v", err)
		}
	}
	s.held.Type = corev1.SecretTypeServiceAccountToken
	_ = put(read(), "kubernetes_secret_type")
	if _, err := c.TLSSecret(t.Context(), "other", "istio-system", "istiod-tls"); fault.ReasonOf(err) != "cluster_unknown" {
		t.Errorf("another cluster: %v", err)
	}
}

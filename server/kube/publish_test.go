package kube

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// mapAPI is an API server with one ConfigMap, which may be missing. The real one
// is asked in test/kube.
type mapAPI struct {
	t      *testing.T
	held   *corev1.ConfigMap
	refuse map[string]int // status by method
	writes int
}

func (m *mapAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	fail := func(code int, reason metav1.StatusReason) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: int32(code), Reason: reason})
	}
	switch code := m.refuse[r.Method]; {
	case code == http.StatusConflict:
		fail(code, metav1.StatusReasonConflict)
		return
	case code != 0:
		fail(code, metav1.StatusReasonForbidden)
		return
	case r.Method == http.MethodGet && m.held == nil:
		fail(http.StatusNotFound, metav1.StatusReasonNotFound)
		return
	case r.Method != http.MethodGet:
		m.writes++
		body, err := io.ReadAll(r.Body)
		if err != nil {
			m.t.Error(err)
		}
		m.held = &corev1.ConfigMap{}
		if _, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, m.held); err != nil {
			m.t.Error(err)
		}
	}
	m.held.TypeMeta = metav1.TypeMeta{Kind: "ConfigMap", APIVersion: "v1"}
	_ = json.NewEncoder(w).Encode(m.held)
}

func TestTheBundleIsKeptInItsConfigMap(t *testing.T) {
	m := &mapAPI{t: t, refuse: map[string]int{}}
	server := httptest.NewServer(m)
	t.Cleanup(server.Close)
	a, err := newAPI("prod", &rest.Config{Host: server.URL}, "test")
	if err != nil {
		t.Fatal(err)
	}
	p := newPublisher("prod", "assay/assay-bundle", a)
	publish := func(bundle string, changed bool, reason string) {
		t.Helper()
		got, err := p.publish(t.Context(), bundle)
		if got != changed || fault.ReasonOf(err) != reason && (err != nil || reason != "") {
			t.Errorf("publish %q: %v, %v; want %v, %q", bundle, got, err, changed, reason)
		}
	}
	publish("one", true, "") // made
	publish("one", false, "")
	m.held.Data["other"] = "kept"
	publish("two", true, "")
	if m.held.Data[bundleKey] != "two" || m.held.Data["other"] != "kept" || m.writes != 2 {
		t.Errorf("the ConfigMap has %v after %d writes", m.held.Data, m.writes)
	}
	m.held.Data[bundleKey] = "forged"
	publish("two", true, "")
	m.refuse[http.MethodPut] = http.StatusConflict
	publish("three", false, "kubernetes_conflict")
	m.refuse[http.MethodPut] = http.StatusForbidden
	publish("three", false, "kubernetes_forbidden")
	m.held, m.refuse[http.MethodPost] = nil, http.StatusForbidden
	publish("three", false, "kubernetes_forbidden")
	m.refuse[http.MethodGet] = http.StatusForbidden
	publish("three", false, "kubernetes_forbidden")
}
